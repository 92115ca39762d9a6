// One step of projected gradient ascent on an image, value by value.
#pragma once

#include "common.h"

BMTARD_NAMESPACE_BEGIN

// A NaN passes through, as in torch.clamp.
template <typename T>
BMTARD_HD T clamped(T x, T low, T high) {
  x = select(x < low, low, x);
  return select(x > high, high, x);
}

// step_size * sign(grad), with sign(NaN) = 0 as in torch.sign.
template <typename T>
BMTARD_HD T sign_step_of(T grad, T step_size) {
  return select(grad > T(0), step_size, select(grad < T(0), -step_size, T(0)));
}

template <typename T>
BMTARD_HD T pgd_linf(T x_adv, T grad, T x, T step_size, T epsilon, T low, T high) {
  const T moved = x_adv + sign_step_of(grad, step_size);
  return clamped(clamped(moved, x - epsilon, x + epsilon), low, high);
}

// What scales the gradient so that its norm is step_size; no step without a finite norm > 0.
template <typename real>
BMTARD_HD real l2_step_scale(real squared_norm, real step_size) {
  using std::sqrt;
  const real norm = sqrt(squared_norm);
  return is_finite(norm) && norm > real(0) ? step_size / norm : real(0);
}

// What scales a perturbation back into the ball of radius epsilon.
template <typename real>
BMTARD_HD real l2_projection_scale(real squared_norm, real epsilon) {
  using std::sqrt;
  const real norm = sqrt(squared_norm);
  return norm > epsilon ? epsilon / norm : real(1);
}

BMTARD_NAMESPACE_END
