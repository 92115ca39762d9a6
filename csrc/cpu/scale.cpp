#include "rows.h"

BMTARD_NAMESPACE_BEGIN

void scale(const ScaleArgs& args, ParallelFor parallel_for) {
  with_type(args.dtype, [&](auto type) {
    using scalar = typename decltype(type)::type;
    using real = acc_t<scalar>;
    using V = Vec<real>;
    const real factor = *static_cast<const real*>(args.factor);
    if (factor == real(1)) return;
    constexpr int64_t chunk = 1024;  // whole cache lines
    const int64_t chunks = (args.size + chunk - 1) / chunk;
    for_rows(parallel_for, args.buffers * chunks, chunk, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        scalar* data = static_cast<scalar*>(args.data[i / chunks]);
        const int64_t first = i % chunks * chunk;
        const int64_t stop = first + chunk < args.size ? first + chunk : args.size;
        for (int64_t j = first; j < stop; j += V::size) {
          store_at(data, j, stop, load_at(data, j, stop, real(0)) * V(factor));
        }
      }
    });
  });
}

BMTARD_NAMESPACE_END
