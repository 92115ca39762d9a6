#include "ops.h"

namespace bmtard {
namespace ops {

void scale_(Tensors buffers, const Tensor& factor) {
  STD_TORCH_CHECK(!buffers.empty() && buffers.size() <= kMaxTeachers, "expected 1 to ",
                  kMaxTeachers, " tensors");
  const Tensor& first = buffers[0];
  ScaleArgs args{};
  args.dtype = data_type(first);
  args.buffers = static_cast<int32_t>(buffers.size());
  args.size = first.numel();
  for (size_t i = 0; i < buffers.size(); ++i) {
    args.data[i] = dense(buffers[i], first, first.scalar_type(), args.size);
  }
  args.factor = dense(factor, first, accumulation_type(first), 1);
  BMTARD_LAUNCH(scale, first, args);
}

}  // namespace ops
}  // namespace bmtard
