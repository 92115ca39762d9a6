// The ops as csrc/ops.cpp registers them. Its schemas say what the arguments are.
#pragma once

#include <tuple>

#include "tensors.h"

namespace bmtard {
namespace ops {

std::tuple<Tensor, Tensor> softmax_entropy(const Tensor& logits,
                                           const std::optional<Tensor>& temperature,
                                           double temperature_value);

std::tuple<Tensor, Tensor> softmax_entropy_backward(const Tensor& grad_entropy,
                                                    const Tensor& logits,
                                                    const std::optional<Tensor>& temperature,
                                                    double temperature_value, const Tensor& entropy,
                                                    const Tensor& statistics, bool wants_logits,
                                                    bool wants_temperature);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bisect_temperature(
    const Tensor& logits, const std::optional<Tensor>& target_entropy, double target_value,
    const std::optional<Tensor>& initial, double low, double high, bool per_sample,
    double tolerance, int64_t max_iterations, bool bisection);

// What becomes of the KLs of the rows, in the order of bmtard/ops/multi_teacher_kl.py. The weights
// are 1 here.
enum Reduction : int64_t { kNone, kSum, kMean, kBatchMean, kWeightedMean };

std::tuple<Tensor, Tensor> multi_teacher_kl(const Tensors& student, const Tensors& teacher,
                                            const std::optional<Tensor>& temperature,
                                            double temperature_value, double student_temperature,
                                            double eps, int64_t reduction, bool with_statistics);

std::tuple<Tensor, Tensors> multi_teacher_kl_with_gradients(
    const Tensors& student, const Tensors& teacher, const std::optional<Tensor>& temperature,
    double temperature_value, double student_temperature, double eps, const Tensor& coefficient);

Tensors multi_teacher_kl_backward(const Tensor& grad_kl, const Tensors& student,
                                  const Tensors& teacher, const std::optional<Tensor>& temperature,
                                  double temperature_value, double student_temperature, double eps,
                                  int64_t reduction, const Tensor& statistics,
                                  int64_t wants_students, int64_t wants_teachers,
                                  bool wants_temperature);

std::tuple<Tensor, Tensor> bmtard_loss(
    const Tensors& student, const Tensors& teacher, const Tensor& temperatures,
    const Tensor& weights, const Tensor& initial_losses, const Tensor& entropies,
    const Tensor& losses, const Tensor& temperature_lr, const Tensor& weight_lr, const Tensor& step,
    const Tensor& status, bool update, bool sign, double low, double high,
    double temperature_momentum, double loss_exponent, double student_temperature, double eps,
    double scale, double gradient_scale, double tolerance, int64_t max_iterations, bool wants_grad);

void pgd_step_(Tensor x_adv, const Tensor& grad, const Tensor& x, double step_size, double epsilon,
               double low, double high, bool l2);

void scale_(Tensors buffers, const Tensor& factor);

}  // namespace ops
}  // namespace bmtard
