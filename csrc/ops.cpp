// Schemas, the checks that memory safety needs, and dispatch to the launchers. Contracts with
// helpful errors are in bmtard/ops. Stable ABI only: one library serves every torch >= 2.10.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <exception>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels.h"

#if defined(BMTARD_CUDA)
// Defined by a CUDA build of torch only; null under a CPU build.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace bmtard {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// --- Tensors in ------------------------------------------------------------------------------

std::optional<DataType> data_type(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return DataType::kFloat64;
    case ScalarType::Float:
      return DataType::kFloat32;
    case ScalarType::BFloat16:
      return DataType::kBFloat16;
    case ScalarType::Half:
      return DataType::kFloat16;
    default:
      return std::nullopt;
  }
}

DataType data_type(const Tensor& tensor) {
  const auto type = data_type(tensor.scalar_type());
  STD_TORCH_CHECK(type.has_value(), "expected float64, float32, bfloat16 or float16");
  return *type;
}

ScalarType accumulation_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A [N, C] tensor whose rows lie densely, copied where they do not.
struct Rows {
  Tensor tensor;
  Matrix matrix;

  explicit Rows(const Tensor& logits) : tensor(logits) {
    STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, "expected logits [N, C], C >= 1");
    if (logits.stride(1) != 1 && logits.size(1) != 1) tensor = torch::stable::contiguous(logits);
    matrix = {tensor.const_data_ptr(), tensor.stride(0)};
  }
};

void check_like(const Tensor& tensor, const Tensor& first) {
  STD_TORCH_CHECK(
      tensor.dim() == 2 && tensor.size(0) == first.size(0) && tensor.size(1) == first.size(1) &&
          tensor.scalar_type() == first.scalar_type() && tensor.is_cuda() == first.is_cuda() &&
          tensor.get_device_index() == first.get_device_index(),
      "expected logits of one shape, dtype and device");
}

// A vector of `count` values of `type`, or one value for all (stride 0).
struct Values {
  const void* data = nullptr;
  int64_t stride = 0;

  Values() = default;
  Values(const Tensor& tensor, const Tensor& beside, ScalarType type, int64_t count) {
    STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.dim() <= 1 &&
                        (tensor.dim() == 0 || tensor.size(0) == count) &&
                        tensor.is_cuda() == beside.is_cuda() &&
                        tensor.get_device_index() == beside.get_device_index(),
                    "expected one value, or ", count, " in the accumulation dtype");
    data = tensor.const_data_ptr();
    stride = tensor.dim() == 0 ? 0 : tensor.stride(0);
  }
  Values(const std::optional<Tensor>& tensor, const Tensor& beside, ScalarType type,
         int64_t count) {
    if (tensor) *this = Values(*tensor, beside, type, count);
  }
};

// A piece of state or saved statistics: dense, of known type and size.
void* dense(const Tensor& tensor, const Tensor& beside, ScalarType type, int64_t count) {
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.numel() == count &&
                      tensor.is_contiguous() && tensor.is_cuda() == beside.is_cuda() &&
                      tensor.get_device_index() == beside.get_device_index(),
                  "expected ", count, " contiguous values of the op's own type and device");
  return tensor.data_ptr();
}

// --- Tensors out -----------------------------------------------------------------------------

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
  return Tensor(handle);
}

// A tensor [N, C] for each bit that is set in `wanted`; pointers[k] is null for the others. Apart,
// as one allocation of all would pass the size up to which an allocator keeps memory for reuse.
Tensors gradients(int64_t wanted, int64_t count, const Tensor& like, void** pointers) {
  Tensors all;
  for (int64_t k = 0; k < count; ++k) {
    pointers[k] = nullptr;
    if (wanted >> k & 1) {
      all.push_back(empty<2>({like.size(0), like.size(1)}, like.scalar_type(), like));
      pointers[k] = all.back().data_ptr();
    }
  }
  return all;
}

// --- Launching -------------------------------------------------------------------------------

