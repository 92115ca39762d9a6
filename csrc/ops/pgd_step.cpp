#include <algorithm>
#include <utility>

#include "ops.h"

namespace bmtard {
namespace ops {
namespace {

// Whether values lie without gaps, sample after sample.
bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  const int64_t dims = tensor.dim();
  std::vector<std::pair<int64_t, int64_t>> by_stride;  // (stride, size)
  for (int64_t d = 0; d < dims; ++d) {
    if (tensor.size(d) != 1) by_stride.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(by_stride.begin(), by_stride.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : by_stride) {
    if (stride != expected) return false;
    expected *= size;
  }
  return tensor.size(0) == 1 || tensor.stride(0) == tensor.numel() / tensor.size(0);
}

bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.stride(d) != b.stride(d) && a.size(d) != 1) return false;
  }
  return true;
}

}  // namespace

void pgd_step_(Tensor x_adv, const Tensor& grad, const Tensor& x, double step_size, double epsilon,
               double low, double high, bool l2) {
  for (const Tensor& other : {grad, x}) {
    STD_TORCH_CHECK(other.dim() == x_adv.dim() && other.dim() > 0 &&
                        other.scalar_type() == x_adv.scalar_type() && on_one_device(other, x_adv),
                    "expected x_adv, grad and x of one shape, dtype and device");
    for (int64_t d = 0; d < x_adv.dim(); ++d) {
      STD_TORCH_CHECK(other.size(d) == x_adv.size(d), "expected x_adv, grad and x of one shape");
    }
  }
  if (x_adv.numel() == 0) return;
  // The kernel walks through memory, so all three must lie in it in the same order.
  Tensor target = is_dense(x_adv) ? x_adv : torch::stable::contiguous(x_adv);
  const auto in_order = [&](const Tensor& tensor) {
    if (same_strides(tensor, target)) return tensor;
    Tensor copy = torch::stable::empty_like(target);
    if (!same_strides(copy, target)) {
      STD_TORCH_CHECK(false, "x_adv has a memory layout that cannot be reproduced");
    }
    return torch::stable::copy_(copy, tensor);
  };
  const Tensor ordered_grad = in_order(grad), ordered_x = in_order(x);
  const PgdStepArgs args{data_type(target),
                         target.size(0),
                         target.numel() / target.size(0),
                         target.data_ptr(),
                         ordered_grad.const_data_ptr(),
                         ordered_x.const_data_ptr(),
                         step_size,
                         epsilon,
                         low,
                         high,
                         l2};
  BMTARD_LAUNCH(pgd_step, target, args);
  if (target.data_ptr() != x_adv.data_ptr()) torch::stable::copy_(x_adv, target);
}

}  // namespace ops
}  // namespace bmtard
