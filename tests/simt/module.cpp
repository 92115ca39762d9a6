// The launchers of csrc/cuda on NumPy arrays, run by the machine of simt_host.h. Names and
// arguments are those of csrc/kernels.h; what may be null there may be None here. bfloat16
// travels as uint16.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <map>
#include <new>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "arguments.h"
#include "probes.h"
#include "simt.cuh"

namespace py = pybind11;
using namespace bmtard;

namespace {

using Array = py::array;
using Optional = std::optional<py::array>;

DataType dtype_of(const Array& array) {
  if (array.dtype().is(py::dtype::of<double>())) return DataType::kFloat64;
  if (array.dtype().is(py::dtype::of<float>())) return DataType::kFloat32;
  if (array.dtype().is(py::dtype::of<uint16_t>())) return DataType::kBFloat16;
  if (array.dtype().is(py::dtype("float16"))) return DataType::kFloat16;
  throw py::type_error("logits must be float64, float32, float16 or uint16 (bfloat16)");
}

Logits logits_of(const Array& array) {
  if (array.ndim() != 2) throw py::value_error("a matrix must have two dimensions");
  if (array.shape(1) > 1 && array.strides(1) != array.itemsize()) {
    throw py::value_error("the classes of a row must lie next to each other");
  }
  return {dtype_of(array),
          array.shape(0),
          array.shape(1),
          {array.data(), array.strides(0) / array.itemsize()}};
}

// The address of an output. NumPy's own flag says whether it may be written.
void* out(Array array) { return array.mutable_data(); }
void* out(Optional array) { return array ? array->mutable_data() : nullptr; }

Values values_of(const Array& array) { return {array.data(), array.ndim() == 0 ? 0 : 1}; }
Values values_of(const Optional& array) { return array ? values_of(*array) : Values{}; }

template <typename Args>
void set_pairs(Args& args, const std::vector<Array>& students, const std::vector<Array>& teachers) {
  if (students.size() != teachers.size() || students.empty() || students.size() > kMaxTeachers) {
    throw py::value_error("as many students as teachers, at most 16");
  }
  std::vector<Logits> pairs[2];
  for (const Array& array : students) pairs[0].push_back(logits_of(array));
  for (const Array& array : teachers) pairs[1].push_back(logits_of(array));
  bmtard::set_pairs(args, pairs[0], pairs[1]);
}

// A temperature: one value, or an array.
using OneOrMore = std::variant<double, Array>;

Temperature temperature_of(const OneOrMore& temperature) {
  if (const double* value = std::get_if<double>(&temperature)) return {{}, *value};
  return {values_of(std::get<Array>(temperature)), 0};
}

// coefficient [K, N], by any strides.
Coefficient coefficient_of(const Array& array) {
  return {array.data(), array.strides(0) / array.itemsize(), array.strides(1) / array.itemsize()};
}

// Scratch memory of exactly the size asked for: it starts out as NaN, and what lies behind
// it must stay as it is.
class Workspace {
 public:
  explicit Workspace(size_t bytes) : bytes_(bytes), memory_(bytes + kGuard, 0xff) {
    simt::host::forbid(memory_.data() + bytes, kGuard);
  }
  void* data() { return memory_.data(); }
  void check() const {
    for (size_t i = bytes_; i < memory_.size(); ++i) {
      if (memory_[i] != 0xff) throw simt::host::Fault("a kernel wrote past its workspace");
    }
  }

 private:
  static constexpr size_t kGuard = 64 * 1024;
  size_t bytes_;
  std::vector<unsigned char> memory_;
};

// Memory at a multiple of 16 bytes that ends where it ends.
py::array_t<uint8_t> allocate(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 16, bytes) != 0) throw std::bad_alloc();
  return py::array_t<uint8_t>(bytes, static_cast<uint8_t*>(memory),
                              py::capsule(memory, &std::free));
}

void forbid(py::array_t<uint8_t, py::array::c_style> bytes) {
  simt::host::forbid(bytes.data(), bytes.size());
}

void check(int error) {
  if (error != 0) throw std::runtime_error(cuda::error_string(error));
}

