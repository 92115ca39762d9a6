#include "ops.h"

namespace bmtard {
namespace ops {
namespace {

// A tensor [N, C] for each bit that is set in `wanted`; pointers[k] is null for the others. Each is
// an allocation of its own: allocators keep blocks for reuse only up to some size.
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
    grads = gradients((int64_t{1} << count) - 1, count, first, args.grad_student);
  }
  BMTARD_LAUNCH(multi_teacher_kl, first, args);
  return {kl, statistics, grads};
}

}  // namespace

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

}  // namespace ops
}  // namespace bmtard
