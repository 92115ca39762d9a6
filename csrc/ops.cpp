// The schemas, in one list, and their registration. csrc/ops has the functions.
#include "ops/ops.h"

#include <algorithm>
#include <exception>
#include <string>

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
  // `target_entropy` None: `target_value`, on the CPU alone -> temperature, entropy, slope (by log
  // temperature): acc [] or [N]; status, iterations: int32
  m.def(
      "bisect_temperature(Tensor logits, Tensor? target_entropy, float target_value, "
      "Tensor? initial, float low, float high, bool per_sample, float tolerance, "
      "int max_iterations, bool bisection) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // lists of K or 1 [N, C]; temperature float64 [] or [K]; reduction: see ops.h, 0 on CUDA
  // -> kl acc [K, N], or [K] if it is reduced, statistics [5, K, N]
  m.def(
      "multi_teacher_kl(Tensor[] student_logits, Tensor[] teacher_logits, Tensor? temperature, "
      "float temperature_value, float student_temperature, float eps, int reduction, "
      "bool with_statistics) -> (Tensor, Tensor)");
  // As above, K students; coefficient = dL/dKL acc [K, N] or [K] -> kl, d L / d student k [N, C]
  m.def(
      "multi_teacher_kl_with_gradients(Tensor[] student_logits, Tensor[] teacher_logits, "
      "Tensor? temperature, float temperature_value, float student_temperature, float eps, "
      "Tensor coefficient) -> (Tensor, Tensor[])");
  // grad_kl acc [K, N], or [K] for all rows or if kl was reduced; wants_*: bit k for list entry k
  // -> the wanted gradients: of students and teachers [N, C], of the temperature acc [K, N]
  m.def(
      "multi_teacher_kl_backward(Tensor grad_kl, Tensor[] student_logits, "
      "Tensor[] teacher_logits, Tensor? temperature, float temperature_value, "
      "float student_temperature, float eps, int reduction, Tensor statistics, "
      "int wants_students, int wants_teachers, bool wants_temperature) -> Tensor[]");
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
  // buffers *= factor acc []; the kernel reads the factor, and moves nothing if it is 1
  m.def("scale_(Tensor(a!)[] buffers, Tensor factor) -> ()");
}

#define BMTARD_IMPLEMENT(key)                                                                \
  STABLE_TORCH_LIBRARY_IMPL(bmtard, key, m) {                                                \
    m.impl("softmax_entropy", TORCH_BOX(&bmtard::ops::softmax_entropy));                     \
    m.impl("softmax_entropy_backward", TORCH_BOX(&bmtard::ops::softmax_entropy_backward));   \
    m.impl("bisect_temperature", TORCH_BOX(&bmtard::ops::bisect_temperature));               \
    m.impl("multi_teacher_kl", TORCH_BOX(&bmtard::ops::multi_teacher_kl));                   \
    m.impl("multi_teacher_kl_with_gradients",                                                \
           TORCH_BOX(&bmtard::ops::multi_teacher_kl_with_gradients));                        \
    m.impl("multi_teacher_kl_backward", TORCH_BOX(&bmtard::ops::multi_teacher_kl_backward)); \
    m.impl("bmtard_loss", TORCH_BOX(&bmtard::ops::bmtard_loss));                             \
    m.impl("pgd_step_", TORCH_BOX(&bmtard::ops::pgd_step_));                                 \
    m.impl("scale_", TORCH_BOX(&bmtard::ops::scale_));                                       \
  }
BMTARD_IMPLEMENT(CPU)
#if defined(BMTARD_CUDA)
BMTARD_IMPLEMENT(CUDA)
#endif

// One JSON object, read by bmtard/_library.py.
extern "C" __attribute__((visibility("default"))) const char* bmtard_build_info() {
  static const std::string info = []() -> std::string {
    std::string text = "{\"torch\": \"" BMTARD_TORCH_VERSION "\", \"target\": \"2.10\", ";
#if defined(BMTARD_TUNING)
    text += "\"tuning\": true, ";
#endif
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
