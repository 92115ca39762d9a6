// KL of one row of a teacher and a student, for multi_teacher_kl and for the balanced loss.
#pragma once

#include "../core/multi_teacher_kl.h"
#include "rows.cuh"

namespace bmtard {
namespace cuda {

// S_0 alone, see core/softmax_entropy.h.
template <typename R>
struct PartitionSum {
  R s0;
};

template <typename R>
BMTARD_DEVICE void accumulate(PartitionSum<R>& sum, R u) {
  using std::exp;
  sum.s0 += exp(floor_exponent(u));
}

template <typename R>
BMTARD_DEVICE PartitionSum<R> shifted(PartitionSum<R> sum, R d) {
  using std::exp;
  return {exp(floor_exponent(d)) * sum.s0};
}

template <typename Shape, typename R>
BMTARD_DEVICE void sum_over(Group<Shape>& group, PartitionSum<R>& sum) {
  R values[1] = {sum.s0};
  group.sum(values);
  sum.s0 = values[0];
}

// log softmax(z / temperature) = (z - max) * inverse_temperature - log_sum.
template <typename R>
struct LogSoftmax {
  R inverse_temperature, max, log_sum;

  BMTARD_DEVICE R scaled(R z) const { return (z - max) * inverse_temperature; }
  BMTARD_DEVICE R operator()(R z) const { return scaled(z) - log_sum; }
};

template <typename Shape, typename RowType, typename R>
BMTARD_DEVICE LogSoftmax<R> log_softmax(const RowType& row, const Window& window,
                                        R inverse_temperature, Group<Shape>& group) {
  using std::log;
  R max;
  const auto sum =
      softmax_sums<PartitionSum<R>, Shape, kFarAhead>(row, window, inverse_temperature, group, max);
  return {inverse_temperature, max, log(sum.s0)};
}

template <typename R>
struct KLRow {
  LogSoftmax<R> q, p;  // of the student, of the teacher
  R kl, center;
  R entropy;  // -sum p log(p + entropy_eps)
};

// In two passes over each row: the log-softmaxes, then the sums.
template <typename Shape, typename RowType, typename R>
BMTARD_DEVICE KLRow<R> kl_by_softmax(const RowType& student, const RowType& teacher,
                                     const Window& window, R student_inverse, R inverse, R eps,
                                     R entropy_eps, Group<Shape>& group) {
  using std::exp;
  using std::log;
  const auto q = log_softmax<Shape>(student, window, student_inverse, group);
  const auto p = log_softmax<Shape>(teacher, window, inverse, group);
  const bool has_eps = eps > R(0);
  R sums[3] = {0, 0, 0};
  for_each_values<Shape>(window, {&student, &teacher}, [&](int, const auto& tiles) {
    const auto& [s, t] = tiles;
    BMTARD_UNROLL
    for (int i = 0; i < Shape::kWidth; ++i) {
      const R log_q = q(s.value[i]), log_p = p(t.value[i]);
      const R probability = exp(log_p);
      sums[0] += kl_term(probability, log_p, log_q, eps, has_eps);
      if (has_eps) {
        sums[1] +=
            weighted(probability, kl_by_probability(probability, log_p, log_q, eps, has_eps));
      }
      sums[2] -= weighted(probability, entropy_eps > R(0) ? log(probability + entropy_eps) : log_p);
    }
  });
  group.sum(sums);
  return {q, p, sums[0], has_eps ? sums[1] : sums[0], sums[2]};
}

// The same in one pass over each row, for eps = 0. KL then needs no log-softmax:
//   KL = D / S - log S + log S_student,  D = sum e (u - u_student),  e = exp(u),  S = sum e,
// u as in core/softmax_entropy.h. Each thread keeps its sums relative to the largest values so
// far.
template <typename R>
struct OnlineKL {
  R student_max, max;
  R student_sum = 0, difference = 0;
  EntropySums<R> teacher = {0, 0};

  BMTARD_DEVICE void shift(R new_student_max, R new_max, R student_inverse, R inverse) {
    using std::exp;
    // Both may still be -inf, and -inf - -inf is NaN.
    const R by_student =
        student_max == new_student_max ? R(0) : (student_max - new_student_max) * student_inverse;
    const R by = max == new_max ? R(0) : floor_exponent((max - new_max) * inverse);
    const R scale = exp(by), weight = scale * teacher.s0;
    // A difference without weight adds nothing, even if it is infinite.
    difference = weight == R(0) ? R(0) : scale * difference + (by - by_student) * weight;
    teacher = shifted(teacher, by);
    student_sum *= exp(floor_exponent(by_student));
    student_max = new_student_max;
    max = new_max;
  }

