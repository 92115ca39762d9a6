#include <cmath>

#include "ops.h"

namespace bmtard {
namespace ops {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bisect_temperature(
    const Tensor& logits, const std::optional<Tensor>& target_entropy, double target_value,
    const std::optional<Tensor>& initial, double low, double high, bool per_sample,
    double tolerance, int64_t max_iterations, bool bisection) {
  const Rows rows(logits);
  const int64_t n = logits.size(0);
  const int64_t searches = per_sample ? n : 1;
  const ScalarType type = accumulation_type(logits);
  STD_TORCH_CHECK(target_entropy || !logits.is_cuda(), "expected a target on the device");
  const float narrow = static_cast<float>(target_value);
  const bool is_double = type == ScalarType::Double;
  STD_TORCH_CHECK(is_double || std::isinf(narrow) == std::isinf(target_value),
                  "value cannot be converted to type float without overflow");  // torch's words
  const Values number{is_double ? static_cast<const void*>(&target_value) : &narrow};
  const Values target = target_entropy ? values(*target_entropy, logits, type, searches) : number;
  const Values start = values(initial, logits, type, searches);
  const auto result = [&](ScalarType of) {
    return per_sample ? empty<1>({n}, of, logits) : empty<0>({}, of, logits);
  };
  Tensor temperature = result(type), entropy = result(type), slope = result(type);
  Tensor status = result(ScalarType::Int), iterations = result(ScalarType::Int);
  BisectTemperatureArgs args{};
  set_logits(args, rows.logits);
  args.per_sample = per_sample;
  args.target_entropy = target.data;
  args.target_entropy_stride = target.stride;
  args.initial = start.data;
  args.initial_stride = start.stride;
  args.low = low;
  args.high = high;
  args.tolerance = tolerance;
  args.max_iterations = static_cast<int32_t>(max_iterations);
  args.method = bisection ? SearchMethod::kBisection : SearchMethod::kHalley;
  args.temperature = temperature.data_ptr();
  args.entropy = entropy.data_ptr();
  args.slope = slope.data_ptr();
  args.status = static_cast<int32_t*>(status.data_ptr());
  args.iterations = static_cast<int32_t*>(iterations.data_ptr());
  const Workspace memory = BMTARD_WORKSPACE(bisect_temperature, logits, args);
  args.workspace = memory.data();
  BMTARD_LAUNCH(bisect_temperature, logits, args);
  return {temperature, entropy, slope, status, iterations};
}

}  // namespace ops
}  // namespace bmtard
