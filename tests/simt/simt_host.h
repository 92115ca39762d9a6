// The primitives of csrc/cuda/simt.cuh on the CPU.
//
// Every thread is a fiber that runs until its next collective (shuffle, vote, barrier). The
// blocks of a cluster run side by side, as do all blocks of a cooperative grid; others one
// after the other. Between two collectives the threads run in an order that a seed chooses,
// so what a kernel gets wrong about its barriers shows in its results. What the hardware
// leaves undefined is a Fault: a lane named in a mask that does not come, a thread that
// leaves while others wait, two threads at different barriers, a misaligned vector
// access, shared memory read before it is written, or read by another block after its own
// block has begun to leave, and memory, shared or global, that one thread writes and another
// touches without a barrier between them. Global memory is seen where a kernel reaches it by
// load(), store() and the like.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define BMTARD_DEVICE inline
#define BMTARD_KERNEL(threads) void
#define BMTARD_GRID_CONSTANT
#define BMTARD_UNROLL
#define BMTARD_ROLLED

// As static __shared__ memory: one array a block for each place in the code.
#define BMTARD_SHARED(T, name, count)                                             \
  static const char name##_key = 0;                                               \
  const ::bmtard::simt::Shared<T> name {                                          \
    ::bmtard::simt::host::shared_array(&name##_key, sizeof(T), (count), __LINE__) \
  }

namespace bmtard {
namespace simt {
namespace host {

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Settings {
  uint64_t seed = 0;  // 0: threads and blocks in ascending order
  int multiprocessors = 3;
  size_t max_shared_bytes = 16 * 1024;
  int max_cluster = 1;  // as on devices without clusters
  bool cooperative = true;
  int blocks_a_multiprocessor = 2;
  int device = 0;                                              // its number
  bool refuses_clusters = false, refuses_cooperative = false;  // whatever the device says
};

struct Counters {
  int64_t launches = 0;
  int64_t blocks = 0;
  int64_t barriers = 0;
  int64_t shared_bytes = 0;
  int64_t remote_accesses = 0;  // to the shared memory of another block
  int64_t packed_bytes = 0;     // of global memory, in accesses of several values
  int64_t single_bytes = 0;     // in accesses of one
  int64_t device_questions = 0, kernel_questions = 0;
};

extern Settings settings;
extern Counters counters;

// Where the running thread is.
struct Position {
  int thread = 0;
  int block = 0;
  int grid_blocks = 0;
  int cluster_blocks = 1;
};
extern Position position;

// An array in the shared memory of a block, with the last accesses to each element. Epochs
// count the barriers of the block from 1, rounds those of the cluster; 0 is never.
class SharedArray {
 public:
  SharedArray(size_t element_bytes, int count, int line);
  void* at(int i, int n, bool write);  // checks an access to elements i .. i + n - 1
  const void* remote(int i);           // checks that another block reads element i
  void clear();
  size_t bytes() const { return element_bytes_ * access_.size(); }

 private:
  struct Access {
    uint32_t written, read;
    int writer, reader;  // reader -1: several
    uint32_t round_written, round_read_remotely;
  };
  [[noreturn]] void race(int i, const char* what, const std::string& other) const;
  void check_range(int i, int n) const;

  size_t element_bytes_;
  int line_;
  std::vector<Access> access_;
  std::vector<unsigned char> storage_;
  unsigned char* data_;
};

SharedArray* shared_array(const void* key, size_t element_bytes, int count, int line);
SharedArray* dynamic_shared_array(size_t element_bytes);
// The same array in the shared memory of block `rank` of the cluster.
SharedArray* array_of_rank(const SharedArray* mine, int rank);

enum class Operation { kExchange, kAny };
enum class Scope { kBlock, kCluster, kGrid };

// Hands `bytes` over between the lanes of `mask`, which must all come.
void exchange(uint32_t mask, int source_lane, const void* in, void* out, size_t bytes,
              const char* file, int line);
bool vote_any(uint32_t mask, bool predicate, const char* file, int line);
void barrier(Scope scope, const char* file, int line);
void check_alignment(const void* address, size_t bytes);
// Notes an access to global memory, and checks it against those before it in this launch.
void global_access(const void* address, size_t bytes, bool write);
// Under AddressSanitizer: whoever touches these bytes ends the process with a report.
void forbid(const void* from, size_t bytes);
bool sanitized();
// Whether the kernel may have more shared memory than any kernel on the device.
bool allows_shared(const void* kernel);
void allow_shared(const void* kernel);
void run(const Grid& grid, const std::function<void()>& thread_body);

}  // namespace host

template <typename T>
struct Shared {
  host::SharedArray* array;

  T get(int i) const { return *static_cast<const T*>(array->at(i, 1, false)); }
  T get_from(int rank, int i) const {
    return *static_cast<const T*>(host::array_of_rank(array, rank)->remote(i));
  }
  void set(int i, T value) const { *static_cast<T*>(array->at(i, 1, true)) = value; }
  T& own(int i) const { return *static_cast<T*>(array->at(i, 1, true)); }
  const T* read_all(int n) const { return static_cast<const T*>(array->at(0, n, false)); }
  T* own_all(int n) const { return static_cast<T*>(array->at(0, n, true)); }
  template <int n>
  Pack<T, n> get_pack(int i) const {
    const void* from = array->at(i, n, false);
    host::check_alignment(from, sizeof(Pack<T, n>));
    return *static_cast<const Pack<T, n>*>(from);
  }
  template <int n>
  void set_pack(int i, const Pack<T, n>& pack) const {
    void* to = array->at(i, n, true);
    host::check_alignment(to, sizeof(Pack<T, n>));
    *static_cast<Pack<T, n>*>(to) = pack;
  }
};

template <typename T>
Shared<T> dynamic_shared() {
  return {host::dynamic_shared_array(sizeof(T))};
}

inline int thread_id() { return host::position.thread; }
inline int block_id() { return host::position.block; }
inline int grid_blocks() { return host::position.grid_blocks; }
inline int cluster_blocks() { return host::position.cluster_blocks; }
inline int cluster_rank() { return block_id() % cluster_blocks(); }

inline void block_barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host::barrier(host::Scope::kBlock, file, line);
}

inline void cluster_barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host::barrier(host::Scope::kCluster, file, line);
}

inline void grid_barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host::barrier(host::Scope::kGrid, file, line);
}