void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                  void* context) {
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
#define BMTARD_LAUNCH(op, on, args)        \
  if ((on).is_cuda()) {                    \
    launch_cuda(on, args, cuda::op);       \
  } else {                                 \
    cpu::kernels().op(args, parallel_for); \
  }
#define BMTARD_WORKSPACE(op, on, args) \
  ((on).is_cuda() ? cuda::op##_workspace(args) : cpu::op##_workspace(args))
#else
#define BMTARD_LAUNCH(op, on, args) cpu::kernels().op(args, parallel_for)
#define BMTARD_WORKSPACE(op, on, args) cpu::op##_workspace(args)
#endif

// --- Ops -------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> softmax_entropy(const Tensor& logits,
                                           const std::optional<Tensor>& temperature,
                                           double temperature_value) {
  const Rows rows(logits);
  const int64_t n = logits.size(0);
  const ScalarType type = accumulation_type(logits);
  const Values t(temperature, logits, type, n);
  Tensor entropy = empty<1>({n}, type, logits);
  Tensor statistics = empty<2>({2, n}, type, logits);
  const SoftmaxEntropyArgs args{data_type(logits),
                                n,
                                logits.size(1),
                                rows.matrix,
                                t.data,
                                t.stride,
                                temperature_value,
                                entropy.data_ptr(),
                                statistics.data_ptr()};
  BMTARD_LAUNCH(softmax_entropy, logits, args);
  return {entropy, statistics};
}

std::tuple<Tensor, Tensor> softmax_entropy_backward(const Tensor& grad_entropy,
                                                    const Tensor& logits,
                                                    const std::optional<Tensor>& temperature,
                                                    double temperature_value, const Tensor& entropy,
                                                    const Tensor& statistics, bool wants_logits,
                                                    bool wants_temperature) {
  const Rows rows(logits);
  const int64_t n = logits.size(0), classes = logits.size(1);
  const ScalarType type = accumulation_type(logits);
  const Values t(temperature, logits, type, n), grad(grad_entropy, logits, type, n);
  Tensor grad_logits = wants_logits ? empty<2>({n, classes}, logits.scalar_type(), logits)
                                    : empty<1>({0}, logits.scalar_type(), logits);
  Tensor grad_temperature = empty<1>({wants_temperature ? n : 0}, type, logits);
  const SoftmaxEntropyBackwardArgs args{data_type(logits),
                                        n,
                                        classes,
                                        rows.matrix,
                                        t.data,
                                        t.stride,
                                        temperature_value,
                                        dense(entropy, logits, type, n),
                                        dense(statistics, logits, type, 2 * n),
                                        grad.data,
                                        grad.stride,
                                        wants_logits ? grad_logits.data_ptr() : nullptr,
                                        wants_temperature ? grad_temperature.data_ptr() : nullptr};
  BMTARD_LAUNCH(softmax_entropy_backward, logits, args);
  return {grad_logits, grad_temperature};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bisect_temperature(
    const Tensor& logits, const Tensor& target_entropy, const std::optional<Tensor>& initial,
    double low, double high, bool per_sample, double tolerance, int64_t max_iterations,
    bool bisection) {
  const Rows rows(logits);
  const int64_t n = logits.size(0);
  const int64_t searches = per_sample ? n : 1;
  const ScalarType type = accumulation_type(logits);
  const Values target(target_entropy, logits, type, searches);
  const Values start(initial, logits, type, searches);
  const auto result = [&](ScalarType of) {
    return per_sample ? empty<1>({n}, of, logits) : empty<0>({}, of, logits);
  };
  Tensor temperature = result(type), entropy = result(type), slope = result(type);
  Tensor status = result(ScalarType::Int), iterations = result(ScalarType::Int);
  BisectTemperatureArgs args{data_type(logits),
                             n,
                             logits.size(1),
                             rows.matrix,
                             per_sample,
                             target.data,
                             target.stride,
                             start.data,
                             start.stride,
                             low,
                             high,
                             tolerance,
                             static_cast<int32_t>(max_iterations),
                             bisection ? SearchMethod::kBisection : SearchMethod::kHalley,
                             temperature.data_ptr(),
                             entropy.data_ptr(),
                             slope.data_ptr(),
                             static_cast<int32_t*>(status.data_ptr()),
                             static_cast<int32_t*>(iterations.data_ptr()),
                             nullptr};
  const size_t bytes = BMTARD_WORKSPACE(bisect_temperature, logits, args);
  const Tensor workspace = empty<1>({static_cast<int64_t>(bytes)}, ScalarType::Byte, logits);
  args.workspace = workspace.data_ptr();
  BMTARD_LAUNCH(bisect_temperature, logits, args);
  return {temperature, entropy, slope, status, iterations};
}

// K pairs of logits out of lists of K or 1.
struct Pairs {
  std::vector<Rows> students, teachers;
  int32_t teachers_count;

  Pairs(const Tensors& student, const Tensors& teacher) {
    STD_TORCH_CHECK(
        !student.empty() && !teacher.empty() && student.size() <= kMaxTeachers &&
            teacher.size() <= kMaxTeachers &&
            (student.size() == teacher.size() || student.size() == 1 || teacher.size() == 1),
        "expected 1 or K student and teacher logits, K <= ", kMaxTeachers);
    for (const Tensor& s : student) {
      check_like(s, student[0]);
      students.emplace_back(s);
    }
    for (const Tensor& t : teacher) {
      check_like(t, student[0]);
      teachers.emplace_back(t);
    }
    teachers_count = static_cast<int32_t>(std::max(student.size(), teacher.size()));
  }

  const Tensor& first() const { return students[0].tensor; }
  template <typename Args>
  void fill(Args& args) const {
    args.dtype = data_type(first());
    args.teachers = teachers_count;
    args.rows = first().size(0);
    args.classes = first().size(1);
    for (int32_t k = 0; k < teachers_count; ++k) {
      args.student[k] = students[students.size() == 1 ? 0 : k].matrix;
      args.teacher[k] = teachers[teachers.size() == 1 ? 0 : k].matrix;
    }
  }
};

// dL/dKL [K, N], by any strides.
template <typename Args>
void fill_coefficient(Args& args, const Tensor& tensor, const char* name, const Tensor& logits) {
  STD_TORCH_CHECK(
      tensor.dim() == 2 && tensor.size(0) == args.teachers && tensor.size(1) == args.rows &&
          tensor.scalar_type() == accumulation_type(logits) &&
          tensor.is_cuda() == logits.is_cuda() &&
          tensor.get_device_index() == logits.get_device_index(),
      "expected ", name, " [", args.teachers, ", ", args.rows, "] in the accumulation dtype");
  args.coefficient = tensor.const_data_ptr();
  args.coefficient_teacher_stride = tensor.stride(0);
  args.coefficient_row_stride = tensor.stride(1);
}

// KL of each row, with the gradients by the students if there is a coefficient.
std::tuple<Tensor, Tensor, Tensors> kl_and_gradients(const Tensors& student, const Tensors& teacher,
                                                     const std::optional<Tensor>& temperature,
                                                     double temperature_value,
                                                     double student_temperature, double eps,
                                                     bool with_statistics,
                                                     const Tensor* coefficient) {
  const Pairs pairs(student, teacher);
  const Tensor& first = pairs.first();
  const int64_t n = first.size(0), count = pairs.teachers_count;
  const ScalarType type = accumulation_type(first);
  const Values t(temperature, first, ScalarType::Double, count);
  Tensor kl = empty<2>({count, n}, type, first);
  Tensor statistics =
      with_statistics ? empty<3>({5, count, n}, type, first) : empty<1>({0}, type, first);
  MultiTeacherKLArgs args{};
  pairs.fill(args);
  args.temperature = static_cast<const double*>(t.data);
  args.temperature_stride = t.stride;
  args.temperature_value = temperature_value;
  args.student_temperature = student_temperature;
  args.eps = eps;
  args.kl = kl.data_ptr();
  args.statistics = with_statistics ? statistics.data_ptr() : nullptr;
  Tensors grads;
  if (coefficient) {
    STD_TORCH_CHECK(static_cast<int64_t>(student.size()) == count,
                    "expected as many student logits as teachers");
    fill_coefficient(args, *coefficient, "coefficient", first);
    grads = gradients((int64_t{1} << count) - 1, count, first, args.grad_student);
  }
  BMTARD_LAUNCH(multi_teacher_kl, first, args);
  return {kl, statistics, grads};
}

std::tuple<Tensor, Tensor> multi_teacher_kl(const Tensors& student, const Tensors& teacher,
                                            const std::optional<Tensor>& temperature,
                                            double temperature_value, double student_temperature,
                                            double eps, bool with_statistics) {
  auto [kl, statistics, grads] =
      kl_and_gradients(student, teacher, temperature, temperature_value, student_temperature, eps,
                       with_statistics, nullptr);
  return {kl, statistics};
}

std::tuple<Tensor, Tensors> multi_teacher_kl_with_gradients(
    const Tensors& student, const Tensors& teacher, const std::optional<Tensor>& temperature,
    double temperature_value, double student_temperature, double eps, const Tensor& coefficient) {
  const bool with_statistics = !coefficient.is_cuda();  // see kernels.h
  auto [kl, statistics, grads] =
      kl_and_gradients(student, teacher, temperature, temperature_value, student_temperature, eps,
                       with_statistics, &coefficient);
  return {kl, grads};
}

std::tuple<Tensors, Tensors, Tensor> multi_teacher_kl_backward(
    const Tensor& grad_kl, const Tensors& student, const Tensors& teacher,
    const std::optional<Tensor>& temperature, double temperature_value, double student_temperature,
    double eps, const Tensor& statistics, int64_t wants_students, int64_t wants_teachers,
    bool wants_temperature) {
  const Pairs pairs(student, teacher);
  const Tensor& first = pairs.first();
  const int64_t n = first.size(0), count = pairs.teachers_count;
  const ScalarType type = accumulation_type(first);
  const Values t(temperature, first, ScalarType::Double, count);
  MultiTeacherKLBackwardArgs args{};
  pairs.fill(args);
  args.temperature = static_cast<const double*>(t.data);
  args.temperature_stride = t.stride;
  args.temperature_value = temperature_value;
  args.student_temperature = student_temperature;
  args.eps = eps;
  args.statistics = dense(statistics, first, type, 5 * count * n);
  fill_coefficient(args, grad_kl, "grad_kl", first);
  args.student_shared = student.size() == 1 && count > 1;
  args.teacher_shared = teacher.size() == 1 && count > 1;
  Tensors grad_students =
      gradients(wants_students, static_cast<int64_t>(student.size()), first, args.grad_student);
  Tensors grad_teachers =
      gradients(wants_teachers, static_cast<int64_t>(teacher.size()), first, args.grad_teacher);
  Tensor grad_temperature = empty<2>({wants_temperature ? count : 0, n}, type, first);
  args.grad_temperature = wants_temperature ? grad_temperature.data_ptr() : nullptr;
  BMTARD_LAUNCH(multi_teacher_kl_backward, first, args);
  return {grad_students, grad_teachers, grad_temperature};
}

std::tuple<Tensor, Tensor> bmtard_loss(const Tensors& student, const Tensors& teacher,
                                       const Tensor& temperatures, const Tensor& weights,
                                       const Tensor& initial_losses, const Tensor& entropies,
                                       const Tensor& losses, const Tensor& temperature_lr,
                                       const Tensor& weight_lr, const Tensor& step,
                                       const Tensor& status, bool update, bool sign, double low,
                                       double high, double temperature_momentum,
                                       double loss_exponent, double student_temperature, double eps,
                                       double scale, double gradient_scale, double tolerance,
                                       int64_t max_iterations, bool wants_grad) {
  const Pairs pairs(student, teacher);
  const Tensor& first = pairs.first();
  const int64_t count = pairs.teachers_count;
  STD_TORCH_CHECK(student.size() == teacher.size(), "expected K student and K teacher logits");
  const auto state = [&](const Tensor& tensor, ScalarType type, int64_t values) {
    return dense(tensor, first, type, values);
  };
  const auto reals = [&](const Tensor& tensor, int64_t values) {
    return static_cast<double*>(state(tensor, ScalarType::Double, values));
  };
  BMTARDLossArgs args{};
  pairs.fill(args);
  args.state = {reals(temperatures, count),
                reals(weights, count),
                reals(initial_losses, count),
                reals(entropies, count),
                reals(losses, count),
                reals(temperature_lr, 1),
                reals(weight_lr, 1),
                static_cast<int64_t*>(state(step, ScalarType::Long, 1)),
                static_cast<int32_t*>(state(status, ScalarType::Int, 1))};
  args.update = update;
  args.mode = sign ? BalanceMode::kSign : BalanceMode::kBisect;
  args.low = low;
  args.high = high;
  args.temperature_momentum = temperature_momentum;
  args.loss_exponent = loss_exponent;
  args.student_temperature = student_temperature;
  args.eps = eps;
  args.scale = scale;
  args.gradient_scale = gradient_scale;
  args.tolerance = tolerance;
  args.max_iterations = static_cast<int32_t>(max_iterations);
  Tensor loss = empty<0>({}, accumulation_type(first), first);
  args.loss = loss.data_ptr();
  // In one tensor, as torch.compile takes no list from an op that changes its arguments.
  Tensor grads =
      empty<3>({wants_grad ? count : 0, args.rows, args.classes}, first.scalar_type(), first);
  const int64_t gradient_bytes =
      args.rows * args.classes * static_cast<int64_t>(first.element_size());
  for (int64_t k = 0; wants_grad && k < count; ++k) {
    args.grad_student[k] = static_cast<char*>(grads.data_ptr()) + k * gradient_bytes;
  }
  const size_t bytes = BMTARD_WORKSPACE(bmtard_loss, first, args);
  const Tensor workspace = empty<1>({static_cast<int64_t>(bytes)}, ScalarType::Byte, first);
  args.workspace = workspace.data_ptr();
  BMTARD_LAUNCH(bmtard_loss, first, args);
  return {loss, grads};
}

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

void pgd_step_(Tensor x_adv, const Tensor& grad, const Tensor& x, double step_size, double epsilon,
               double low, double high, bool l2) {
  for (const Tensor& other : {grad, x}) {
    STD_TORCH_CHECK(other.dim() == x_adv.dim() && other.dim() > 0 &&
                        other.scalar_type() == x_adv.scalar_type() &&
                        other.is_cuda() == x_adv.is_cuda() &&
                        other.get_device_index() == x_adv.get_device_index(),
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

}  // namespace
}  // namespace bmtard

// N rows, C classes, K teachers; acc: float64 for float64 logits, else float32. Entropies and KLs
// in nats. `temperature` None: `temperature_value`. Statistics: see kernels.h.
STABLE_TORCH_LIBRARY(bmtard, m) {
  // logits [N, C], temperature acc [] or [N] -> entropy acc [N], statistics acc [2, N]
  m.def(
      "softmax_entropy(Tensor logits, Tensor? temperature, float temperature_value) "
      "-> (Tensor, Tensor)");
  // grad_entropy acc [] or [N] -> grad_logits [N, C], grad_temperature acc [N]; empty: not wanted
  m.def(
      "softmax_entropy_backward(Tensor grad_entropy, Tensor logits, Tensor? temperature, "
      "float temperature_value, Tensor entropy, Tensor statistics, bool wants_logits, "
      "bool wants_temperature) -> (Tensor, Tensor)");
  // -> temperature, entropy, slope (by log temperature): acc [] or [N]; status, iterations: int32
  m.def(
      "bisect_temperature(Tensor logits, Tensor target_entropy, Tensor? initial, float low, "
      "float high, bool per_sample, float tolerance, int max_iterations, bool bisection) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // lists of K or 1 [N, C]; temperature float64 [] or [K] -> kl acc [K, N], statistics [5, K, N]
  m.def(
      "multi_teacher_kl(Tensor[] student_logits, Tensor[] teacher_logits, Tensor? temperature, "
      "float temperature_value, float student_temperature, float eps, bool with_statistics) "
      "-> (Tensor, Tensor)");
  // As above, K students; coefficient = dL/dKL acc [K, N] -> kl, d L / d student k [N, C]
  m.def(
      "multi_teacher_kl_with_gradients(Tensor[] student_logits, Tensor[] teacher_logits, "
      "Tensor? temperature, float temperature_value, float student_temperature, float eps, "
      "Tensor coefficient) -> (Tensor, Tensor[])");
  // wants_*: bit k for list entry k -> the wanted gradients [N, C], and by temperature [K, N]
  m.def(
      "multi_teacher_kl_backward(Tensor grad_kl, Tensor[] student_logits, "
      "Tensor[] teacher_logits, Tensor? temperature, float temperature_value, "
      "float student_temperature, float eps, Tensor statistics, int wants_students, "
      "int wants_teachers, bool wants_temperature) -> (Tensor[], Tensor[], Tensor)");
  // State float64 [K] and []; step int64 [], status int32 [] -> loss acc [], gradients [K, N, C]
  m.def(
      "bmtard_loss(Tensor[] student_logits, Tensor[] teacher_logits, Tensor(a!) temperatures, "
      "Tensor(b!) weights, Tensor(c!) initial_losses, Tensor(d!) entropies, Tensor(e!) losses, "
      "Tensor temperature_lr, Tensor weight_lr, Tensor(f!) step, Tensor(g!) status, bool update, "
      "bool sign, float low, float high, float temperature_momentum, float loss_exponent, "
      "float student_temperature, float eps, float scale, float gradient_scale, float tolerance, "
      "int max_iterations, "
      "bool wants_grad) -> (Tensor, Tensor)");
  // x_adv, grad, x [N, ...] in pixel units
  m.def(
      "pgd_step_(Tensor(a!) x_adv, Tensor grad, Tensor x, float step_size, float epsilon, "
      "float low, float high, bool l2) -> ()");
  // buffers *= factor acc []; a factor of 1, noticed where it lies, moves nothing
  m.def("scale_(Tensor(a!)[] buffers, Tensor factor) -> ()");
}

#define BMTARD_IMPLEMENT(key)                                                           \
  STABLE_TORCH_LIBRARY_IMPL(bmtard, key, m) {                                           \
    m.impl("softmax_entropy", TORCH_BOX(&bmtard::softmax_entropy));                     \
    m.impl("softmax_entropy_backward", TORCH_BOX(&bmtard::softmax_entropy_backward));   \
    m.impl("bisect_temperature", TORCH_BOX(&bmtard::bisect_temperature));               \
    m.impl("multi_teacher_kl", TORCH_BOX(&bmtard::multi_teacher_kl));                   \
    m.impl("multi_teacher_kl_with_gradients",                                           \
           TORCH_BOX(&bmtard::multi_teacher_kl_with_gradients));                        \
    m.impl("multi_teacher_kl_backward", TORCH_BOX(&bmtard::multi_teacher_kl_backward)); \
    m.impl("bmtard_loss", TORCH_BOX(&bmtard::bmtard_loss));                             \
    m.impl("pgd_step_", TORCH_BOX(&bmtard::pgd_step_));                                 \
    m.impl("scale_", TORCH_BOX(&bmtard::scale_));                                       \
  }
BMTARD_IMPLEMENT(CPU)
#if defined(BMTARD_CUDA)
BMTARD_IMPLEMENT(CUDA)
#endif

// One JSON object, read by bmtard/_library.py.
extern "C" __attribute__((visibility("default"))) const char* bmtard_build_info() {
  static const std::string info = []() -> std::string {
    std::string text = "{\"torch\": \"" BMTARD_TORCH_VERSION "\", \"target\": \"2.10\", ";
#if defined(BMTARD_CUDA)
    text += "\"cuda\": true, \"cuda_runtime\": " + std::to_string(bmtard::cuda::runtime_version()) +
            ", \"cuda_architectures\": \"" + bmtard::cuda::architectures() + "\", ";
#else
    text += "\"cuda\": false, ";
#endif
    try {
      text += "\"instruction_set\": \"" + std::string(bmtard::cpu::kernels().instruction_set);
    } catch (const std::exception& error) {  // must not leave a C function
      std::string message = error.what();
      std::replace(message.begin(), message.end(), '"', '\'');
      std::replace(message.begin(), message.end(), '\\', '/');
      return "{\"error\": \"" + message + "\"}";
    }
    return text + "\", \"compiler\": \"" __VERSION__ "\"}";
  }();
  return info.c_str();
}
