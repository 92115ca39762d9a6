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
scale_kernel(const BMTARD_GRID_CONSTANT ScaleArgs args, Packing packing, int blocks_a_buffer) {
  using T = typename Shape::Type;
  using R = Real<T>;
  const R factor = at<R>(args.factor, 0);
  if (factor == R(1)) return;
  const int buffer = simt::block_id() / blocks_a_buffer;
  T* const buffer_data = static_cast<T*>(args.data[buffer]);
  const Chunk chunk =
      chunk_of<Shape>(buffer_data, args.size, simt::block_id() % blocks_a_buffer, packing);
  T* const data = buffer_data + chunk.first;
  const Window window = window_of<Shape>(data, chunk.size, simt::thread_id(), packing);
  const Row<Shape> row(data, window);
  for_each_tile<Shape>(window, [&](int tile) {
    Tile<Shape> values = row.get(tile);
    BMTARD_UNROLL
    for (int i = 0; i < Shape::kWidth; ++i) values.value[i] *= factor;
    store_tile<Shape>(data, window, tile, values);
  });
}

}  // namespace

int scale(const ScaleArgs& args, void* stream) {
  if (args.size == 0 || args.buffers == 0) return 0;
  return with_type(args.dtype, [&](auto value) {
    using Shape = ChunkShape<decltype(value)>;
    // A buffer may begin anywhere, whatever the others do.
    const Packing packing = {true, Shape::kWidth - 1};
    const int64_t blocks = chunks_of<Shape>(args.size, packing);
    if (blocks * args.buffers > INT_MAX) return +simt::kInvalidValue;
    return simt::launch(scale_kernel<Shape>, {blocks * args.buffers, Shape::kThreads}, stream, args,
                        packing, static_cast<int>(blocks));
  });
}

}  // namespace cuda
}  // namespace bmtard
