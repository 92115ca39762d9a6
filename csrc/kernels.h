// Every kernel launcher, host and device: plain pointers in, nothing of torch.
//
// N rows (samples), C classes, K teachers, D values of one sample. Strides count
// elements; the classes of a row lie next to each other. acc_t is double for float64
// data and float for every other type. Callers have checked shapes and ranges.
//
// A kernel that needs log-probabilities again computes (z - max z) / temperature - log-sum. The
// two statistics stay apart: beside a logit of 1e4, their sum would lose most digits of a float.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bmtard {

// The argument structs below travel to the device by value, so K is bounded.
constexpr int kMaxTeachers = 16;

enum class DataType : int32_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

// What a temperature search ended with; bmtard.SearchStatus in Python.
enum SearchStatus : int32_t {
  kConverged = 0,      // the entropy is the target, to the tolerance or to rounding
  kClampedLow = 1,     // the target lies below the entropy at the lower bound
  kClampedHigh = 2,    // the target lies above the entropy at the upper bound
  kDegenerate = 3,     // the entropy does not depend on the temperature; it was kept
  kNonFinite = 4,      // NaN or +inf in the logits or the target; it was kept
  kMaxIterations = 5,  // the best temperature found before max_iterations ran out
};

enum class SearchMethod : int32_t { kHalley = 0, kBisection = 1 };

// What a step of the balanced loss did; bmtard.BalanceStatus in Python.
enum BalanceStatus : int32_t {
  kUpdated = 0,
  kSkippedNonFinite = 1,   // a loss was not finite: the state is as it was before
  kTargetOutOfBounds = 2,  // updated, but a temperature stopped at a bound
};

enum class BalanceMode : int32_t { kBisect = 0, kSign = 1 };

struct Matrix {  // [N, C], read only
  const void* data;
  int64_t row_stride;
};

struct SoftmaxEntropyArgs {
  DataType dtype;
  int64_t rows, classes;
  Matrix logits;
  const void* temperature;     // acc_t, [N] or [] (stride 0); null: temperature_value
  int64_t temperature_stride;  // 0 or 1
  double temperature_value;
  void* entropy;  // acc_t [N], nats
  void*
      statistics;  // acc_t [2, N]: max z, log sum exp((z - max z) / temperature); null: not wanted
};

struct SoftmaxEntropyBackwardArgs {
  DataType dtype;
  int64_t rows, classes;
  Matrix logits;
  const void* temperature;  // as above
  int64_t temperature_stride;
  double temperature_value;
  const void* entropy;       // acc_t [N]
  const void* statistics;    // acc_t [2, N]
  const void* grad_entropy;  // acc_t [N]; stride 0 for a gradient shared by all rows
  int64_t grad_entropy_stride;
  void* grad_logits;       // [N, C] contiguous, dtype of logits; null: not wanted
  void* grad_temperature;  // acc_t [N], per row; null: not wanted
};

struct BisectTemperatureArgs {
  DataType dtype;
  int64_t rows, classes;
  Matrix logits;
  bool per_sample;                // one temperature a row, else one for the mean entropy
  const void* target_entropy;     // acc_t [] or, per sample, [N]
  int64_t target_entropy_stride;  // 0 or 1
  const void* initial;            // acc_t, as target_entropy; null: estimated
  int64_t initial_stride;
  double low, high;  // bounds of the temperature
  double tolerance;  // nats
  int32_t max_iterations;
  SearchMethod method;
  void* temperature;    // acc_t [] or [N]
  void* entropy;        // acc_t [] or [N]: at that temperature
  void* slope;          // acc_t [] or [N]: d entropy / d log temperature there
  int32_t* status;      // [] or [N]
  int32_t* iterations;  // [] or [N]: entropy evaluations
  void* workspace;      // bisect_temperature_workspace() bytes
};

struct MultiTeacherKLArgs {
  DataType dtype;
  int32_t teachers;  // K
  int64_t rows, classes;
  Matrix student[kMaxTeachers];  // [k] may repeat: one student shared by all teachers
  Matrix teacher[kMaxTeachers];
  const double* temperature;  // [K] or [] (stride 0); null: temperature_value
  int64_t temperature_stride;
  double temperature_value;
  double student_temperature;
  double eps;  // inside log(p + eps)
  void* kl;    // acc_t [K, N], nats
  // acc_t [5, K, N]: student max and log-sum, teacher max and log-sum (as in
  // SoftmaxEntropyArgs), center = sum_j p_j dKL/dp_j; null: not wanted
  void* statistics;
  // If the caller knows dL/dKL beforehand, the kernel writes d L / d student k as well. These
  // arguments are those of MultiTeacherKLBackwardArgs. No student may be shared, and the CPU
  // needs the statistics. coefficient null: no gradients.
  const void* coefficient;
  int64_t coefficient_teacher_stride, coefficient_row_stride;
  void* grad_student[kMaxTeachers];
};

