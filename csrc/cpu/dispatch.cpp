// Chooses the instruction set, once; compiled without any flags for one.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../kernels.h"
#include "loss_workspace.h"

namespace bmtard {

namespace baseline {
extern const cpu::Kernels table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const cpu::Kernels table;
}
namespace avx512 {
extern const cpu::Kernels table;
}
#endif

namespace cpu {

namespace {

const Kernels& choose() {
  bool has_avx2 = false, has_avx512 = false;
#if defined(__x86_64__)
  __builtin_cpu_init();
  has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
  has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl");
#endif
  const char* wanted = std::getenv("BMTARD_CPU_CAPABILITY");
  const std::string name = wanted ? wanted : "";
  if (!name.empty() && name != "baseline" && name != "avx2" && name != "avx512") {
    throw std::runtime_error("BMTARD_CPU_CAPABILITY must be baseline, avx2 or avx512, got " + name);
  }
  if ((name == "avx2" && !has_avx2) || (name == "avx512" && !has_avx512)) {
    throw std::runtime_error("BMTARD_CPU_CAPABILITY is " + name +
                             ", which this processor does not have");
  }
#if defined(__x86_64__)
  if (has_avx512 && (name.empty() || name == "avx512")) return avx512::table;
  if (has_avx2 && name != "baseline") return avx2::table;
#endif
  return baseline::table;
}

size_t accumulation_size(DataType dtype) {
  return dtype == DataType::kFloat64 ? sizeof(double) : sizeof(float);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

size_t bisect_temperature_workspace(const BisectTemperatureArgs& args) {
  if (args.per_sample) return 0;
  return static_cast<size_t>(args.rows) * (3 * sizeof(double) + accumulation_size(args.dtype));
}

size_t bmtard_loss_workspace(const BMTARDLossArgs& args) {
  const size_t rows = static_cast<size_t>(args.rows);
  const size_t all = rows * static_cast<size_t>(args.teachers);
  size_t bytes =
      3 * rows * sizeof(double) + 2 * all * sizeof(double) + all * accumulation_size(args.dtype);
  if (args.grad_student[0]) {
    const GradientPass pass = gradient_pass(args);
    if (pass == GradientPass::kFromFloat) {
      bytes += all * static_cast<size_t>(args.classes) * sizeof(float);
    }
    if (pass == GradientPass::kFromLogits) bytes += 4 * all * sizeof(float);
  }
  return bytes;
}

}  // namespace cpu
}  // namespace bmtard
