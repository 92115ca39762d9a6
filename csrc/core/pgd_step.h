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
  const T inside = clamped(clamped(moved, x - epsilon, x + epsilon), low, high);
  return select(x == x, inside, x);  // no value is near a NaN
}

// 1, or the power of two by which values must be scaled before they are squared: the sum of their
// squares has left the range where it is exact.
template <typename real>
BMTARD_HD real norm_unit(real squared_norm) {
  constexpr bool is_double = sizeof(real) == sizeof(double);
  constexpr double lowest = is_double ? 0x1p-900 : 0x1p-80, unit = is_double ? 0x1p600 : 0x1p100;
  if (squared_norm < real(lowest)) return real(unit);
  return squared_norm > std::numeric_limits<real>::max() ? real(1 / unit) : real(1);
}

// What scales the gradient so that its norm is step_size; no step without a finite norm > 0.
template <typename real>
BMTARD_HD real l2_step_scale(real squared_norm, real step_size) {
  using std::sqrt;
  const real norm = sqrt(squared_norm);
  return is_finite(norm) && norm > real(0) ? step_size / norm : real(0);
}

// What scales a perturbation back into the ball of radius epsilon; the norm is that of the
// perturbation times `unit`.
template <typename real>
BMTARD_HD real l2_projection_scale(real squared_norm, real unit, real epsilon) {
  using std::sqrt;
  const real scale = epsilon / sqrt(squared_norm) * unit;
  return scale < real(1) ? scale : real(1);
}

BMTARD_NAMESPACE_END