template <typename V>
V shuffle_xor(uint32_t mask, V value, int distance, const char* file = __builtin_FILE(),
              int line = __builtin_LINE()) {
  V out;
  host::exchange(mask, (thread_id() % kWarp) ^ distance, &value, &out, sizeof(V), file, line);
  return out;
}

inline bool any(uint32_t mask, bool predicate, const char* file = __builtin_FILE(),
                int line = __builtin_LINE()) {
  return host::vote_any(mask, predicate, file, line);
}

template <typename T>
T load(const T* from) {
  host::check_alignment(from, alignof(T));
  host::counters.single_bytes += sizeof(T);
  host::global_access(from, sizeof(T), false);
  return *from;
}

template <typename T>
void store(T* to, T value) {
  host::check_alignment(to, alignof(T));
  host::counters.single_bytes += sizeof(T);
  host::global_access(to, sizeof(T), true);
  *to = value;
}

template <int n, typename T>
Pack<T, n> load_pack(const T* from) {
  host::check_alignment(from, sizeof(Pack<T, n>));
  host::counters.packed_bytes += sizeof(Pack<T, n>);
  host::global_access(from, sizeof(Pack<T, n>), false);
  return *reinterpret_cast<const Pack<T, n>*>(from);
}

template <int n, typename T>
void store_pack(T* to, const Pack<T, n>& pack) {
  host::check_alignment(to, sizeof(Pack<T, n>));
  host::counters.packed_bytes += sizeof(Pack<T, n>);
  host::global_access(to, sizeof(Pack<T, n>), true);
  *reinterpret_cast<Pack<T, n>*>(to) = pack;
}

inline double widen(double x) { return x; }
inline float widen(float x) { return x; }
inline float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}
float widen(Float16 x);

BFloat16 to_bfloat16(float x);
Float16 to_float16(float x);

template <typename T, typename R>
T narrow(R x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return to_bfloat16(x);
  } else if constexpr (std::is_same_v<T, Float16>) {
    return to_float16(x);
  } else {
    return x;
  }
}

inline int current_device() { return host::settings.device; }

inline bool ask_device(int, Device& device) {
  ++host::counters.device_questions;
  device = {host::settings.multiprocessors, host::settings.max_shared_bytes,
            host::settings.max_cluster, host::settings.cooperative};
  return true;
}

template <typename Kernel>
bool ask_kernel(Kernel* kernel, int, int& blocks) {
  ++host::counters.kernel_questions;
  host::allow_shared(reinterpret_cast<const void*>(kernel));
  blocks = host::settings.blocks_a_multiprocessor;
  return true;
}

constexpr int kInvalidValue = 1;
constexpr int kRefused = 2;

// Runs the grid to its end: a stream in which everything has been waited for.
template <typename... Parameters, typename... Arguments>
int start(void (*kernel)(Parameters...), const Grid& grid, void*, Arguments&&... arguments) {
  constexpr size_t kAlwaysAllowed = 48 * 1024;
  const host::Settings& device = host::settings;
  if (grid.blocks < 1 || grid.blocks > INT32_MAX || grid.threads < 1 || grid.threads > 1024 ||
      grid.shared_bytes > device.max_shared_bytes || grid.cluster < 1 ||
      grid.cluster > device.max_cluster || grid.blocks % grid.cluster != 0 ||
      (grid.cooperative && grid.blocks > device.multiprocessors * device.blocks_a_multiprocessor) ||
      (grid.shared_bytes > kAlwaysAllowed &&
       !host::allows_shared(reinterpret_cast<const void*>(kernel)))) {
    return kInvalidValue;
  }
  if (grid.cooperative && device.refuses_cooperative) return kRefused;
  if (grid.cluster > 1 && device.refuses_clusters) return kRefused;
  host::run(grid, [&] { kernel(arguments...); });
  return 0;
}

inline const char* error_string(int error) {
  return error == 0 ? "no error" : error == kRefused ? "refused" : "invalid value";
}
inline int runtime_version() { return 0; }
inline std::string architectures() { return "cpu"; }

}  // namespace simt
}  // namespace bmtard
