// Entropy of softmax(z / temperature), its derivatives, and its gradient.
//
// u = (z - max z) / temperature, e = exp(u), S_k = sum e u^k, p = e / S_0.
//   entropy              H  = log S_0 - S_1 / S_0
//   dH / d log t         V  = Var_p(u)
//   d2H / (d log t)^2       = -(2 V + K), K the third central moment of u under p
//   dH / dz_i               = -p_i (log p_i + H) / temperature
#pragma once

#include "common.h"

BMTARD_NAMESPACE_BEGIN

// Sums of a row, or of a part of it. Sums of disjoint parts add if they have one maximum.
template <typename T>
struct EntropySums {
  T s0, s1;
};

template <typename T>
BMTARD_HD void accumulate(EntropySums<T>& sums, T u) {
  using std::exp;
  u = floor_exponent(u);
  const T e = exp(u);
  sums.s0 = sums.s0 + e;
  sums.s1 = sums.s1 + e * u;
}

// The same sums after the maximum has grown: d = (old max - new max) / temperature <= 0.
template <typename real>
BMTARD_HD EntropySums<real> shifted(EntropySums<real> sums, real d) {
  using std::exp;
  d = floor_exponent(d);
  const real scale = exp(d);
  return {scale * sums.s0, scale * (sums.s1 + d * sums.s0)};
}

template <typename real>
BMTARD_HD real entropy_of(EntropySums<real> sums) {
  using std::log;
  return log(sums.s0) - sums.s1 / sums.s0;
}

// As above, with the sums that the temperature search needs beside them.
template <typename T>
struct EntropyMoments {
  T s0, s1, s2, s3;
};

template <typename T>
BMTARD_HD void accumulate(EntropyMoments<T>& sums, T u) {
  using std::exp;
  u = floor_exponent(u);
  const T e = exp(u);
  const T eu = e * u;
  const T euu = eu * u;
  sums.s0 = sums.s0 + e;
  sums.s1 = sums.s1 + eu;
  sums.s2 = sums.s2 + euu;
  sums.s3 = sums.s3 + euu * u;
}

template <typename real>
BMTARD_HD EntropyMoments<real> shifted(EntropyMoments<real> sums, real d) {
  using std::exp;
  d = floor_exponent(d);
  const real scale = exp(d);
  return {scale * sums.s0, scale * (sums.s1 + d * sums.s0),
          scale * (sums.s2 + d * (2 * sums.s1 + d * sums.s0)),
          scale * (sums.s3 + d * (3 * sums.s2 + d * (3 * sums.s1 + d * sums.s0)))};
}

// Entropy of one row, or the mean over rows, with its first derivative by log temperature
// (variance) and the third central moment.
template <typename real>
struct EntropyDerivatives {
  real entropy, variance, third_moment;
};

template <typename real>
BMTARD_HD EntropyDerivatives<real> derivatives_of(EntropyMoments<real> sums) {
  using std::log;
  const real mean = sums.s1 / sums.s0;
  const real second = sums.s2 / sums.s0;
  const real variance = second - mean * mean;
  const real third = sums.s3 / sums.s0 - mean * (real(3) * second - real(2) * mean * mean);
  return {log(sums.s0) - mean, select(variance < real(0), real(0), variance), third};
}

// d entropy / d logit, from log p = u - log S_0.
template <typename T>
BMTARD_HD T entropy_gradient(T log_p, T entropy, T inverse_temperature) {
  using std::exp;
  log_p = floor_exponent(log_p);
  return -inverse_temperature * exp(log_p) * (log_p + entropy);
}

// This element's part of d entropy / d log temperature = sum_i p_i (log p_i + H) log p_i,
// which is Var_p(u), as log p and u differ by a constant.
template <typename T>
BMTARD_HD T variance_term(T log_p, T entropy) {
  using std::exp;
  log_p = floor_exponent(log_p);
  const T centered = log_p + entropy;
  return exp(log_p) * centered * centered;
}

BMTARD_NAMESPACE_END
