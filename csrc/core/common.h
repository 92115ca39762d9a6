// What every header of the mathematics shares.
//
// T is a value type: float or double, or on the CPU a SIMD vector of either. So the same text
// serves a CUDA thread and the lanes of a vector. `real` is always a scalar.
#pragma once

#include <cmath>
#include <limits>

#if defined(__CUDACC__)
#define BMTARD_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// Inlined, because a call would pass vectors through memory.
#define BMTARD_HD inline __attribute__((always_inline))
#else
#define BMTARD_HD inline
#endif

// The CPU kernels are compiled once per instruction set, each time in another namespace.
// Otherwise the linker would merge equal inline functions, and could keep the AVX-512 one for a
// machine without AVX-512.
#if !defined(BMTARD_TARGET)
#define BMTARD_TARGET generic
#endif
#define BMTARD_NAMESPACE_BEGIN \
  namespace bmtard {           \
  inline namespace BMTARD_TARGET {
#define BMTARD_NAMESPACE_END \
  }                          \
  }

BMTARD_NAMESPACE_BEGIN

template <typename T>
BMTARD_HD T select(bool condition, T if_true, T if_false) {
  return condition ? if_true : if_false;
}

// exp() of anything below is 0, in float and in double.
constexpr double kExpFloor = -750.0;

// Raises -inf and other logits without weight to kExpFloor, where exp(u) * u^k is exactly
// 0 instead of 0 * -inf = NaN. A NaN passes through.
template <typename T>
BMTARD_HD T floor_exponent(T u) {
  return select(u < T(kExpFloor), T(kExpFloor), u);
}

template <typename real>
BMTARD_HD bool is_finite(real x) {
  return x - x == real(0);
}

// The range of temperatures: their inverses are normal floats. If a difference of logits overflows
// a float, its exponential is 0 at every such temperature.
constexpr double kLowestTemperature = 1e-36, kHighestTemperature = 1e36;

// NaN for a temperature out of range.
template <typename real>
BMTARD_HD real inverse_temperature(real temperature) {
  const bool allowed =
      temperature >= real(kLowestTemperature) && temperature <= real(kHighestTemperature);
  return allowed ? real(1) / temperature : std::numeric_limits<real>::quiet_NaN();
}

BMTARD_NAMESPACE_END
