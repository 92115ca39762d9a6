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

// 1 if the sum of squares is in the range where it is exact. Else a power of two: the values must
// be multiplied by it before they are squared.
template <typename real>
BMTARD_HD real norm_unit(real squared_norm) {
  constexpr bool is_double = sizeof(real) == sizeof(double);
  constexpr double lowest = is_double ? 0x1p-900 : 0x1p-80, unit = is_double ? 0x1p600 : 0x1p100;
  if (squared_norm < real(lowest)) return real(unit);
  return squared_norm > std::numeric_limits<real>::max() ? real(1 / unit) : real(1);
}

// The factor by which a gradient of this norm gets the norm step_size; 0 unless the norm is finite
// and > 0.
template <typename real>
BMTARD_HD real l2_step_scale(real squared_norm, real step_size) {
  using std::sqrt;
  const real norm = sqrt(squared_norm);
  return is_finite(norm) && norm > real(0) ? step_size / norm : real(0);
}

// The factor by which a perturbation times `unit`, of this norm, comes back into the ball of radius
// epsilon. The unit stays with the perturbation: the product of both may be below every number.
template <typename real>
BMTARD_HD real l2_projection_scale(real squared_norm, real unit, real epsilon) {
  using std::sqrt;
  const real scale = epsilon / sqrt(squared_norm);
  return scale * unit < real(1) ? scale : real(1) / unit;
}

BMTARD_NAMESPACE_END
