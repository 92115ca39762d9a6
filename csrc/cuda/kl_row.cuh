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
BMTARD_DEVICE LogSoftmax<R> log_softmax(const RowType& row, int classes, R inverse_temperature,
                                        Group<Shape>& group) {
  using std::log;
  R max;
  const auto sum =
      softmax_sums<PartitionSum<R>, Shape>(row, classes, inverse_temperature, group, max);
  return {inverse_temperature, max, log(sum.s0)};
}

template <typename R>
struct KLSums {
  R kl, center;
  R entropy;  // -sum p log(p + entropy_eps)
};

template <typename Shape, typename RowType, typename R>
BMTARD_DEVICE KLSums<R> kl_sums(const RowType& student, const RowType& teacher, int classes,
                                const LogSoftmax<R>& student_softmax,
                                const LogSoftmax<R>& teacher_softmax, R eps, R entropy_eps,
                                Group<Shape>& group) {
  using std::exp;
  using std::log;
  const bool has_eps = eps > R(0);
  R sums[3] = {0, 0, 0};
  for_each_tile<Shape>(classes, [&](int tile) {
    const Tile<Shape> s = student.get(tile), t = teacher.get(tile);
    BMTARD_UNROLL
    for (int i = 0; i < Shape::kWidth; ++i) {
      const R log_q = student_softmax(s.value[i]), log_p = teacher_softmax(t.value[i]);
      const R p = exp(log_p);
      sums[0] += kl_term(p, log_p, log_q, eps, has_eps);
      if (has_eps) sums[1] += weighted(p, kl_by_probability(p, log_p, log_q, eps, has_eps));
      sums[2] -= weighted(p, entropy_eps > R(0) ? log(p + entropy_eps) : log_p);
    }
  });
  group.sum(sums);
  return {sums[0], has_eps ? sums[1] : sums[0], sums[2]};
}

}  // namespace cuda
}  // namespace bmtard
