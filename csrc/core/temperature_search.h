// The temperature at which an entropy, or a mean of entropies, has a given value.
//
// A bracketed Halley iteration on G = log(H / (log C - H)) as a function of
// x = log temperature, where G is close to linear:
//   x <- x - 2 F g1 / (2 g1^2 - F g2),  F = G - G*,  g1 = dG/dx,  g2 = d2G/dx2.
// The entropy grows with the temperature, so every evaluation tightens a bracket. Bisection in x
// replaces a step that leaves the bracket, that is not finite, or whose predecessor did not halve
// the error. If the bracket has an open end, a leap does. Prior art: Vladymyrov and
// Carreira-Perpinan, ICML 2013, entropic affinities.
#pragma once

#include "../kernels.h"
#include "common.h"
#include "softmax_entropy.h"

BMTARD_NAMESPACE_BEGIN

// What one pass over the raw logits of a row finds; for a batch, the mean over rows.
template <typename real>
struct LogitRange {
  real log_count;  // log of the number of classes that are not masked by -inf
  real variance;   // of the finite logits under the uniform distribution
};

// A first temperature, found without an evaluation. It becomes exact as the target approaches
// log C, where the entropy is log C - variance / (2 temperature^2).
template <typename real>
BMTARD_HD real initial_temperature(LogitRange<real> range, real target, real low, real high) {
  using std::sqrt;
  const real gap = range.log_count - target;
  const real guess = sqrt(range.variance / (2 * gap));
  if (!(gap > real(0))) return high;
  if (!is_finite(guess) || !(guess > real(0))) return sqrt(low) * sqrt(high);
  return guess < low ? low : (guess > high ? high : guess);
}

// Halley's step: the factor that brings the temperature closer to the target. It may be NaN or any
// number if the entropy is 0 or log C, or if the target lies beyond. The search uses it only if the
// result lies inside its bracket.
template <typename T>
BMTARD_HD T halley_factor(EntropyDerivatives<T> at, T log_count, T target) {
  using std::exp;
  using std::log;
  const T one = T(1), two = T(2);
  const T room = log_count - at.entropy;
  const T q = one / at.entropy + one / room;
  const T g1 = at.variance * q;
  const T g2 = at.variance * at.variance * (one / (room * room) - one / (at.entropy * at.entropy)) -
               (two * at.variance + at.third_moment) * q;
  const T f = log(at.entropy / room) - log(target / (log_count - target));
  const T step = two * f * g1 / (f * g2 - two * g1 * g1);
  return exp(select(step > T(5), T(5), step));
}

template <typename real>
struct TemperatureSearch {
  // Settings.
  real target, tolerance, log_count;
  real low, high;  // bounds
  int32_t max_iterations;
  SearchMethod method;
  // State.
  real temperature;  // to evaluate next; once done, the result
  real kept;         // the result if the entropy does not depend on the temperature
  real bracket_low, bracket_high;
  bool low_known, high_known;  // the bracket's end has been evaluated
  bool flat;                   // the entropy may not depend on the temperature
  real previous_error;
  EntropyDerivatives<real> at;  // at `temperature`, once done
  int32_t iterations;
  int32_t status;
  bool done;

  // `first` is evaluated first; `keep` is the result if no temperature is better than another.
  BMTARD_HD void start(real first, real keep) {
    bracket_low = low;
    bracket_high = high;
    low_known = high_known = flat = false;
    previous_error = std::numeric_limits<real>::infinity();
    iterations = 0;
    status = kMaxIterations;
    done = false;
    kept = clipped(keep);
    temperature = clipped(first);
    // Bisection proves its bracket first.
    if (method == SearchMethod::kBisection || target <= real(0)) temperature = low;
    // The rounding error of an entropy: 4 ulp of log C.
    const real floor = 4 * std::numeric_limits<real>::epsilon() * log_count;
    if (!(tolerance >= floor)) tolerance = floor;
  }

  // The same if the entropy at the lower bound is known. If the target lies there, the search
  // needs no other evaluation.
  BMTARD_HD void start(EntropyDerivatives<real> at_low, real first, real keep) {
    start(first, keep);
    if (!(at_low.entropy >= target - tolerance)) return;
    temperature = low;
    update(at_low);
  }

  // NaN becomes the lower bound.
  BMTARD_HD real clipped(real t) const { return t > high ? high : (t >= low ? t : low); }

  BMTARD_HD void finish(int32_t with) {
    status = with;
    done = true;
  }

  BMTARD_HD real midpoint() const {
    using std::sqrt;
    return sqrt(bracket_low) * sqrt(bracket_high);
  }

  // Takes the entropy at `temperature`; chooses the next temperature, or finishes.
  BMTARD_HD void update(EntropyDerivatives<real> found) {
    judge(found);
    if (done) return;
    move(method == SearchMethod::kBisection ? real(1) : halley_factor(found, log_count, target));
  }

  // The first half of update(): finishes, or tightens the bracket.
  BMTARD_HD void judge(EntropyDerivatives<real> found) {
    ++iterations;
    at = found;
    const real error = found.entropy - target;
    const real distance = error < real(0) ? -error : error;
    if (!is_finite(error)) {
      temperature = kept;
      return finish(kNonFinite);
    }
    if (distance <= tolerance) return finish(kConverged);
    // Without variance at the highest entropy, all logits are equal, or the temperature is so high
    // that the variance underflows. The entropy at the lower bound decides. (Without variance at a
    // low entropy, the temperature is far too low.)
    flat = !low_known && !(found.variance > real(0)) && found.entropy >= log_count - tolerance;
    if (flat) {
      if (temperature <= low) {
        temperature = kept;
        return finish(kDegenerate);
      }
      if (iterations >= max_iterations) finish(kMaxIterations);
      return;
    }
    if (error < real(0)) {
      if (temperature >= high) return finish(kClampedHigh);
      bracket_low = temperature;
      low_known = true;
    } else {
      if (temperature <= low) return finish(kClampedLow);
      bracket_high = temperature;
      high_known = true;
    }
    // The bracket's ends are neighbouring numbers.
    if (low_known && high_known &&
        bracket_high - bracket_low <= 2 * std::numeric_limits<real>::epsilon() * bracket_high) {
      return finish(kConverged);
    }
    if (iterations >= max_iterations) finish(kMaxIterations);
  }

  // The second half: chooses the next temperature, `factor` times this one if that is useful.
  BMTARD_HD void move(real factor) {
    if (flat) {
      temperature = low;
      return;
    }
    if (method == SearchMethod::kBisection) {
      temperature = high_known ? midpoint() : high;
      return;
    }
    const real error = at.entropy - target;
    const real distance = error < real(0) ? -error : error;
    const bool usable =
        factor <= real(64) && factor >= real(1) / 64 && distance <= real(0.5) * previous_error;
    real next = usable ? temperature * factor : std::numeric_limits<real>::quiet_NaN();
    if (target >= log_count) next = high;  // beyond every temperature
    previous_error = distance;
    if (!(next > bracket_low && next < bracket_high)) {
      const real leap = 16;
      if (error < real(0) && !high_known) {
        next = next >= high || temperature * leap >= high ? high : temperature * leap;
      } else if (error > real(0) && !low_known) {
        next = next <= low || temperature <= low * leap ? low : temperature / leap;
      } else {
        next = midpoint();
      }
    }
    temperature = next;
  }
};

BMTARD_NAMESPACE_END
