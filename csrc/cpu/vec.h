// SIMD vectors of float and double for the mathematics in core/, on the vector extensions of
// GCC and Clang. Only what those cannot express well (fp16, masked loads) uses intrinsics.
#pragma once

#include <cstdint>
#include <cstring>

#include "../core/common.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

// For loops over vectors that must stay in registers.
#if defined(__clang__)
#define BMTARD_UNROLL _Pragma("unroll")
#else
#define BMTARD_UNROLL _Pragma("GCC unroll 16")
#endif

BMTARD_NAMESPACE_BEGIN

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

typedef float FloatNative __attribute__((vector_size(kVecBytes)));
typedef double DoubleNative __attribute__((vector_size(kVecBytes)));
typedef int32_t FloatBits __attribute__((vector_size(kVecBytes)));
typedef int64_t DoubleBits __attribute__((vector_size(kVecBytes)));
typedef uint32_t WordBits __attribute__((vector_size(kVecBytes)));  // may wrap around

template <typename real>
struct VecTypes {
  using native = FloatNative;
  using native_int = FloatBits;
};
template <>
struct VecTypes<double> {
  using native = DoubleNative;
  using native_int = DoubleBits;
};

template <typename real>
struct Vec {
  static constexpr int size = kVecBytes / static_cast<int>(sizeof(real));
  using scalar = real;
  using native = typename VecTypes<real>::native;
  using native_int = typename VecTypes<real>::native_int;
  struct Mask {
    native_int bits;
  };

  native v;

  Vec() = default;
  BMTARD_HD Vec(native x) : v(x) {}
  BMTARD_HD Vec(real x) : v(x - native{}) {}  // in every lane; x - 0 is x, -0 and NaN too

  friend BMTARD_HD Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  friend BMTARD_HD Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  friend BMTARD_HD Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  friend BMTARD_HD Vec operator/(Vec a, Vec b) { return a.v / b.v; }
  friend BMTARD_HD Vec operator-(Vec a) { return -a.v; }
  friend BMTARD_HD Mask operator<(Vec a, Vec b) { return {a.v < b.v}; }
  friend BMTARD_HD Mask operator>(Vec a, Vec b) { return {a.v > b.v}; }
  friend BMTARD_HD Mask operator==(Vec a, Vec b) { return {a.v == b.v}; }
  friend BMTARD_HD Vec select(Mask m, Vec a, Vec b) { return m.bits ? a.v : b.v; }

  // Bits, for exp and log.
  native_int as_int() const {
    native_int i;
    std::memcpy(&i, &v, sizeof(i));
    return i;
  }
  static Vec from_bits(native_int i) {
    Vec r;
    std::memcpy(&r.v, &i, sizeof(i));
    return r;
  }
};

template <typename real>
BMTARD_HD real reduce_add(Vec<real> x) {
  real part[Vec<real>::size];
  std::memcpy(part, &x.v, sizeof(part));
  for (int width = Vec<real>::size / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  }
  return part[0];
}

// The maximum; a NaN is lost.
template <typename real>
BMTARD_HD real reduce_max(Vec<real> x) {
  real part[Vec<real>::size];
  std::memcpy(part, &x.v, sizeof(part));
  for (int width = Vec<real>::size / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) part[i] = part[i] > part[i + width] ? part[i] : part[i + width];
  }
  return part[0];
}

#if defined(__AVX512F__)
BMTARD_HD float reduce_add(Vec<float> x) { return _mm512_reduce_add_ps((__m512)x.v); }
BMTARD_HD float reduce_max(Vec<float> x) { return _mm512_reduce_max_ps((__m512)x.v); }
#elif defined(__AVX2__)
BMTARD_HD float reduce_add(Vec<float> x) {
  const __m256 y = (__m256)x.v;
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}
BMTARD_HD float reduce_max(Vec<float> x) {
  const __m256 y = (__m256)x.v;
  __m128 h = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  h = _mm_max_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
}
#endif

// a > b ? a : b, so b if either is NaN. Compilers do not turn select() into the max instruction,
// because of NaN; so it is named here.
template <typename real>
BMTARD_HD Vec<real> larger(Vec<real> a, Vec<real> b) {
  return select(a > b, a, b);
}
#if defined(__AVX512F__)
BMTARD_HD Vec<float> larger(Vec<float> a, Vec<float> b) {
  return (Vec<float>::native)_mm512_max_ps((__m512)a.v, (__m512)b.v);
}
#elif defined(__AVX2__)
BMTARD_HD Vec<float> larger(Vec<float> a, Vec<float> b) {
  return (Vec<float>::native)_mm256_max_ps((__m256)a.v, (__m256)b.v);
}
#endif

