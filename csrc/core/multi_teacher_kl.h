// KL(p || q), p = softmax(teacher / temperature), q = softmax(student / student_temperature),
// in logit space: without a division by a probability or the logarithm of one.
//
// With log p and log q from the rows' maxima and log-sums, and a_j = dKL/dp_j:
//   KL                = sum_j p_j (log(p_j + eps) - log q_j)
//   a_j               = log(p_j + eps) + p_j / (p_j + eps) - log q_j
//   center            = sum_j p_j a_j
//   dKL/dstudent_j    = (q_j - p_j) / student_temperature
//   dKL/dteacher_j    = p_j (a_j - center) / temperature
//   dKL/dtemperature  = -sum_j p_j (a_j - center) u_j / temperature, u_j = teacher_j /
//                       temperature up to a constant of the row, which cancels
// For eps = 0 the term p / (p + eps) is a constant that cancels, so it is left out and
// center = KL. A class with p_j = 0 adds nothing, whatever q_j is.
#pragma once

#include "common.h"

BMTARD_NAMESPACE_BEGIN

// (z - max) / temperature overflows if two logits are further apart than the largest number. So
// does the sum for KL, although KL may be smaller. The kernels then compute KL again, from the
// logits times kFarScale.
constexpr double kFarScale = 0x1p-64;

// kFarScale (z - max) / temperature.
template <typename real>
BMTARD_HD real scaled_below(real z, real max, real inverse_temperature) {
  return (z * real(kFarScale) - max * real(kFarScale)) * inverse_temperature;
}

// log(p + eps) - log q; the caller multiplies by p.
template <typename T>
BMTARD_HD T log_ratio(T p, T log_p, T log_q, T eps, bool has_eps) {
  using std::log;
  return (has_eps ? log(p + eps) : log_p) - log_q;
}

// p * value, and 0 where p is 0 even if the value is infinite.
template <typename T>
BMTARD_HD T weighted(T p, T value) {
  return select(p > T(0), p * value, p);
}

// This element's part of KL.
template <typename T>
BMTARD_HD T kl_term(T p, T log_p, T log_q, T eps, bool has_eps) {
  return weighted(p, log_ratio(p, log_p, log_q, eps, has_eps));
}

// a_j, see above.
template <typename T>
BMTARD_HD T kl_by_probability(T p, T log_p, T log_q, T eps, bool has_eps) {
  const T ratio = log_ratio(p, log_p, log_q, eps, has_eps);
  return has_eps ? ratio + p / (p + eps) : ratio;
}

// p_j (a_j - center): d KL / d (teacher_j / temperature).
template <typename T>
BMTARD_HD T kl_by_scaled_teacher(T p, T log_p, T log_q, T center, T eps, bool has_eps) {
  return weighted(p, kl_by_probability(p, log_p, log_q, eps, has_eps) - center);
}

BMTARD_NAMESPACE_END
