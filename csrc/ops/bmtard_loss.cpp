#include "ops.h"

namespace bmtard {
namespace ops {

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
  const int64_t count = pairs.count;
  STD_TORCH_CHECK(student.size() == teacher.size(), "expected K student and K teacher logits");
  const auto state = [&](const Tensor& tensor, ScalarType type, int64_t values) {
    return dense(tensor, first, type, values);
  };
  const auto reals = [&](const Tensor& tensor, int64_t values) {
    return static_cast<double*>(state(tensor, ScalarType::Double, values));
  };
  BMTARDLossArgs args{};
  set_pairs(args, pairs.students, pairs.teachers);
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
  const Workspace memory = BMTARD_WORKSPACE(bmtard_loss, first, args);
  args.workspace = memory.data();
  BMTARD_LAUNCH(bmtard_loss, first, args);
  return {loss, grads};
}

}  // namespace ops
}  // namespace bmtard