// That of core/common.h, in one instruction.
BMTARD_HD Vec<float> floor_exponent(Vec<float> u) {
  return larger(Vec<float>(static_cast<float>(kExpFloor)), u);
}

// exp(x) to 1 ulp for x < 89, which covers every logit below its row's maximum; 0 below -87.3
// (no subnormal results, which are slow), NaN for NaN.
// x = n log 2 + r, |r| <= log(2)/2; exp(r) by a minimax polynomial (error 3e-9 relative).
BMTARD_HD Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
  const V shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const V t = x * V(1.4426950408889634f) + shift;
  const V n = t - shift;
  V r = x - n * V(0.693145751953125f);
  r = r - n * V(1.42860677e-6f);
  V p = V(1.381446705932651e-3f);
  p = p * r + V(8.368780411180533e-3f);
  p = p * r + V(4.166839421089387e-2f);
  p = p * r + V(1.666652010781959e-1f);
  p = p * r + V(4.999999341250156e-1f);
  p = p * r + V(1.0f);
  p = p * r + V(1.0f);
  constexpr float lowest = -87.33f;
#if defined(__AVX512F__)
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x.v, _mm512_set1_ps(lowest), _CMP_NLT_UQ);
  return (V::native)_mm512_maskz_scalef_ps(normal, (__m512)p.v, (__m512)n.v);
#else
  // 2^n: the low bits of t are n. The shift moves them into the exponent and drops the others.
  const V scale = V::from_bits((V::native_int)(((WordBits)t.as_int() << 23) + 0x3f800000u));
  return select(x < V(lowest), V(0.0f), p * scale);
#endif
}

// log(x) to 2 ulp for normal x > 0 (probabilities with eps, sums of exponentials); NaN for NaN.
// x = 2^e m, m in [sqrt(1/2), sqrt(2)); log(1 + f) = f - f^2/2 + f^3 P(f) (error 4e-8 relative).
BMTARD_HD Vec<float> log(Vec<float> x) {
  using V = Vec<float>;
  using I = V::native_int;
  const I bits = (I)((WordBits)x.as_int() - 0x3f3504f3u);  // the bits of sqrt(1/2)
  const I exponent = bits >> 23;
  const V f = V::from_bits((bits & 0x007fffff) + 0x3f3504f3) - V(1.0f);
  const V e = __builtin_convertvector(exponent, V::native);
  V p = V(0.08262136543362678f);
  p = p * f + V(-0.14146497277759987f);
  p = p * f + V(0.15002524455780322f);
  p = p * f + V(-0.16594789594599188f);
  p = p * f + V(0.19957139848436325f);
  p = p * f + V(-0.25000770104026676f);
  p = p * f + V(0.33334039622738676f);
  const V ff = f * f;
  const V tail = e * V(1.42860677e-6f) + (f * ff * p - V(0.5f) * ff) + f;
  return select(x == x, tail + e * V(0.693145751953125f), x);
}

// float64 serves as the exact path (gradient checks); libm, lane by lane.
BMTARD_HD Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < Vec<double>::size; ++i) x.v[i] = ::exp(x.v[i]);
  return x;
}
BMTARD_HD Vec<double> log(Vec<double> x) {
  for (int i = 0; i < Vec<double>::size; ++i) x.v[i] = ::log(x.v[i]);
  return x;
}

// --- Element types in memory -----------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Statistics of half types are float.
template <typename scalar>
struct AccumulationOf {
  using type = float;
};
template <>
struct AccumulationOf<double> {
  using type = double;
};
template <typename scalar>
using acc_t = typename AccumulationOf<scalar>::type;

BMTARD_HD Vec<float> load(const float* p) {
  Vec<float> x;
  std::memcpy(&x.v, p, sizeof(x.v));
  return x;
}
BMTARD_HD Vec<double> load(const double* p) {
  Vec<double> x;
  std::memcpy(&x.v, p, sizeof(x.v));
  return x;
}
BMTARD_HD void store(float* p, Vec<float> x) { std::memcpy(p, &x.v, sizeof(x.v)); }
BMTARD_HD void store(double* p, Vec<double> x) { std::memcpy(p, &x.v, sizeof(x.v)); }

