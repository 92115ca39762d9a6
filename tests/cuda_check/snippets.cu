// What snippets.ptxas and snippets.sass are made of, with nvcc 13.0: the reports of -Xptxas=-v
// for sm_90, and cuobjdump --dump-sass without the encodings.
namespace {

template <typename T, int lanes, int threads, int values>
struct Shape;
using Row = Shape<float, 256, 256, 0>;

// Four neighbours in one access where packed, else one by one.
__device__ __forceinline__ void get(float (&v)[4], const float* row, int classes, int first,
                                    bool packed) {
  if (packed && first + 4 <= classes) {
    const float4 pack = *reinterpret_cast<const float4*>(row + first);
    v[0] = pack.x, v[1] = pack.y, v[2] = pack.z, v[3] = pack.w;
  } else {
    for (int i = 0; i < 4; ++i) {
      const int j = packed ? first + i : first + 8 * i;
      v[i] = j < classes ? row[j] : 0;
    }
  }
}

__device__ __forceinline__ void put(const float (&v)[4], float* row, int classes, int first,
                                    bool packed) {
  if (packed && first + 4 <= classes) {
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(row + first), "f"(v[0]),
                 "f"(v[1]), "f"(v[2]), "f"(v[3])
                 : "memory");
  } else {
    for (int i = 0; i < 4; ++i) {
      const int j = packed ? first + i : first + 8 * i;
      if (j < classes) row[j] = v[i];
    }
  }
}

__device__ __forceinline__ void add(const float* x, const float* z, float* y, int classes,
                                    bool packed_x, bool packed_z, bool packed_y) {
  for (int tile = 0; tile * 1024 < classes; ++tile) {
    const int first = tile * 1024 + threadIdx.x * 4;
    float a[4], b[4];
    get(a, x, classes, first, packed_x);
    get(b, z, classes, first, packed_z);
    for (int i = 0; i < 4; ++i) a[i] += b[i];
    put(a, y, classes, first, packed_y);
  }
}

template <typename S>
__global__ void __launch_bounds__(256, 1)
    wide_kernel(const float* __restrict__ x, const float* __restrict__ z, float* __restrict__ y,
                int classes, bool packed) {
  add(x, z, y, classes, packed, packed, packed);
}

// One of two rows is read one by one.
template <typename S>
__global__ void __launch_bounds__(256, 1)
    one_scalar_kernel(const float* __restrict__ x, const float* __restrict__ z,
                      float* __restrict__ y, int classes, bool packed) {
  add(x, z, y, classes, packed, false, packed);
}

template <typename S>
__global__ void __launch_bounds__(256, 1)
    scalar_kernel(const float* __restrict__ x, const float* __restrict__ z, float* __restrict__ y,
                  int classes) {
  add(x, z, y, classes, false, false, false);
}

// An array that is indexed at run time.
template <typename S>
__global__ void __launch_bounds__(256, 1)
    local_kernel(const float* __restrict__ x, float* __restrict__ y, const int* at) {
  float v[16];
  for (int i = 0; i < 16; ++i) v[i] = x[threadIdx.x + 256 * i];
  for (int i = 0; i < 16; ++i) y[threadIdx.x + 256 * i] = v[at[i]];
}

// More values than registers.
template <typename S>
__global__ void __launch_bounds__(1024, 2)
    spilling_kernel(const float* __restrict__ x, float* __restrict__ y, int turns) {
  float v[48];
#pragma unroll
  for (int i = 0; i < 48; ++i) v[i] = x[threadIdx.x + 1024 * i];
  for (int n = 0; n < turns; ++n) {
#pragma unroll
    for (int i = 0; i < 48; ++i) v[i] = v[i] * v[(i + 1) % 48] + v[(i + 7) % 48];
  }
#pragma unroll
  for (int i = 0; i < 48; ++i) y[threadIdx.x + 1024 * i] = v[i];
}

}  // namespace

void launch(float* a, int n, bool packed, const int* at) {
  wide_kernel<Row><<<1, 256>>>(a, a, a, n, packed);
  one_scalar_kernel<Row><<<1, 256>>>(a, a, a, n, packed);
  scalar_kernel<Row><<<1, 256>>>(a, a, a, n);
  local_kernel<Row><<<1, 256>>>(a, a, at);
  spilling_kernel<Row><<<1, 256>>>(a, a, n);
}