void softmax_entropy(Array logits, OneOrMore temperature, Array entropy, Optional statistics) {
  SoftmaxEntropyArgs args = {};
  set_logits(args, logits_of(logits));
  set_temperature(args, temperature_of(temperature));
  args.entropy = out(entropy);
  args.statistics = out(statistics);
  check(cuda::softmax_entropy(args, nullptr));
}

void softmax_entropy_backward(Array logits, OneOrMore temperature, Array entropy, Array statistics,
                              Array grad_entropy, Optional grad_logits, Optional grad_temperature) {
  SoftmaxEntropyBackwardArgs args = {};
  set_logits(args, logits_of(logits));
  set_temperature(args, temperature_of(temperature));
  args.entropy = entropy.data();
  args.statistics = statistics.data();
  const Values grad = values_of(grad_entropy);
  args.grad_entropy = grad.data;
  args.grad_entropy_stride = grad.stride;
  args.grad_logits = out(grad_logits);
  args.grad_temperature = out(grad_temperature);
  check(cuda::softmax_entropy_backward(args, nullptr));
}

void bisect_temperature(Array logits, bool per_sample, Array target_entropy, Optional initial,
                        double low, double high, double tolerance, int max_iterations, int method,
                        Array temperature, Array entropy, Array slope, Array status,
                        Array iterations) {
  BisectTemperatureArgs args = {};
  set_logits(args, logits_of(logits));
  args.per_sample = per_sample;
  const Values target = values_of(target_entropy), start = values_of(initial);
  args.target_entropy = target.data;
  args.target_entropy_stride = target.stride;
  args.initial = start.data;
  args.initial_stride = start.stride;
  args.low = low;
  args.high = high;
  args.tolerance = tolerance;
  args.max_iterations = max_iterations;
  args.method = static_cast<SearchMethod>(method);
  args.temperature = out(temperature);
  args.entropy = out(entropy);
  args.slope = out(slope);
  args.status = static_cast<int32_t*>(out(status));
  args.iterations = static_cast<int32_t*>(out(iterations));
  Workspace workspace(cuda::bisect_temperature_workspace(args));
  args.workspace = workspace.data();
  check(cuda::bisect_temperature(args, nullptr));
  workspace.check();
}

void multi_teacher_kl(std::vector<Array> students, std::vector<Array> teachers,
                      OneOrMore temperature, double student_temperature, double eps, Array kl,
                      Optional statistics, Optional coefficient,
                      std::vector<Optional> grad_students) {
  MultiTeacherKLArgs args = {};
  set_pairs(args, students, teachers);
  set_temperature(args, temperature_of(temperature));
  args.student_temperature = student_temperature;
  args.eps = eps;
  args.kl = out(kl);
  args.statistics = out(statistics);
  if (coefficient) {
    set_coefficient(args, coefficient_of(*coefficient));
    for (size_t k = 0; k < grad_students.size(); ++k) args.grad_student[k] = out(grad_students[k]);
  }
  check(cuda::multi_teacher_kl(args, nullptr));
}

void multi_teacher_kl_backward(std::vector<Array> students, std::vector<Array> teachers,
                               OneOrMore temperature, double student_temperature, double eps,
                               Array statistics, Array coefficient, bool student_shared,
                               bool teacher_shared, std::vector<Optional> grad_students,
                               std::vector<Optional> grad_teachers, Optional grad_temperature) {
  MultiTeacherKLBackwardArgs args = {};
  set_pairs(args, students, teachers);
  set_temperature(args, temperature_of(temperature));
  args.student_temperature = student_temperature;
  args.eps = eps;
  args.statistics = statistics.data();
  set_coefficient(args, coefficient_of(coefficient));
  args.student_shared = student_shared;
  args.teacher_shared = teacher_shared;
  for (size_t k = 0; k < grad_students.size(); ++k) args.grad_student[k] = out(grad_students[k]);
  for (size_t k = 0; k < grad_teachers.size(); ++k) args.grad_teacher[k] = out(grad_teachers[k]);
  args.grad_temperature = out(grad_temperature);
  check(cuda::multi_teacher_kl_backward(args, nullptr));
}

