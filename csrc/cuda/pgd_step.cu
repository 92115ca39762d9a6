// A step of projected gradient ascent on x_adv, in place.
#include "../core/pgd_step.h"
#include "rows.cuh"

namespace bmtard {
namespace cuda {
namespace {

constexpr int kLinfThreads = 256;
constexpr int kL2Threads = 512;

// Two tiles a thread; a block takes a chunk of kMaxClasses values of the whole batch.
template <typename T>
using LinfShape = Shape<T, kLinfThreads, kLinfThreads, 2 * 16 / sizeof(T)>;

template <typename Shape>
BMTARD_KERNEL(Shape::kThreads)
pgd_linf_kernel(const BMTARD_GRID_CONSTANT PgdStepArgs args, Packing packing) {
  using T = typename Shape::Type;
  using R = Real<T>;
  const Chunk chunk =
      chunk_of<Shape>(args.x_adv, args.samples * args.sample_size, simt::block_id(), packing);
  T* const out = static_cast<T*>(args.x_adv) + chunk.first;
  const Window window = window_of<Shape>(out, chunk.size, simt::thread_id(), packing);
  const T* const grad = static_cast<const T*>(args.grad) + chunk.first;
  const T* const x = static_cast<const T*>(args.x) + chunk.first;
  const R step_size = static_cast<R>(args.step_size), epsilon = static_cast<R>(args.epsilon);
  const R low = static_cast<R>(args.low), high = static_cast<R>(args.high);
  const Row<Shape> x_adv(out, window), grads(grad, window), origins(x, window);
  for_each_values<Shape>(window, {&x_adv, &grads, &origins}, [&](int tile, const auto& tiles) {
    const auto& [values, gradient, origin] = tiles;
    Tile<Shape> moved;
    BMTARD_UNROLL
    for (int i = 0; i < Shape::kWidth; ++i) {
      moved.value[i] = pgd_linf(values.value[i], gradient.value[i], origin.value[i], step_size,
                                epsilon, low, high);
    }
    store_tile<Shape>(out, window, tile, moved);
  });
}

// One block a sample, or a cluster. The three tensors are read once if they fit into shared
// memory, else twice: the norm of the moved perturbation follows from that of the perturbation,
// that of the gradient and their product.
template <typename Shape>
BMTARD_KERNEL(Shape::kThreads)
pgd_l2_kernel(const BMTARD_GRID_CONSTANT PgdStepArgs args, Packing packing, bool cached) {
  using T = typename Shape::Type;
  using R = Real<T>;
  Block<Shape::kThreads> block;
  Group<Shape> group(block);
  const int64_t first = group.block_id() * args.sample_size;
  T* out = static_cast<T*>(args.x_adv) + first;
  const Window window =
      window_of<Shape>(out, static_cast<int>(args.sample_size), group.lane, packing);
  const auto row = [&](const void* data, int place) {
    return CachedRow<Shape>(static_cast<const T*>(data) + first, window, group.lane,
                            place * cached_values<Shape>(window.span),
                            cached ? Cache::kFill : Cache::kNone);
  };
  const auto x_adv = row(args.x_adv, 0), grad = row(args.grad, 1), x = row(args.x, 2);

  R sums[3] = {0, 0, 0};  // squares of the gradient and of the perturbation, their product
  for_each_tile<Shape>(window, [&](int tile) {
    const Tile<Shape> values = x_adv.get(tile), gradient = grad.get(tile), origin = x.get(tile);
    BMTARD_UNROLL
    for (int i = 0; i < Shape::kWidth; ++i) {
      if (!in_row(window, class_of<Shape>(window, tile, i))) continue;
      const R perturbation = values.value[i] - origin.value[i];
      sums[0] += gradient.value[i] * gradient.value[i];
      sums[1] += perturbation * perturbation;
      sums[2] += perturbation * gradient.value[i];
    }
  });
  group.sum(sums);

  // The same over values that are too small or too large to be squared as they are: rare.
  const auto squared_norm = [&](auto value_of) {
    R sum[1] = {0};
    for_each_tile<Shape>(window, [&](int tile) {
      const Tile<Shape> values = x_adv.get(tile), gradient = grad.get(tile), origin = x.get(tile);
      BMTARD_UNROLL
      for (int i = 0; i < Shape::kWidth; ++i) {
        if (!in_row(window, class_of<Shape>(window, tile, i))) continue;
        const R value = value_of(values.value[i], gradient.value[i], origin.value[i]);
        sum[0] += value * value;
      }
    });
    group.sum(sum);
    return sum[0];
  };
  const R unit = norm_unit(sums[0]);
  if (unit != R(1)) sums[0] = squared_norm([&](R, R gradient, R) { return unit * gradient; });
  const R step = l2_step_scale(sums[0], static_cast<R>(args.step_size));
  // Without a step the gradient may be anything; 0 * NaN shall not reach the image.
  const bool moves = step > R(0);
  const auto moved = [&](R x_adv, R gradient, R x) {
    return (moves ? x_adv + step * (unit * gradient) : x_adv) - x;
  };
  R squared = moves ? sums[1] + step * (2 * sums[2] + step * sums[0]) : sums[1];
  if (moves && (unit != R(1) || !is_finite(squared))) squared = squared_norm(moved);
  const R distance_unit = norm_unit(squared);
  if (distance_unit != R(1)) {
    squared = squared_norm(
        [&](R x_adv, R gradient, R x) { return distance_unit * moved(x_adv, gradient, x); });
  }
  const R projection = l2_projection_scale(squared, distance_unit, static_cast<R>(args.epsilon));

  const R low = static_cast<R>(args.low), high = static_cast<R>(args.high);
  for_each_tile<Shape>(window, [&](int tile) {
    Tile<Shape> values = x_adv.get(tile);
    const Tile<Shape> gradient = grad.get(tile), origin = x.get(tile);
    BMTARD_UNROLL
    for (int i = 0; i < Shape::kWidth; ++i) {
      const R by = distance_unit * moved(values.value[i], gradient.value[i], origin.value[i]);
      values.value[i] = clamped(origin.value[i] + projection * by, low, high);
    }
    store_tile<Shape>(out, window, tile, values);
  });
  group.leave();
}

}  // namespace

int pgd_step(const PgdStepArgs& args, void* stream) {
  if (args.samples == 0 || args.sample_size == 0) return 0;
  const int64_t stride = args.l2 ? args.sample_size : 0;
  Alignment alignment(args.dtype);
  alignment.add(args.x_adv, stride);
  alignment.add(args.grad, stride);
  alignment.add(args.x, stride);
  return with_type(args.dtype, [&](auto value) {
    using T = decltype(value);
    if (args.l2) {
      using Shape = LargeShape<T, kL2Threads, true>;
      if (args.sample_size > INT_MAX / 2) return +simt::kInvalidValue;
      const Packing packing = alignment.packing<Shape>(args.sample_size);
      const int64_t span = args.sample_size + packing.slack;
      return launch_rows<Shape>(args.samples, span, 3, [&](const simt::Grid& grid, bool cached) {
        return simt::launch(pgd_l2_kernel<Shape>, grid, stream, args, packing, cached);
      });
    }
    using Shape = LinfShape<T>;
    const Packing packing = alignment.packing<Shape>(0);
    const int64_t blocks = chunks_of<Shape>(args.samples * args.sample_size, packing);
    return simt::launch(pgd_linf_kernel<Shape>, {blocks, Shape::kThreads}, stream, args, packing);
  });
}

}  // namespace cuda
}  // namespace bmtard
