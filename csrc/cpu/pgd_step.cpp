#include "../core/pgd_step.h"

#include "rows.h"

BMTARD_NAMESPACE_BEGIN

namespace {

template <typename scalar>
struct Images {
  using real = acc_t<scalar>;
  using V = Vec<real>;

  explicit Images(const PgdStepArgs& args)
      : x_adv(static_cast<scalar*>(args.x_adv)),
        grad(static_cast<const scalar*>(args.grad)),
        x(static_cast<const scalar*>(args.x)) {}

  // x_adv[begin, end) <- f(x_adv, grad, x).
  template <typename F>
  void update(int64_t begin, int64_t end, F f) const {
    for (int64_t j = begin; j < end; j += V::size) {
      const int n = end - j < V::size ? static_cast<int>(end - j) : V::size;
      if (n == V::size) {
        store(x_adv + j, f(load(x_adv + j), load(grad + j), load(x + j)));
      } else {
        store_partial(x_adv + j, n,
                      f(load_partial(x_adv + j, n, real(0)), load_partial(grad + j, n, real(0)),
                        load_partial(x + j, n, real(0))));
      }
    }
  }

  // The sum over [begin, end) of unit * f(x_adv, grad, x) squared.
  struct Norm {
    real squared, unit;
  };
  template <typename F>
  Norm norm(int64_t begin, int64_t end, F f) const {
    const real squared = squared_norm(begin, end, f);
    const real unit = norm_unit(squared);
    if (unit == real(1)) return {squared, unit};
    const auto scaled = [&](V x_adv, V grad, V x) { return V(unit) * f(x_adv, grad, x); };
    return {squared_norm(begin, end, scaled), unit};
  }

  // The sum over [begin, end) of f(x_adv, grad, x) squared.
  template <typename F>
  real squared_norm(int64_t begin, int64_t end, F f) const {
    double total = 0;
    for (int64_t start = begin; start < end; start += kBlock) {
      const int64_t stop = end - start < kBlock ? end : start + kBlock;
      V sum = real(0);
      for (int64_t j = start; j < stop; j += V::size) {
        const int n = stop - j < V::size ? static_cast<int>(stop - j) : V::size;
        const V value =
            n == V::size ? f(load(x_adv + j), load(grad + j), load(x + j))
                         : f(load_partial(x_adv + j, n, real(0)),
                             load_partial(grad + j, n, real(0)), load_partial(x + j, n, real(0)));
        sum = sum + value * value;
      }
      total += static_cast<double>(reduce_add(sum));
    }
    return static_cast<real>(total);
  }

  scalar* x_adv;
  const scalar* grad;
  const scalar* x;
};

template <typename scalar>
void linf(const PgdStepArgs& args, ParallelFor parallel_for) {
  using real = acc_t<scalar>;
  using V = Vec<real>;
  const Images<scalar> images(args);
  const V step = static_cast<real>(args.step_size), epsilon = static_cast<real>(args.epsilon);
  const V low = static_cast<real>(args.low), high = static_cast<real>(args.high);
  // In chunks of whole cache lines.
  constexpr int64_t chunk = 1024;
  const int64_t values = args.samples * args.sample_size;
  for_rows(parallel_for, (values + chunk - 1) / chunk, chunk, [&](int64_t begin, int64_t end) {
    const int64_t stop = end * chunk < values ? end * chunk : values;
    images.update(begin * chunk, stop, [&](V x_adv, V grad, V x) {
      return pgd_linf(x_adv, grad, x, step, epsilon, low, high);
    });
  });
}

template <typename scalar>
void l2(const PgdStepArgs& args, ParallelFor parallel_for) {
  using real = acc_t<scalar>;
  using V = Vec<real>;
  const Images<scalar> images(args);
  const V low = static_cast<real>(args.low), high = static_cast<real>(args.high);
  for_rows(parallel_for, args.samples, 3 * args.sample_size, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t first = n * args.sample_size, last = first + args.sample_size;
      const auto gradient = images.norm(first, last, [](V, V grad, V) { return grad; });
      const V scale = l2_step_scale(gradient.squared, static_cast<real>(args.step_size));
      const auto step_along = [&](auto direction) {
        // Without a step the gradient may hold NaN or infinity: keep it out.
        const auto moved = [&](V x_adv, V grad, V x) {
          return x_adv + select(scale > V(real(0)), scale * direction(grad), V(real(0))) - x;
        };
        const auto distance = images.norm(first, last, moved);
        const V projection =
            l2_projection_scale(distance.squared, distance.unit, static_cast<real>(args.epsilon));
        const V distance_unit = distance.unit;
        images.update(first, last, [&](V x_adv, V grad, V x) {
          const V back = projection * (distance_unit * moved(x_adv, grad, x));
          return clamped(x + back, low, high);
        });
      };
      if (gradient.unit == real(1)) {
        step_along([](V grad) { return grad; });
      } else {
        const V unit = gradient.unit;
        step_along([unit](V grad) { return unit * grad; });
      }
    }
  });
}

}  // namespace

void pgd_step(const PgdStepArgs& args, ParallelFor parallel_for) {
  with_type(args.dtype, [&](auto type) {
    using scalar = typename decltype(type)::type;
    args.l2 ? l2<scalar>(args, parallel_for) : linf<scalar>(args, parallel_for);
  });
}

BMTARD_NAMESPACE_END