// state: the arrays of BalanceState by name, overwritten.
void bmtard_loss(std::vector<Array> students, std::vector<Array> teachers,
                 std::map<std::string, Array> state, bool update, bool sign, double low,
                 double high, double temperature_momentum, double loss_exponent,
                 double student_temperature, double eps, double scale, double tolerance,
                 std::optional<double> gradient_scale, int max_iterations, Array loss,
                 std::vector<Optional> grad_students) {
  BMTARDLossArgs args = {};
  set_pairs(args, students, teachers);
  args.state.temperatures = static_cast<double*>(out(state.at("temperatures")));
  args.state.weights = static_cast<double*>(out(state.at("weights")));
  args.state.initial_losses = static_cast<double*>(out(state.at("initial_losses")));
  args.state.entropies = static_cast<double*>(out(state.at("entropies")));
  args.state.losses = static_cast<double*>(out(state.at("losses")));
  args.state.temperature_lr = static_cast<const double*>(state.at("temperature_lr").data());
  args.state.weight_lr = static_cast<const double*>(state.at("weight_lr").data());
  args.state.step = static_cast<int64_t*>(out(state.at("step")));
  args.state.status = static_cast<int32_t*>(out(state.at("status")));
  args.update = update;
  args.mode = sign ? BalanceMode::kSign : BalanceMode::kBisect;
  args.low = low;
  args.high = high;
  args.temperature_momentum = temperature_momentum;
  args.loss_exponent = loss_exponent;
  args.student_temperature = student_temperature;
  args.eps = eps;
  args.scale = scale;
  args.gradient_scale = gradient_scale.value_or(scale);
  args.tolerance = tolerance;
  args.max_iterations = max_iterations;
  args.loss = out(loss);
  for (size_t k = 0; k < grad_students.size(); ++k) args.grad_student[k] = out(grad_students[k]);
  Workspace workspace(cuda::bmtard_loss_workspace(args));
  args.workspace = workspace.data();
  check(cuda::bmtard_loss(args, nullptr));
  workspace.check();
}

// Buffers of one size and dtype, overwritten.
void scale(std::vector<Array> buffers, Array factor) {
  ScaleArgs args = {};
  args.dtype = dtype_of(buffers.at(0));
  args.buffers = static_cast<int32_t>(buffers.size());
  args.size = buffers[0].size();
  for (size_t i = 0; i < buffers.size(); ++i) args.data[i] = out(buffers[i]);
  args.factor = factor.data();
  check(cuda::scale(args, nullptr));
}

void pgd_step(Array x_adv, Array grad, Array x, double step_size, double epsilon, double low,
              double high, bool l2) {
  PgdStepArgs args = {};
  args.dtype = dtype_of(x_adv);
  args.samples = x_adv.shape(0);
  args.sample_size = x_adv.shape(1);
  args.x_adv = out(x_adv);
  args.grad = grad.data();
  args.x = x.data();
  args.step_size = step_size;
  args.epsilon = epsilon;
  args.low = low;
  args.high = high;
  args.l2 = l2;
  check(cuda::pgd_step(args, nullptr));
}

}  // namespace