  BMTARD_DEVICE void add(R u_student, R u) {
    using std::exp;
    u = floor_exponent(u);
    const R e = exp(u);
    teacher.s0 += e;
    teacher.s1 += e * u;
    difference += weighted(e, u - u_student);
    student_sum += exp(floor_exponent(u_student));
  }
};

template <typename Shape, typename RowType, typename R>
BMTARD_DEVICE KLRow<R> online_kl(const RowType& student, const RowType& teacher,
                                 const Window& window, R student_inverse, R inverse,
                                 Group<Shape>& group) {
  using std::log;
  constexpr R kNothing = -std::numeric_limits<R>::infinity();
  OnlineKL<R> sums{kNothing, kNothing};
  for_each_values<Shape>(window, {&student, &teacher}, [&](int, const auto& tiles) {
    const auto& [s, t] = tiles;
    R student_top = sums.student_max, top = sums.max;
    BMTARD_UNROLL
    for (int i = 0; i < Shape::kWidth; ++i) {
      student_top = Max{}(student_top, s.value[i]);
      top = Max{}(top, t.value[i]);
    }
    if (student_top > sums.student_max || top > sums.max) {
      sums.shift(student_top, top, student_inverse, inverse);
    }
    // As long as all values are masked, -inf - 0 keeps them masked.
    const R student_base = student_top == kNothing ? R(0) : student_top;
    const R base = top == kNothing ? R(0) : top;
    BMTARD_UNROLL
    for (int i = 0; i < Shape::kWidth; ++i) {
      sums.add((s.value[i] - student_base) * student_inverse, (t.value[i] - base) * inverse);
    }
  });
  R maxima[2] = {sums.student_max, sums.max};
  group.reduce(maxima, Max{});
  sums.shift(maxima[0], maxima[1], student_inverse, inverse);
  R totals[4] = {sums.student_sum, sums.teacher.s0, sums.teacher.s1, sums.difference};
  group.sum(totals);
  const LogSoftmax<R> q{student_inverse, maxima[0], log(totals[0])};
  const LogSoftmax<R> p{inverse, maxima[1], log(totals[1])};
  const R kl = totals[3] / totals[1] - p.log_sum + q.log_sum;
  return {q, p, kl, kl, p.log_sum - totals[2] / totals[1]};
}

// KL and center of a row whose sum for KL overflowed.
template <typename Shape, typename RowType, typename R>
BMTARD_DEVICE void find_far_kl(const RowType& student, const RowType& teacher, const Window& window,
                               R eps, Group<Shape>& group, KLRow<R>& found) {
  using std::exp;
  using std::log;
  // One sum at a time, because all three at once would not fit into the registers of the head.
  const auto sum = [&](auto term) {
    R sums[1] = {0};
    for_each_tile<Shape>(window, [&](int tile) {
      const Tile<Shape> s = student.get(tile), t = teacher.get(tile);
      BMTARD_UNROLL
      for (int i = 0; i < Shape::kWidth; ++i) {
        const R log_p = found.p(t.value[i]);
        const R p = exp(log_p);
        if (p > R(0)) sums[0] += p * term(s.value[i], log_p, p);
      }
    });
    group.sum(sums);
    return sums[0];
  };
  const R far =
      sum([&](R z, R, R) { return scaled_below(z, found.q.max, found.q.inverse_temperature); });
  const R near = sum([&](R, R log_p, R p) { return eps > R(0) ? log(p + eps) : log_p; });
  found.kl = near + found.q.log_sum - far / R(kFarScale);
  const R share = sum([&](R, R, R p) { return p / (p + eps); });
  found.center = eps > R(0) ? found.kl + share : found.kl;
}

// A row that is not in registers is read as rarely as possible.
template <typename Shape, typename RowType, typename R>
BMTARD_DEVICE KLRow<R> kl_row(const RowType& student, const RowType& teacher, const Window& window,
                              R student_inverse, R inverse, R eps, R entropy_eps,
                              Group<Shape>& group) {
  const bool online = Shape::kTiles == 0 && !(eps > R(0));
  KLRow<R> found;
  if constexpr (Shape::kTiles == 0) {
    if (online) {
      found = online_kl<Shape>(student, teacher, window, student_inverse, inverse, group);
    }
  }
  if (!online) {
    found = kl_by_softmax<Shape>(student, teacher, window, student_inverse, inverse, eps,
                                 entropy_eps, group);
  }
  if (found.kl > std::numeric_limits<R>::max()) {
    find_far_kl<Shape>(student, teacher, window, eps, group, found);
  }
  return found;
}

}  // namespace cuda
}  // namespace bmtard