struct MultiTeacherKLBackwardArgs {
  DataType dtype;
  int32_t teachers;
  int64_t rows, classes;
  Matrix student[kMaxTeachers];
  Matrix teacher[kMaxTeachers];
  const double* temperature;
  int64_t temperature_stride;
  double temperature_value;
  double student_temperature;
  double eps;
  const void* statistics;   // acc_t [5, K, N]
  const void* coefficient;  // acc_t [K, N] through the strides: dL/dKL
  int64_t coefficient_teacher_stride, coefficient_row_stride;
  // Gradients are [N, C] contiguous in the dtype of the data; null: not wanted. With a
  // shared student (teacher) only entry 0 is set and holds the sum over k.
  bool student_shared, teacher_shared;
  void* grad_student[kMaxTeachers];
  void* grad_teacher[kMaxTeachers];
  void* grad_temperature;  // acc_t [K, N], per row; null: not wanted
};

// The state of the balance, on the device. [K] unless said otherwise.
struct BalanceState {
  double* temperatures;
  double* weights;
  double* initial_losses;
  double* entropies;
  double* losses;
  const double* temperature_lr;  // []
  const double* weight_lr;       // []
  int64_t* step;                 // [] steps done
  int32_t* status;               // [] a BalanceStatus
};

struct BMTARDLossArgs {
  DataType dtype;
  int32_t teachers;
  int64_t rows, classes;
  Matrix student[kMaxTeachers];
  Matrix teacher[kMaxTeachers];
  BalanceState state;
  bool update;  // false: evaluate with the state as it is
  BalanceMode mode;
  double low, high;  // bounds of the temperatures
  double temperature_momentum;
  double loss_exponent;
  double student_temperature;
  double eps;
  double scale;  // of the sum over rows: 1/(N C) for "mean", 1/N for "batchmean", 1 for "sum"
  double gradient_scale;  // the gradients have it instead
  double tolerance;       // of the temperature search, nats
  int32_t max_iterations;
  void* loss;                        // acc_t []
  void* grad_student[kMaxTeachers];  // [N, C] contiguous: d loss / d student k; null: not wanted
  void* workspace;                   // bmtard_loss_workspace() bytes
};

// buffers *= factor. The kernel reads the factor first; if it is 1, it moves nothing.
struct ScaleArgs {
  DataType dtype;
  int32_t buffers;
  int64_t size;              // of each, contiguous
  void* data[kMaxTeachers];  // overwritten
  const void* factor;        // acc_t []
};

struct PgdStepArgs {
  DataType dtype;
  int64_t samples, sample_size;  // N, D; the three tensors share one dense layout
  void* x_adv;                   // overwritten
  const void* grad;
  const void* x;
  double step_size, epsilon;
  double low, high;  // bounds of a pixel; -inf and +inf: none
  bool l2;           // else linf
};

namespace cpu {

// torch's thread pool, handed in so that the kernels need no header of torch.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain,
                             void (*body)(int64_t begin, int64_t end, void* context),
                             void* context);

// One set of entry points per instruction set, chosen once at run time.
struct Kernels {
  const char* instruction_set;  // "baseline", "avx2", "avx512"
  void (*softmax_entropy)(const SoftmaxEntropyArgs&, ParallelFor);
  void (*softmax_entropy_backward)(const SoftmaxEntropyBackwardArgs&, ParallelFor);
  void (*bisect_temperature)(const BisectTemperatureArgs&, ParallelFor);
  void (*multi_teacher_kl)(const MultiTeacherKLArgs&, ParallelFor);
  void (*multi_teacher_kl_backward)(const MultiTeacherKLBackwardArgs&, ParallelFor);
  void (*bmtard_loss)(const BMTARDLossArgs&, ParallelFor);
  void (*pgd_step)(const PgdStepArgs&, ParallelFor);
  void (*scale)(const ScaleArgs&, ParallelFor);
};

// The best the machine has, or the one that BMTARD_CPU_CAPABILITY names.
const Kernels& kernels();

size_t bisect_temperature_workspace(const BisectTemperatureArgs& args);
size_t bmtard_loss_workspace(const BMTARDLossArgs& args);

}  // namespace cpu

#if defined(BMTARD_CUDA)
namespace cuda {

// Work is queued on `stream` (a cudaStream_t) of the current device; nothing waits for
// it. Each returns a cudaError_t, 0 for success.
int softmax_entropy(const SoftmaxEntropyArgs& args, void* stream);
int softmax_entropy_backward(const SoftmaxEntropyBackwardArgs& args, void* stream);
int bisect_temperature(const BisectTemperatureArgs& args, void* stream);
int multi_teacher_kl(const MultiTeacherKLArgs& args, void* stream);
int multi_teacher_kl_backward(const MultiTeacherKLBackwardArgs& args, void* stream);
int bmtard_loss(const BMTARDLossArgs& args, void* stream);
int pgd_step(const PgdStepArgs& args, void* stream);
int scale(const ScaleArgs& args, void* stream);

size_t bisect_temperature_workspace(const BisectTemperatureArgs& args);
size_t bmtard_loss_workspace(const BMTARDLossArgs& args);

const char* error_string(int error);
const char* architectures();  // those compiled in, as "75;80;90"
int runtime_version();        // of the linked CUDA runtime, as 13000

}  // namespace cuda
#endif

}  // namespace bmtard