PYBIND11_MODULE(bmtard_simt, m) {
  py::register_exception<simt::host::Fault>(m, "Fault", PyExc_RuntimeError);
  m.def("softmax_entropy", &softmax_entropy, py::kw_only(), py::arg("logits"),
        py::arg("temperature"), py::arg("entropy"), py::arg("statistics"));
  m.def("softmax_entropy_backward", &softmax_entropy_backward, py::kw_only(), py::arg("logits"),
        py::arg("temperature"), py::arg("entropy"), py::arg("statistics"), py::arg("grad_entropy"),
        py::arg("grad_logits"), py::arg("grad_temperature"));
  m.def("bisect_temperature", &bisect_temperature, py::kw_only(), py::arg("logits"),
        py::arg("per_sample"), py::arg("target_entropy"), py::arg("initial"), py::arg("low"),
        py::arg("high"), py::arg("tolerance"), py::arg("max_iterations"), py::arg("method"),
        py::arg("temperature"), py::arg("entropy"), py::arg("slope"), py::arg("status"),
        py::arg("iterations"));
  m.def("multi_teacher_kl", &multi_teacher_kl, py::kw_only(), py::arg("students"),
        py::arg("teachers"), py::arg("temperature"), py::arg("student_temperature"), py::arg("eps"),
        py::arg("kl"), py::arg("statistics"), py::arg("coefficient") = py::none(),
        py::arg("grad_students") = std::vector<Optional>());
  m.def("multi_teacher_kl_backward", &multi_teacher_kl_backward, py::kw_only(), py::arg("students"),
        py::arg("teachers"), py::arg("temperature"), py::arg("student_temperature"), py::arg("eps"),
        py::arg("statistics"), py::arg("coefficient"), py::arg("student_shared"),
        py::arg("teacher_shared"), py::arg("grad_students"), py::arg("grad_teachers"),
        py::arg("grad_temperature"));
  m.def("bmtard_loss", &bmtard_loss, py::kw_only(), py::arg("students"), py::arg("teachers"),
        py::arg("state"), py::arg("update"), py::arg("sign"), py::arg("low"), py::arg("high"),
        py::arg("temperature_momentum"), py::arg("loss_exponent"), py::arg("student_temperature"),
        py::arg("eps"), py::arg("scale"), py::arg("tolerance"),
        py::arg("gradient_scale") = py::none(), py::arg("max_iterations"), py::arg("loss"),
        py::arg("grad_students"));
  m.def("scale", &scale, py::kw_only(), py::arg("buffers"), py::arg("factor"));
  m.def("pgd_step", &pgd_step, py::kw_only(), py::arg("x_adv"), py::arg("grad"), py::arg("x"),
        py::arg("step_size"), py::arg("epsilon"), py::arg("low"), py::arg("high"), py::arg("l2"));

  m.def(
      "configure",
      [](uint64_t seed, int multiprocessors, size_t max_shared_bytes, int max_cluster,
         bool cooperative, std::optional<int> device, bool refuses_clusters,
         bool refuses_cooperative) {
        static int unnumbered = 0;
        simt::host::Settings& settings = simt::host::settings;
        settings = {};
        settings.seed = seed;
        settings.multiprocessors = multiprocessors;
        settings.max_shared_bytes = max_shared_bytes;
        settings.max_cluster = max_cluster;
        settings.cooperative = cooperative;
        settings.device = device ? *device : --unnumbered;
        settings.refuses_clusters = refuses_clusters;
        settings.refuses_cooperative = refuses_cooperative;
      },
      "The order of threads and blocks (0: ascending), and what the device has. Without a number "
      "it is a device that no kernel has seen.",
      py::kw_only(), py::arg("seed") = 0, py::arg("multiprocessors") = 3,
      py::arg("max_shared_bytes") = 16 * 1024, py::arg("max_cluster") = 1,
      py::arg("cooperative") = true, py::arg("device") = py::none(),
      py::arg("refuses_clusters") = false, py::arg("refuses_cooperative") = false);
  m.def(
      "take_counters",
      [] {
        const simt::host::Counters now = std::exchange(simt::host::counters, {});
        py::dict out;
        out["launches"] = now.launches;
        out["blocks"] = now.blocks;
        out["barriers"] = now.barriers;
        out["shared_bytes"] = now.shared_bytes;
        out["remote_accesses"] = now.remote_accesses;
        out["packed_bytes"] = now.packed_bytes;
        out["single_bytes"] = now.single_bytes;
        out["device_questions"] = now.device_questions;
        out["kernel_questions"] = now.kernel_questions;
        return out;
      },
      "What has run since the last call.");
  m.def("sanitized", &simt::host::sanitized, "Whether AddressSanitizer watches the kernels.");
  m.def("allocate", &allocate, "Bytes at a multiple of 16.");
  m.def("forbid", &forbid, "What a sanitized kernel shall not touch.");
  m.def("widen_float16", [](uint16_t bits) { return simt::widen(Float16{bits}); });
  m.def("narrow_float16", [](float x) { return simt::to_float16(x).bits; });
  m.def("widen_bfloat16", [](uint16_t bits) { return simt::widen(BFloat16{bits}); });
  m.def("narrow_bfloat16", [](float x) { return simt::to_bfloat16(x).bits; });
  m.def("run_probe", &run_probe, "Runs a kernel of probes.cpp; returns what its threads wrote.");
  m.def("architectures", &cuda::architectures);
}
