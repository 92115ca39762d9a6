#include "ops.h"

namespace bmtard {
namespace ops {

std::tuple<Tensor, Tensor> softmax_entropy(const Tensor& logits,
                                           const std::optional<Tensor>& temperature,
                                           double temperature_value) {
  const Rows rows(logits);
  const int64_t n = logits.size(0);
  const ScalarType type = accumulation_type(logits);
  Tensor entropy = empty<1>({n}, type, logits);
  Tensor statistics = empty<2>({2, n}, type, logits);
  SoftmaxEntropyArgs args{};
  set_logits(args, rows.logits);
  set_temperature(args, {values(temperature, logits, type, n), temperature_value});
  args.entropy = entropy.data_ptr();
  args.statistics = statistics.data_ptr();
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
  const Values grad = values(grad_entropy, logits, type, n);
  Tensor grad_logits = wants_logits ? empty<2>({n, classes}, logits.scalar_type(), logits)
                                    : empty<1>({0}, logits.scalar_type(), logits);
  Tensor grad_temperature = empty<1>({wants_temperature ? n : 0}, type, logits);
  SoftmaxEntropyBackwardArgs args{};
  set_logits(args, rows.logits);
  set_temperature(args, {values(temperature, logits, type, n), temperature_value});
  args.entropy = dense(entropy, logits, type, n);
  args.statistics = dense(statistics, logits, type, 2 * n);
  args.grad_entropy = grad.data;
  args.grad_entropy_stride = grad.stride;
  args.grad_logits = wants_logits ? grad_logits.data_ptr() : nullptr;
  args.grad_temperature = wants_temperature ? grad_temperature.data_ptr() : nullptr;
  BMTARD_LAUNCH(softmax_entropy_backward, logits, args);
  return {grad_logits, grad_temperature};
}

}  // namespace ops
}  // namespace bmtard
