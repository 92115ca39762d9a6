// Entropy of softmax(logits / temperature) by row, and its gradient.
#include "../core/softmax_entropy.h"
#include "rows.cuh"

namespace bmtard {
namespace cuda {
namespace {

constexpr int kThreads = 256;

template <typename R, typename Args>
BMTARD_DEVICE R temperature_of(const Args& args, int64_t row) {
  return args.temperature ? at<R>(args.temperature, row * args.temperature_stride)
                          : static_cast<R>(args.temperature_value);
}

// One group a row; the row is read once.
template <typename Shape>
BMTARD_KERNEL(Shape::kThreads)
softmax_entropy_kernel(const BMTARD_GRID_CONSTANT SoftmaxEntropyArgs args, Packing packing) {
  using T = typename Shape::Type;
  using R = Real<T>;
  using std::log;
  Block<Shape::kThreads> block;
  Group<Shape> group(block);
  const int64_t row = group.number(group.block_id());
  if (row >= args.rows) return;
  const T* const data = row_of<T>(args.logits, row);
  const Window window = window_of<Shape>(data, static_cast<int>(args.classes), group.lane, packing);
  const R inverse = inverse_temperature(temperature_of<R>(args, row));
  const Row<Shape> logits(data, window);
  R max;
  const auto sums = softmax_sums<EntropySums<R>, Shape>(logits, window, inverse, group, max);
  if (group.leads()) {
    put<R>(args.entropy, row, entropy_of(sums));
    if (args.statistics) {
      put<R>(args.statistics, row, max);
      put<R>(args.statistics, args.rows + row, log(sums.s0));
    }
  }
  group.leave();
}

// One group a row; one read and one write.
template <typename Shape>
BMTARD_KERNEL(Shape::kThreads)
softmax_entropy_backward_kernel(const BMTARD_GRID_CONSTANT SoftmaxEntropyBackwardArgs args,
                                Packing packing) {
  using T = typename Shape::Type;
  using R = Real<T>;
  Block<Shape::kThreads> block;
  Group<Shape> group(block);
  const int64_t row = group.number(group.block_id());
  if (row >= args.rows) return;
  const T* const data = row_of<T>(args.logits, row);
  const Window window = window_of<Shape>(data, static_cast<int>(args.classes), group.lane, packing);
  const R inverse = inverse_temperature(temperature_of<R>(args, row));
  const R entropy = at<R>(args.entropy, row);
  const R max = at<R>(args.statistics, row);
  const R log_sum = at<R>(args.statistics, args.rows + row);
  const R grad = at<R>(args.grad_entropy, row * args.grad_entropy_stride);
  const Row<Shape> logits(data, window);
  T* grad_logits =
      args.grad_logits ? static_cast<T*>(args.grad_logits) + row * args.classes : nullptr;
  R variance[1] = {0};
  for_each_values<Shape>(window, {&logits}, [&](int tile, const auto& tiles) {
    const auto& [values] = tiles;
    Tile<Shape> gradient;
    BMTARD_UNROLL
    for (int i = 0; i < Shape::kWidth; ++i) {
      const R log_p = (values.value[i] - max) * inverse - log_sum;
      gradient.value[i] = grad * entropy_gradient(log_p, entropy, inverse);
      variance[0] += variance_term(log_p, entropy);
    }
    if (grad_logits) store_tile<Shape>(grad_logits, window, tile, gradient);
  });
  if (args.grad_temperature) {
    group.sum(variance);
    if (group.leads()) put<R>(args.grad_temperature, row, grad * variance[0] * inverse);
    group.leave();
  }
}

}  // namespace

int softmax_entropy(const SoftmaxEntropyArgs& args, void* stream) {
  if (args.rows == 0) return 0;
  Alignment alignment(args.dtype);
  alignment.add(args.logits);
  return with_shape<kThreads>(args.dtype, args.classes, [&](auto shape) {
    using Shape = decltype(shape);
    const int64_t blocks = ceil_divide(args.rows, Shape::kRows);
    const Packing packing = alignment.packing<Shape>(args.classes);
    const int64_t span = args.classes + packing.slack;
    return launch_rows<Shape>(blocks, span, 0, [&](const simt::Grid& grid, bool) {
      return simt::launch(softmax_entropy_kernel<Shape>, grid, stream, args, packing);
    });
  });
}

int softmax_entropy_backward(const SoftmaxEntropyBackwardArgs& args, void* stream) {
  if (args.rows == 0 || (!args.grad_logits && !args.grad_temperature)) return 0;
  Alignment alignment(args.dtype);
  alignment.add(args.logits);
  alignment.add(args.grad_logits, args.classes);
  return with_shape<kThreads>(args.dtype, args.classes, [&](auto shape) {
    using Shape = decltype(shape);
    const int64_t blocks = ceil_divide(args.rows, Shape::kRows);
    const Packing packing = alignment.packing<Shape>(args.classes);
    const int64_t span = args.classes + packing.slack;
    return launch_rows<Shape>(blocks, span, 0, [&](const simt::Grid& grid, bool) {
      return simt::launch(softmax_entropy_backward_kernel<Shape>, grid, stream, args, packing);
    });
  });
}

}  // namespace cuda
}  // namespace bmtard
