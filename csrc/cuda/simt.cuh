// The primitives of the kernels and launchers. No other file names CUDA's own functions.
// tests/simt implements the same primitives on the CPU, and compiles the same kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "kept.h"

namespace bmtard {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// n neighbouring values that move in one access.
template <typename T, int n>
struct alignas(sizeof(T) * n) Pack {
  T value[n];
};

namespace simt {

constexpr int kWarp = 32;
constexpr uint32_t kFullWarp = 0xffffffffu;

struct Grid {
  int64_t blocks;
  int threads;
  size_t shared_bytes = 0;   // dynamic
  int cluster = 1;           // blocks that run side by side and read each other's shared memory
  bool cooperative = false;  // all blocks run side by side, for grid_barrier()
};

struct Device {
  int multiprocessors = 0;
  size_t max_shared_bytes = 0;  // of a block
  int max_cluster = 1;          // blocks of a cluster, 1: no clusters
  bool cooperative = false;     // whether it takes cooperative grids
};

// The current device. A device is asked once.
Device device();

// The number of blocks of a kernel that a multiprocessor of the current device holds, without
// dynamic shared memory. Asked once for each device and kernel; this loads the kernel and allows it
// all of a block's shared memory. 0 if the driver does not answer.
template <typename Kernel>
int blocks_a_multiprocessor(Kernel* kernel, int threads);

}  // namespace simt
}  // namespace bmtard

#if defined(BMTARD_SIMT_HOST)

#include "simt_host.h"

#else

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <climits>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>

#define BMTARD_DEVICE __device__ __forceinline__
#define BMTARD_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define BMTARD_GRID_CONSTANT __grid_constant__
#define BMTARD_UNROLL _Pragma("unroll")
#define BMTARD_ROLLED _Pragma("unroll 1")

// Declares an array shared by the block. simt::Shared reads and writes it.
#define BMTARD_SHARED(T, name, count)   \
  __shared__ T name##_storage[(count)]; \
  const ::bmtard::simt::Shared<T> name { name##_storage }

namespace bmtard {
namespace simt {

// Shared memory. Between two barriers an element has either readers or one owner.
template <typename T>
struct Shared {
  T* data;

  BMTARD_DEVICE T get(int i) const { return data[i]; }
  // What block `rank` of the cluster wrote before the last cluster_barrier().
  BMTARD_DEVICE T get_from(int rank, int i) const {
#if __CUDA_ARCH__ >= 900
    return *static_cast<const T*>(__cluster_map_shared_rank(data + i, rank));
#else
    return data[i];
#endif
  }
  BMTARD_DEVICE void set(int i, T value) const { data[i] = value; }
  BMTARD_DEVICE T& own(int i) const { return data[i]; }  // read and written by this thread
  // The first n elements, to hand to a function on plain pointers.
  BMTARD_DEVICE const T* read_all(int) const { return data; }
  BMTARD_DEVICE T* own_all(int) const { return data; }
  template <int n>
  BMTARD_DEVICE Pack<T, n> get_pack(int i) const {
    return *reinterpret_cast<const Pack<T, n>*>(data + i);
  }
  template <int n>
  BMTARD_DEVICE void set_pack(int i, const Pack<T, n>& pack) const {
    *reinterpret_cast<Pack<T, n>*>(data + i) = pack;
  }
};

// The launch's dynamic shared memory, aligned to 16 bytes.
template <typename T>
BMTARD_DEVICE Shared<T> dynamic_shared() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_storage[];
  return {reinterpret_cast<T*>(dynamic_shared_storage)};
}

BMTARD_DEVICE int thread_id() { return static_cast<int>(threadIdx.x); }
BMTARD_DEVICE int block_id() { return static_cast<int>(blockIdx.x); }
BMTARD_DEVICE int grid_blocks() { return static_cast<int>(gridDim.x); }

BMTARD_DEVICE int cluster_blocks() {
#if __CUDA_ARCH__ >= 900
  return static_cast<int>(__clusterSizeInBlocks());
#else
  return 1;
#endif
}

BMTARD_DEVICE int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  return static_cast<int>(__clusterRelativeBlockRank());
#else
  return 0;
#endif
}

BMTARD_DEVICE void block_barrier() { __syncthreads(); }

// Also a barrier of each of its blocks. No block may leave before the last read of its
// shared memory by another.
BMTARD_DEVICE void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
#else
  __syncthreads();
#endif
}

// For a cooperative launch. After it, every block sees what any block stored before it.
BMTARD_DEVICE void grid_barrier() { cooperative_groups::this_grid().sync(); }

// The value of the lane whose number differs in the bits of `distance`. All lanes of
// `mask`, and no other, call it together.
template <typename V>
BMTARD_DEVICE V shuffle_xor(uint32_t mask, V value, int distance) {
  return __shfl_xor_sync(mask, value, distance);
}

BMTARD_DEVICE bool any(uint32_t mask, bool predicate) { return __any_sync(mask, predicate) != 0; }

template <typename T>
BMTARD_DEVICE T load(const T* from) {
  __builtin_assume(__isGlobal(from));
  return *from;
}

template <typename T>
BMTARD_DEVICE void store(T* to, T value) {
  __builtin_assume(__isGlobal(to));
  *to = value;
}

// Global memory aligned to the size of the pack.
template <int n, typename T>
BMTARD_DEVICE Pack<T, n> load_pack(const T* from) {
  __builtin_assume(__isGlobal(from));
  return *reinterpret_cast<const Pack<T, n>*>(from);
}

