// Multiplies gradients by the gradient of their loss, which became known after them.
#include "rows.cuh"

namespace bmtard {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// Two tiles a thread; a block takes a chunk of kMaxClasses values of one buffer.
template <typename T>
using ChunkShape = Shape<T, kThreads, kThreads, 2 * 16 / sizeof(T)>;

template <typename Shape>
BMTARD_KERNEL(Shape::kThreads)
scale_kernel(const BMTARD_GRID_CONSTANT ScaleArgs args, bool packed, int blocks_a_buffer) {
  using T = typename Shape::Type;
  using R = Real<T>;
  const R factor = at<R>(args.factor, 0);
  if (factor == R(1)) return;
  const int buffer = simt::block_id() / blocks_a_buffer;
  const int64_t first =
      static_cast<int64_t>(simt::block_id() % blocks_a_buffer) * Shape::kMaxClasses;
  const int64_t left = args.size - first;
  const int size = left < Shape::kMaxClasses ? static_cast<int>(left) : Shape::kMaxClasses;
  const int lane = simt::thread_id();
  T* const data = static_cast<T*>(args.data[buffer]) + first;
  const Row<Shape> row(data, size, lane, packed);
  for_each_tile<Shape>(size, [&](int tile) {
    Tile<Shape> values = row.get(tile);
    BMTARD_UNROLL
    for (int i = 0; i < Shape::kWidth; ++i) values.value[i] *= factor;
    store_tile<Shape>(data, size, tile, lane, packed, values);
  });
}

}  // namespace

int scale(const ScaleArgs& args, void* stream) {
  if (args.size == 0 || args.buffers == 0) return 0;
  bool packed = true;
  for (int32_t i = 0; i < args.buffers; ++i) {
    packed = packed && packable(args.dtype, args.data[i], 0);
  }
  return with_type(args.dtype, [&](auto value) {
    using Shape = ChunkShape<decltype(value)>;
    const int64_t blocks = ceil_divide(args.size, Shape::kMaxClasses);
    if (blocks * args.buffers > INT_MAX) return +simt::kInvalidValue;
    return simt::launch(scale_kernel<Shape>, {blocks * args.buffers, Shape::kThreads}, stream, args,
                        packed, static_cast<int>(blocks));
  });
}

}  // namespace cuda
}  // namespace bmtard
