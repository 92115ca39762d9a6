#include "ops.h"

namespace bmtard {
namespace ops {
namespace {

// Adds a tensor [N, C] for each bit that is set in `wanted`; pointers[k] is null for the others.
// Each is an allocation of its own: allocators keep blocks for reuse only up to some size.
void add_gradients(Tensors& all, int64_t wanted, size_t count, const Tensor& like,
                   void** pointers) {
  for (size_t k = 0; k < count; ++k) {
    pointers[k] = nullptr;
    if (wanted >> k & 1) {
      all.push_back(empty<2>({like.size(0), like.size(1)}, like.scalar_type(), like));
      pointers[k] = all.back().data_ptr();
    }
  }
}

// What `reduction` divides the sum over the rows by.
double divisor_of(int64_t reduction, const Tensor& logits) {
  STD_TORCH_CHECK(!logits.is_cuda(), "expected no reduction on CUDA");
  const double rows = static_cast<double>(logits.size(0));
  switch (reduction) {
    case kSum:
      return 1;
    case kMean:
      return rows * static_cast<double>(logits.size(1));
    case kBatchMean:
    case kWeightedMean:
      return rows;
    default:
      STD_TORCH_CHECK(false, "expected a reduction from 0 to 4");
  }
}

// In double, and in parts: one addition need not wait for the one before.
template <typename real>
double sum_of(const real* values, int64_t n) {
  constexpr int64_t kParts = 8;
  double parts[kParts] = {};
  int64_t r = 0;
  for (; r + kParts <= n; r += kParts) {
    for (int64_t i = 0; i < kParts; ++i) parts[i] += values[r + i];
  }
  double sum = 0;
  for (; r < n; ++r) sum += values[r];
  for (const double part : parts) sum += part;
  return sum;
}

// [K, n] or [K] on the CPU -> [K]: the sum over n, over the divisor.
Tensor over_rows(const Tensor& values, double divisor) {
  const int64_t count = values.size(0), n = values.dim() == 1 ? 1 : values.size(1);
  const int64_t stride = values.stride(0);
  Tensor result = empty<1>({count}, values.scalar_type(), values);
  const auto add = [&](const auto* from, auto* to) {
    for (int64_t k = 0; k < count; ++k) {
      const double sum = sum_of(from + k * stride, n);
      to[k] = static_cast<std::decay_t<decltype(*to)>>(sum / divisor);
    }
  };
  if (values.scalar_type() == ScalarType::Double) {
    add(values.const_data_ptr<double>(), result.mutable_data_ptr<double>());
  } else {
    add(values.const_data_ptr<float>(), result.mutable_data_ptr<float>());
  }
  return result;
}

// dL/dKL in the accumulation dtype: [K, N], or [K] where it is the same for all rows.
Coefficient coefficient_of(const Tensor& tensor, const char* name, const Pairs& pairs) {
  const Tensor& first = pairs.first();
  const int64_t dims = tensor.dim();
  STD_TORCH_CHECK((dims == 1 || dims == 2) && tensor.size(0) == pairs.count &&
                      (dims == 1 || tensor.size(1) == first.size(0)) &&
                      tensor.scalar_type() == accumulation_type(first) &&
                      on_one_device(tensor, first),
                  "expected ", name, " [", pairs.count, "] or [", pairs.count, ", ", first.size(0),
                  "] in the accumulation dtype");
  return {tensor.const_data_ptr(), tensor.stride(0), dims == 1 ? 0 : tensor.stride(1)};
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
  const int64_t n = first.size(0), count = pairs.count;
  const ScalarType type = accumulation_type(first);
  const Values t = values(temperature, first, ScalarType::Double, count);
  Tensor kl = empty<2>({count, n}, type, first);
  Tensor statistics =
      with_statistics ? empty<3>({5, count, n}, type, first) : empty<1>({0}, type, first);
  MultiTeacherKLArgs args{};
  set_pairs(args, pairs.students, pairs.teachers);
  set_temperature(args, {t, temperature_value});
  args.student_temperature = student_temperature;
  args.eps = eps;
  args.kl = kl.data_ptr();
  args.statistics = with_statistics ? statistics.data_ptr() : nullptr;
  Tensors grads;
  if (coefficient) {
    STD_TORCH_CHECK(static_cast<int64_t>(student.size()) == count,
                    "expected as many student logits as teachers");
    set_coefficient(args, coefficient_of(*coefficient, "coefficient", pairs));
    add_gradients(grads, (int64_t{1} << count) - 1, student.size(), first, args.grad_student);
  }
  BMTARD_LAUNCH(multi_teacher_kl, first, args);
  return {kl, statistics, grads};
}

}  // namespace

std::tuple<Tensor, Tensor> multi_teacher_kl(const Tensors& student, const Tensors& teacher,
                                            const std::optional<Tensor>& temperature,
                                            double temperature_value, double student_temperature,
                                            double eps, int64_t reduction, bool with_statistics) {
  auto [kl, statistics, grads] =
      kl_and_gradients(student, teacher, temperature, temperature_value, student_temperature, eps,
                       with_statistics, nullptr);
  if (reduction == kNone) return {kl, statistics};
  return {over_rows(kl, divisor_of(reduction, student[0])), statistics};
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

Tensors multi_teacher_kl_backward(const Tensor& grad_kl, const Tensors& student,
                                  const Tensors& teacher, const std::optional<Tensor>& temperature,
                                  double temperature_value, double student_temperature, double eps,
                                  int64_t reduction, const Tensor& statistics,
                                  int64_t wants_students, int64_t wants_teachers,
                                  bool wants_temperature) {
  const Pairs pairs(student, teacher);
  const Tensor& first = pairs.first();
  const int64_t n = first.size(0), count = pairs.count;
  const ScalarType type = accumulation_type(first);
  const Values t = values(temperature, first, ScalarType::Double, count);
  MultiTeacherKLBackwardArgs args{};
  set_pairs(args, pairs.students, pairs.teachers);
  set_temperature(args, {t, temperature_value});
  args.student_temperature = student_temperature;
  args.eps = eps;
  args.statistics = dense(statistics, first, type, 5 * count * n);
  set_coefficient(args, coefficient_of(grad_kl, "grad_kl", pairs));
  std::optional<Tensor> divided;
  if (reduction != kNone) {
    STD_TORCH_CHECK(grad_kl.dim() == 1, "expected grad_kl [K] of a reduced KL");
    divided = over_rows(grad_kl, divisor_of(reduction, first));
    set_coefficient(args, coefficient_of(*divided, "grad_kl", pairs));
  }
  args.student_shared = student.size() == 1 && count > 1;
  args.teacher_shared = teacher.size() == 1 && count > 1;
  Tensors grads;
  add_gradients(grads, wants_students, student.size(), first, args.grad_student);
  add_gradients(grads, wants_teachers, teacher.size(), first, args.grad_teacher);
  if (wants_temperature) {
    grads.push_back(empty<2>({count, n}, type, first));
    args.grad_temperature = grads.back().data_ptr();
  }
  BMTARD_LAUNCH(multi_teacher_kl_backward, first, args);
  return grads;
}

}  // namespace ops
}  // namespace bmtard