// bfloat16 is the upper half of a float, rounded to nearest, ties to even; a NaN keeps its upper
// half and stays quiet.
#if defined(__AVX512F__)
BMTARD_HD Vec<float> load(const BFloat16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Vec<float>::native)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
}
BMTARD_HD __m256i rounded(Vec<float> x) {
  const __m512i bits = (__m512i)x.v;
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __mmask16 is_nan = _mm512_cmp_ps_mask((__m512)x.v, (__m512)x.v, _CMP_UNORD_Q);
  __m512i up = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  up = _mm512_mask_add_epi32(up, odd, bits, _mm512_set1_epi32(0x8000));
  up = _mm512_mask_or_epi32(up, is_nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
}
BMTARD_HD void store(BFloat16* p, Vec<float> x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded(x));
}
#else
typedef uint16_t HalfBits __attribute__((vector_size(kVecBytes / 2)));

BMTARD_HD Vec<float> load(const BFloat16* p) {
  HalfBits h;
  std::memcpy(&h, p, sizeof(h));
  const WordBits w = __builtin_convertvector(h, WordBits) << 16;
  Vec<float> x;
  std::memcpy(&x.v, &w, sizeof(w));
  return x;
}
BMTARD_HD void store(BFloat16* p, Vec<float> x) {
  WordBits w;
  std::memcpy(&w, &x.v, sizeof(w));
  const WordBits up = w + 0x7fff + ((w >> 16) & 1);
  const auto is_nan = x.v != x.v;
  const HalfBits h = __builtin_convertvector((is_nan ? w | 0x400000 : up) >> 16, HalfBits);
  std::memcpy(p, &h, sizeof(h));
}
#endif

#if defined(__AVX512F__)
BMTARD_HD Vec<float> load(const Float16* p) {
  return (Vec<float>::native)_mm512_cvtph_ps(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
BMTARD_HD void store(Float16* p, Vec<float> x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)x.v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
BMTARD_HD Vec<float> load(const Float16* p) {
  return (Vec<float>::native)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
BMTARD_HD void store(Float16* p, Vec<float> x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)x.v, _MM_FROUND_TO_NEAREST_INT));
}
#else
BMTARD_HD float to_float(Float16 h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000) << 16;
  const uint32_t magnitude = h.bits & 0x7fff;
  uint32_t bits;
  if (magnitude >= 0x7c00) {  // infinity, NaN
    bits = sign | 0x7f800000 | (magnitude & 0x3ff) << 13;
  } else if (magnitude >= 0x400) {
    bits = sign | ((magnitude << 13) + 0x38000000);
  } else {  // subnormal: exact in float
    const float value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // 2^-24
    std::memcpy(&bits, &value, sizeof(bits));
    bits |= sign;
  }
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
BMTARD_HD Float16 to_float16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (bits >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds to infinity
  if (bits <
      0x38800000) {  // subnormal: adding 0.5 leaves the rounded 2^-24 multiple in the low bits
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof(bits));
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof(bits));
    return {static_cast<uint16_t>(sign | (bits - 0x3f000000))};
  }
  bits += 0xfff + (bits >> 13 & 1);
  return {static_cast<uint16_t>(sign | ((bits - 0x38000000) >> 13))};
}
BMTARD_HD Vec<float> load(const Float16* p) {
  Vec<float> x;
  for (int i = 0; i < Vec<float>::size; ++i) x.v[i] = to_float(p[i]);
  return x;
}
BMTARD_HD void store(Float16* p, Vec<float> x) {
  for (int i = 0; i < Vec<float>::size; ++i) p[i] = to_float16(x.v[i]);
}
#endif

// Copies n < size elements in powers of two: a call of memcpy() would cost more than the rest.
template <int size, typename scalar>
BMTARD_HD void copy_first(scalar* to, const scalar* from, int n) {
  int done = 0;
  for (int width = size / 2; width > 0; width /= 2) {
    if (n & width) {
      for (int i = 0; i < width; ++i) to[done + i] = from[done + i];
      done += width;
    }
  }
}