template <int n, typename T>
BMTARD_DEVICE void store_pack(T* to, const Pack<T, n>& pack) {
  // In PTX, because nvcc splits the store of a struct, and may leave it split in a large kernel.
  const size_t address = __cvta_generic_to_global(to);
  if constexpr (sizeof(pack) == 16) {
    uint4 bits;
    memcpy(&bits, &pack, sizeof(bits));
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(bits.x),
                 "r"(bits.y), "r"(bits.z), "r"(bits.w)
                 : "memory");
  } else if constexpr (sizeof(pack) == 8) {
    uint2 bits;
    memcpy(&bits, &pack, sizeof(bits));
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(bits.x), "r"(bits.y)
                 : "memory");
  } else if constexpr (sizeof(pack) == 4) {
    uint32_t bits;
    memcpy(&bits, &pack, sizeof(bits));
    asm volatile("st.global.b32 [%0], %1;" ::"l"(address), "r"(bits) : "memory");
  } else {
    *reinterpret_cast<Pack<T, n>*>(to) = pack;
  }
}

BMTARD_DEVICE double widen(double x) { return x; }
BMTARD_DEVICE float widen(float x) { return x; }
BMTARD_DEVICE float widen(BFloat16 x) { return __bfloat162float(__ushort_as_bfloat16(x.bits)); }
BMTARD_DEVICE float widen(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }

// Rounds to nearest, ties to even.
template <typename T, typename R>
BMTARD_DEVICE T narrow(R x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
  } else if constexpr (std::is_same_v<T, Float16>) {
    return {__half_as_ushort(__float2half_rn(x))};
  } else {
    return x;
  }
}

// -1 if there is none.
inline int current_device() {
  int device = -1;
  if (cudaGetDevice(&device) == cudaSuccess) return device;
  (void)cudaGetLastError();
  return -1;
}

// The number of blocks that a cluster can have on every device with clusters, else 1. It is 1 too
// if the code was compiled for an older architecture.
inline int portable_cluster(int capability) {
  constexpr int kPortable = 8;
  constexpr int kFirst = 900;
  for (const int compiled : {__CUDA_ARCH_LIST__}) {
    if (compiled >= kFirst && compiled <= capability) return kPortable;
  }
  return 1;
}

// While it lives, this thread may ask the driver and load kernels although a graph is being
// captured: none of that is part of the graph.
class OutsideCapture {
 public:
  OutsideCapture() { exchange(); }
  ~OutsideCapture() { exchange(); }
  OutsideCapture(const OutsideCapture&) = delete;
  OutsideCapture& operator=(const OutsideCapture&) = delete;

 private:
  void exchange() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }

  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

inline bool ask_device(int number, Device& device) {
  const OutsideCapture outside;
  int major = 0, minor = 0, shared = 0, cooperative = 0;
  const std::pair<cudaDeviceAttr, int*> questions[] = {
      {cudaDevAttrMultiProcessorCount, &device.multiprocessors},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared},
      {cudaDevAttrComputeCapabilityMajor, &major},
      {cudaDevAttrComputeCapabilityMinor, &minor},
      {cudaDevAttrCooperativeLaunch, &cooperative}};
  for (const auto& [attribute, value] : questions) {
    if (cudaDeviceGetAttribute(value, attribute, number) == cudaSuccess) continue;
    (void)cudaGetLastError();
    device = {};
    return false;
  }
  device.max_shared_bytes = static_cast<size_t>(shared);
  device.max_cluster = portable_cluster(100 * major + 10 * minor);
  device.cooperative = cooperative != 0;
  return true;
}

template <typename Kernel>
bool ask_kernel(Kernel* kernel, int threads, int& blocks) {
  const OutsideCapture outside;
  cudaFuncAttributes attributes = {};
  const auto dynamic = [&] { return device().max_shared_bytes - attributes.sharedSizeBytes; };
  if (cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(dynamic())) == cudaSuccess &&
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0) == cudaSuccess) {
    return true;
  }
  (void)cudaGetLastError();
  blocks = 0;
  return false;
}

constexpr int kInvalidValue = cudaErrorInvalidValue;

template <typename... Parameters, typename... Arguments>
int start(void (*kernel)(Parameters...), const Grid& grid, void* stream, Arguments&&... arguments) {
  if (grid.blocks > INT_MAX) return kInvalidValue;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (grid.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  }
  if (grid.cooperative) {
    cudaLaunchAttribute& cooperative = attributes[config.numAttrs++];
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
  }
  const cudaError_t error =
      cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  // Clears the error that is reported here, so that no later call reports it again.
  if (error != cudaSuccess) (void)cudaGetLastError();
  return error;
}

inline const char* error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

inline int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

inline std::string architectures() {
  std::string names;
  for (const int architecture : {__CUDA_ARCH_LIST__}) {
    names += (names.empty() ? "" : ";") + std::to_string(architecture / 10);
  }
  return names;
}

}  // namespace simt
}  // namespace bmtard

#endif

namespace bmtard {
namespace simt {

// What is kept outlives every thread, so it is not destroyed.
inline Device device() {
  static auto& kept = *new Kept<int, Device>;
  const int number = current_device();
  return kept.get(number, [&](Device& device) { return ask_device(number, device); });
}

template <typename Kernel>
int blocks_a_multiprocessor(Kernel* kernel, int threads) {
  static auto& kept = *new Kept<std::pair<int, Kernel*>, int>;
  return kept.get({current_device(), kernel},
                  [&](int& blocks) { return ask_kernel(kernel, threads, blocks); });
}

// Queues a kernel. Returns an error, 0 for success.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), const Grid& grid, void* stream,
           Arguments&&... arguments) {
  // The launch itself must load nothing: it may be captured.
  (void)blocks_a_multiprocessor(kernel, grid.threads);
  return start(kernel, grid, stream, std::forward<Arguments>(arguments)...);
}

}  // namespace simt
}  // namespace bmtard
