#include "../core/softmax_entropy.h"

#include "rows.h"

BMTARD_NAMESPACE_BEGIN

namespace {

template <typename real, typename Args>
real temperature_of(const Args& args, int64_t row) {
  return args.temperature
             ? static_cast<const real*>(args.temperature)[row * args.temperature_stride]
             : static_cast<real>(args.temperature_value);
}

template <typename scalar>
void forward_rows(const SoftmaxEntropyArgs& args, int64_t begin, int64_t end) {
  using real = acc_t<scalar>;
  real* entropy = static_cast<real*>(args.entropy);
  real* statistics = static_cast<real*>(args.statistics);
  for (int64_t r = begin; r < end; ++r) {
    const scalar* row = row_of<scalar>(args.logits, r);
    const real scale = inverse_temperature(temperature_of<real>(args, r));
    const real max = row_max(row, args.classes);
    const auto sums = row_sums<EntropySums>(row, args.classes, max, scale);
    entropy[r] = static_cast<real>(entropy_of(sums));
    if (statistics) {
      statistics[r] = max;
      statistics[args.rows + r] = static_cast<real>(::log(sums.s0));
    }
  }
}

template <typename scalar>
void forward_columns(const SoftmaxEntropyArgs& args, int64_t begin, int64_t end) {
  using real = acc_t<scalar>;
  using V = Vec<real>;
  real* entropy = static_cast<real*>(args.entropy);
  real* statistics = static_cast<real*>(args.statistics);
  real columns[kMaxColumns * V::size];
  for_groups<real>(begin, end, [&](int64_t r, int n) {
    load_columns<scalar>(args.logits, r, n, args.classes, columns);
    V scale = real(1);
    for (int i = 0; i < n; ++i) scale.v[i] = inverse_temperature(temperature_of<real>(args, r + i));
    const V max = column_max(columns, args.classes);
    const auto sums = column_sums<EntropySums>(columns, args.classes, max, scale);
    store_lanes(entropy + r, n, entropy_of(sums));
    if (statistics) {
      store_lanes(statistics + r, n, max);
      store_lanes(statistics + args.rows + r, n, log(sums.s0));
    }
  });
}

template <typename scalar>
void backward_rows(const SoftmaxEntropyBackwardArgs& args, int64_t begin, int64_t end) {
  using real = acc_t<scalar>;
  using V = Vec<real>;
  const real* statistics = static_cast<const real*>(args.statistics);
  for (int64_t r = begin; r < end; ++r) {
    const scalar* row = row_of<scalar>(args.logits, r);
    const real scale = inverse_temperature(temperature_of<real>(args, r));
    const real grad = static_cast<const real*>(args.grad_entropy)[r * args.grad_entropy_stride];
    const V entropy = static_cast<const real*>(args.entropy)[r];
    const V max = statistics[r], log_sum = statistics[args.rows + r];
    const auto log_p = [&](V z) { return (z - max) * V(scale) - log_sum; };
    if (args.grad_logits) {
      scalar* out = static_cast<scalar*>(args.grad_logits) + r * args.classes;
      for_row(row, args.classes, kNegativeInfinity<real>, [&](V z, int64_t j) {
        store_at(out, j, args.classes, V(grad) * entropy_gradient(log_p(z), entropy, V(scale)));
      });
    }
    if (args.grad_temperature) {
      V variance = real(0);
      for_row(row, args.classes, kNegativeInfinity<real>,
              [&](V z, int64_t) { variance = variance + variance_term(log_p(z), entropy); });
      static_cast<real*>(args.grad_temperature)[r] = grad * scale * reduce_add(variance);
    }
  }
}

}  // namespace

void softmax_entropy(const SoftmaxEntropyArgs& args, ParallelFor parallel_for) {
  with_type(args.dtype, [&](auto type) {
    using scalar = typename decltype(type)::type;
    for_rows(parallel_for, args.rows, args.classes, [&](int64_t begin, int64_t end) {
      args.classes <= kMaxColumns ? forward_columns<scalar>(args, begin, end)
                                  : forward_rows<scalar>(args, begin, end);
    });
  });
}

void softmax_entropy_backward(const SoftmaxEntropyBackwardArgs& args, ParallelFor parallel_for) {
  with_type(args.dtype, [&](auto type) {
    using scalar = typename decltype(type)::type;
    for_rows(parallel_for, args.rows, args.classes,
             [&](int64_t begin, int64_t end) { backward_rows<scalar>(args, begin, end); });
  });
}

BMTARD_NAMESPACE_END
