// Tensors of torch in and out of the launchers, with the checks that memory safety needs. Contracts
// with helpful errors are in Python. Stable ABI only: one library serves every torch >= 2.10.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "../arguments.h"

#if defined(BMTARD_CUDA)
// Defined by a CUDA build of torch only; null under a CPU build.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace bmtard {
namespace ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// --- In --------------------------------------------------------------------------------------

inline DataType data_type(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return DataType::kFloat64;
    case ScalarType::Float:
      return DataType::kFloat32;
    case ScalarType::BFloat16:
      return DataType::kBFloat16;
    case ScalarType::Half:
      return DataType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "expected float64, float32, bfloat16 or float16");
  }
}

inline ScalarType accumulation_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline bool on_one_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

// A [N, C] tensor whose rows lie densely, copied where they do not.
struct Rows {
  Tensor tensor;
  Logits logits;

  explicit Rows(const Tensor& given) : tensor(given) {
    STD_TORCH_CHECK(given.dim() == 2 && given.size(1) > 0, "expected logits [N, C], C >= 1");
    if (given.stride(1) != 1 && given.size(1) != 1) tensor = torch::stable::contiguous(given);
    logits = {data_type(tensor),
              tensor.size(0),
              tensor.size(1),
              {tensor.const_data_ptr(), tensor.stride(0)}};
  }
};

// `count` values of `type`, or one value for all.
inline Values values(const Tensor& tensor, const Tensor& beside, ScalarType type, int64_t count) {
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.dim() <= 1 &&
                      (tensor.dim() == 0 || tensor.size(0) == count) &&
                      on_one_device(tensor, beside),
                  "expected one value, or ", count, " in the accumulation dtype");
  return {tensor.const_data_ptr(), tensor.dim() == 0 ? 0 : tensor.stride(0)};
}

inline Values values(const std::optional<Tensor>& tensor, const Tensor& beside, ScalarType type,
                     int64_t count) {
  return tensor ? values(*tensor, beside, type, count) : Values{};
}

// State or saved statistics: contiguous, of known type and size.
inline void* dense(const Tensor& tensor, const Tensor& beside, ScalarType type, int64_t count) {
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.numel() == count &&
                      tensor.is_contiguous() && on_one_device(tensor, beside),
                  "expected ", count, " contiguous values of the op's own type and device");
  return tensor.data_ptr();
}

// Lists of K or 1 logits of one shape, dtype and device.
struct Pairs {
  Tensors kept;  // what the pointers below point into
  std::vector<Logits> students, teachers;
  int64_t count;  // K

  Pairs(const Tensors& student, const Tensors& teacher) {
    STD_TORCH_CHECK(
        !student.empty() && !teacher.empty() && student.size() <= kMaxTeachers &&
            teacher.size() <= kMaxTeachers &&
            (student.size() == teacher.size() || student.size() == 1 || teacher.size() == 1),
        "expected 1 or K student and teacher logits, K <= ", kMaxTeachers);
    kept.reserve(student.size() + teacher.size());
    students.reserve(student.size());
    teachers.reserve(teacher.size());
    for (const Tensor& s : student) add(s, student[0], students);
    for (const Tensor& t : teacher) add(t, student[0], teachers);
    count = static_cast<int64_t>(student.size() > teacher.size() ? student.size() : teacher.size());
  }

  const Tensor& first() const { return kept[0]; }

 private:
  void add(const Tensor& tensor, const Tensor& like, std::vector<Logits>& to) {
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == like.size(0) &&
                        tensor.size(1) == like.size(1) &&
                        tensor.scalar_type() == like.scalar_type() && on_one_device(tensor, like),
                    "expected logits of one shape, dtype and device");
    const Rows rows(tensor);
    kept.push_back(rows.tensor);
    to.push_back(rows.logits);
  }
};

// --- Out -------------------------------------------------------------------------------------

// The C library fetches larger memory from the system anew for each call. In huge pages that takes
// one fault for 2 MiB instead of one for 4 KiB.
inline void ask_for_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  constexpr size_t kKept = size_t{32} << 20, kHugePage = size_t{2} << 20;
  if (bytes < kKept) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHugePage - 1);
  // Without huge pages it fails, and nothing is lost.
  (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

template <size_t dims>
Tensor empty(const std::array<int64_t, dims>& sizes, ScalarType type, const Tensor& beside) {
  std::array<int64_t, dims> strides{};
  int64_t stride = 1;
  for (size_t i = dims; i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(beside.get(), &device_type));
  int32_t dtype;
  switch (type) {
    case ScalarType::Double:
      dtype = aoti_torch_dtype_float64();
      break;
    case ScalarType::Float:
      dtype = aoti_torch_dtype_float32();
      break;
    case ScalarType::BFloat16:
      dtype = aoti_torch_dtype_bfloat16();
      break;
    case ScalarType::Half:
      dtype = aoti_torch_dtype_float16();
      break;
    case ScalarType::Int:
      dtype = aoti_torch_dtype_int32();
      break;
    default:
      dtype = aoti_torch_dtype_uint8();
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(dims), sizes.data(),
                                                  strides.data(), dtype, device_type,
                                                  beside.get_device_index(), &handle));
  Tensor made(handle);
  if (!beside.is_cuda()) {
    ask_for_huge_pages(made.data_ptr(), static_cast<size_t>(made.numel()) *
                                            static_cast<size_t>(made.element_size()));
  }
  return made;
}

// Memory for one launch. None costs nothing.
class Workspace {
 public:
  Workspace(size_t bytes, const Tensor& beside) {
    if (bytes) tensor_ = empty<1>({static_cast<int64_t>(bytes)}, ScalarType::Byte, beside);
  }
  void* data() const { return tensor_ ? tensor_->data_ptr() : nullptr; }

 private:
  std::optional<Tensor> tensor_;
};

// --- Launching -------------------------------------------------------------------------------

inline void parallel_for(int64_t begin, int64_t end, int64_t grain,
                         void (*body)(int64_t, int64_t, void*), void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
}

#if defined(BMTARD_CUDA)
template <typename Args>
void launch_cuda(const Tensor& on, const Args& args, int (*kernel)(const Args&, void*)) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
  const int32_t device = on.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const int error = kernel(args, stream);
  STD_TORCH_CHECK(error == 0, "CUDA error: ", cuda::error_string(error));
}
#define BMTARD_LAUNCH(op, on, args)             \
  if ((on).is_cuda()) {                         \
    launch_cuda(on, args, cuda::op);            \
  } else {                                      \
    cpu::kernels().op(args, ops::parallel_for); \
  }
#define BMTARD_WORKSPACE(op, on, args) \
  ops::Workspace((on).is_cuda() ? cuda::op##_workspace(args) : cpu::op##_workspace(args), on)
#else
#define BMTARD_LAUNCH(op, on, args) cpu::kernels().op(args, ops::parallel_for)
#define BMTARD_WORKSPACE(op, on, args) ops::Workspace(cpu::op##_workspace(args), on)
#endif

}  // namespace ops
}  // namespace bmtard
