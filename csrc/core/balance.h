// The balance between K teachers: one step of the temperatures and the weights. All arrays are
// double [K]. One thread runs it once a step.
#pragma once

#include "../kernels.h"
#include "common.h"

BMTARD_NAMESPACE_BEGIN

// (L / L0) ** exponent.
BMTARD_HD double relative_loss(double loss, double initial_loss, double exponent) {
  using std::pow;
  // A teacher whose first loss was 0 has no relative loss: it counts as 1.
  const double r = initial_loss > 0 ? loss / initial_loss : 1.0;
  if (!(r > 0)) return 0;  // rounding can leave a KL slightly below 0
  return exponent == 1.0 ? r : pow(r, exponent);
}

// Normalization Loss Balance: each weight moves towards its teacher's share of the relative
// losses, then all are scaled to sum 1. The relative losses are computed twice, because an array
// of them would lie in a GPU thread's local memory.
BMTARD_HD void balance_weights(int32_t teachers, const double* losses, const double* initial_losses,
                               double weight_lr, double exponent, double* weights) {
  double total = 0;
  for (int32_t k = 0; k < teachers; ++k) {
    total += relative_loss(losses[k], initial_losses[k], exponent);
  }
  double sum = 0;
  for (int32_t k = 0; k < teachers; ++k) {
    const double relative = relative_loss(losses[k], initial_losses[k], exponent);
    const double share = total > 0 ? relative / total : 1.0 / teachers;
    double w = (1.0 - weight_lr) * weights[k] + weight_lr * share;
    w = w > 0 ? w : 0;
    weights[k] = w;
    sum += w;
  }
  for (int32_t k = 0; k < teachers; ++k) weights[k] = sum > 0 ? weights[k] / sum : 1.0 / teachers;
}

// Entropy-Based Balance as published: a fixed step down for a teacher whose entropy is
// above the mean of the others', up for one below.
BMTARD_HD void sign_step(int32_t teachers, const double* entropies, double temperature_lr,
                         double low, double high, double* temperatures) {
  if (teachers < 2) return;
  double total = 0;
  for (int32_t k = 0; k < teachers; ++k) total += entropies[k];
  for (int32_t k = 0; k < teachers; ++k) {
    const double others = (total - entropies[k]) / (teachers - 1);
    const double sign = (entropies[k] > others) - (entropies[k] < others);
    const double t = temperatures[k] - temperature_lr * sign;
    temperatures[k] = t < low ? low : (t > high ? high : t);
  }
}

// Moves a temperature towards the one that the search found, in log space.
BMTARD_HD double move_temperature(double current, double found, double momentum) {
  using std::exp;
  using std::log;
  if (momentum == 0.0) return found;
  return exp(momentum * log(current) + (1.0 - momentum) * log(found));
}

BMTARD_NAMESPACE_END