// The first n < size elements; the other lanes are `fill`.
template <typename scalar>
BMTARD_HD Vec<acc_t<scalar>> load_partial(const scalar* p, int n, acc_t<scalar> fill) {
  using V = Vec<acc_t<scalar>>;
  scalar buffer[V::size] = {};
  copy_first<V::size>(buffer, p, n);
  V x = load(buffer);
  for (int i = 0; i < V::size; ++i) x.v[i] = i < n ? x.v[i] : fill;
  return x;
}
template <typename scalar>
BMTARD_HD void store_partial(scalar* p, int n, Vec<acc_t<scalar>> x) {
  constexpr int size = Vec<acc_t<scalar>>::size;
  scalar buffer[size];
  store(buffer, x);
  copy_first<size>(p, buffer, n);
}

#if defined(__AVX512F__)
BMTARD_HD __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }
BMTARD_HD Vec<float> load_partial(const float* p, int n, float fill) {
  return (Vec<float>::native)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first_lanes(n), p);
}
BMTARD_HD void store_partial(float* p, int n, Vec<float> x) {
  _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)x.v);
}
BMTARD_HD Vec<float> load_partial(const BFloat16* p, int n, float fill) {
  const __m512i w =
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), p)), 16);
  return (Vec<float>::native)_mm512_mask_mov_ps(_mm512_set1_ps(fill), first_lanes(n),
                                                _mm512_castsi512_ps(w));
}
BMTARD_HD Vec<float> load_partial(const Float16* p, int n, float fill) {
  return (Vec<float>::native)_mm512_mask_cvtph_ps(_mm512_set1_ps(fill), first_lanes(n),
                                                  _mm256_maskz_loadu_epi16(first_lanes(n), p));
}
BMTARD_HD void store_partial(BFloat16* p, int n, Vec<float> x) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), rounded(x));
}
BMTARD_HD void store_partial(Float16* p, int n, Vec<float> x) {
  _mm256_mask_storeu_epi16(p, first_lanes(n),
                           _mm512_cvtps_ph((__m512)x.v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
BMTARD_HD __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
BMTARD_HD Vec<float> load_partial(const float* p, int n, float fill) {
  const __m256i lanes = first_lanes(n);
  return (Vec<float>::native)_mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, lanes),
                                              _mm256_castsi256_ps(lanes));
}
BMTARD_HD void store_partial(float* p, int n, Vec<float> x) {
  _mm256_maskstore_ps(p, first_lanes(n), (__m256)x.v);
}
#endif

// --- Transposition ---------------------------------------------------------------------------

template <int... lane>
struct Lanes {};
template <int n, int... lane>
struct FirstLanes : FirstLanes<n - 1, n - 1, lane...> {};
template <int... lane>
struct FirstLanes<0, lane...> {
  using type = Lanes<lane...>;
};

// a0 b0 a1 b1 ..., from lane `start` of both on.
template <int start, typename real, int... lane>
BMTARD_HD Vec<real> interleave(Vec<real> a, Vec<real> b, Lanes<lane...>) {
  constexpr int size = sizeof...(lane);
#if defined(__clang__)
  return __builtin_shufflevector(a.v, b.v, (start + lane / 2 + lane % 2 * size)...);
#else
  using Order = typename Vec<real>::native_int;
  return __builtin_shuffle(a.v, b.v, Order{(start + lane / 2 + lane % 2 * size)...});
#endif
}

// Lane i of rows[j] becomes lane j of rows[i]. Each round turns the bits of (row, lane), taken as
// one number, by one place; after log2(size) rounds the two have changed places.
template <typename real>
BMTARD_HD void transpose(Vec<real> (&rows)[Vec<real>::size]) {
  constexpr int size = Vec<real>::size;
  using Order = typename FirstLanes<size>::type;
  BMTARD_UNROLL
  for (int round = 1; round < size; round *= 2) {
    Vec<real> turned[size];
    BMTARD_UNROLL
    for (int i = 0; i < size / 2; ++i) {
      turned[2 * i] = interleave<0>(rows[i], rows[i + size / 2], Order{});
      turned[2 * i + 1] = interleave<size / 2>(rows[i], rows[i + size / 2], Order{});
    }
    BMTARD_UNROLL
    for (int i = 0; i < size; ++i) rows[i] = turned[i];
  }
}

BMTARD_NAMESPACE_END
