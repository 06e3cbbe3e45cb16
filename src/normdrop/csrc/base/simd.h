// Vectors for the kernels, in the compiler's own vector extension: one source for SSE2, AVX2,
// AVX-512 and NEON. Intrinsics only where the extension has no word for it.
//
// How elements of a type come into them is in lanes.h.

#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) || defined(_M_X64)
// GCC 12 warns of its own header's deliberately undefined vectors (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Of functions, methods and lambdas: no copy of them may be left for the linker to choose from.
#define NORMDROP_INLINE static inline __attribute__((always_inline))
#define NORMDROP_METHOD inline __attribute__((always_inline))
#define NORMDROP_LAMBDA __attribute__((always_inline))

// Of the loop that follows: arrays of vectors become registers.
#if defined(__clang__)
#define NORMDROP_UNROLL _Pragma("unroll")
#else
#define NORMDROP_UNROLL _Pragma("GCC unroll 16")
#endif

namespace normdrop::NORMDROP_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kFloats = kVectorBytes / 4;
constexpr int kDoubles = kVectorBytes / 8;

typedef float F32 __attribute__((vector_size(kVectorBytes)));
typedef double F64 __attribute__((vector_size(kVectorBytes)));
typedef int32_t I32 __attribute__((vector_size(kVectorBytes)));
typedef int64_t I64 __attribute__((vector_size(kVectorBytes)));
typedef uint32_t U32 __attribute__((vector_size(kVectorBytes)));
typedef uint64_t U64 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t U16 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t U16Half __attribute__((vector_size(kVectorBytes / 2)));
typedef float F32Half __attribute__((vector_size(kVectorBytes / 2)));

// ---- any vector -------------------------------------------------------------------------------

template <class V>
NORMDROP_INLINE V load_vector(const void* from) {
  V v;
  memcpy(&v, from, sizeof(V));
  return v;
}

template <class V>
NORMDROP_INLINE void store_vector(void* to, V v) {
  memcpy(to, &v, sizeof(V));
}

// Past the cache: `to` must be aligned to the vector. Follow with stream_fence.
template <class V>
NORMDROP_INLINE void stream_vector(void* to, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) {
    _mm512_stream_si512((__m512i*)to, (__m512i)v);
    return;
  }
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) {
    _mm256_stream_si256((__m256i*)to, (__m256i)v);
    return;
  }
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(V) == 16) {
    _mm_stream_si128((__m128i*)to, (__m128i)v);
    return;
  }
#endif
  memcpy(to, &v, sizeof(V));
}

NORMDROP_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// All lanes the same.
template <class V, class Scalar>
NORMDROP_INLINE V splat(Scalar value) {
  return V{} + (decltype(V{}[0] + V{}[0]))value;
}

// a where the mask (0 or -1 a lane) is set, b elsewhere.
NORMDROP_INLINE F32 select(I32 mask, F32 a, F32 b) {
  return (F32)((mask & (I32)a) | (~mask & (I32)b));
}
NORMDROP_INLINE F64 select(I64 mask, F64 a, F64 b) {
  return (F64)((mask & (I64)a) | (~mask & (I64)b));
}
NORMDROP_INLINE F32 keep_where(I32 mask, F32 a) { return (F32)(mask & (I32)a); }
NORMDROP_INLINE F64 keep_where(I64 mask, F64 a) { return (F64)(mask & (I64)a); }

template <class Mask>
NORMDROP_INLINE Mask lane_numbers() {
  Mask lanes{};
  for (int i = 0; i < (int)(sizeof(Mask) / sizeof(lanes[0])); ++i) {
    lanes[i] = i;
  }
  return lanes;
}

template <class Mask>
NORMDROP_INLINE Mask first_lanes(int64_t n) {
  return (Mask)(lane_numbers<Mask>() < splat<Mask>(n));
}

// One bit a lane, and back.
NORMDROP_INLINE uint32_t bits_of(I32 mask) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return (uint32_t)_mm256_movemask_ps((__m256)mask);
#elif defined(__SSE2__)
  return (uint32_t)_mm_movemask_ps((__m128)mask);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kFloats; ++i) {
    bits |= (uint32_t)(mask[i] & 1) << i;
  }
  return bits;
#endif
}

NORMDROP_INLINE uint32_t bits_of(I64 mask) {
#if defined(__AVX512DQ__)
  return _mm512_movepi64_mask((__m512i)mask);
#elif defined(__AVX2__)
  return (uint32_t)_mm256_movemask_pd((__m256d)mask);
#elif defined(__SSE2__)
  return (uint32_t)_mm_movemask_pd((__m128d)mask);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kDoubles; ++i) {
    bits |= (uint32_t)(mask[i] & 1) << i;
  }
  return bits;
#endif
}

template <class Mask>
NORMDROP_INLINE Mask mask_of(uint32_t bits) {
  const Mask weights = splat<Mask>(1) << lane_numbers<Mask>();
  return (Mask)((splat<Mask>(bits) & weights) == weights);
}

// Which lanes of a V: a register of bits where the processor has one, else a vector of masks.
template <class V>
struct Choice;

#if defined(__AVX512DQ__)
// Else GCC makes one masked load of a load and a choice, which waits for what is compared: the two
// misses of the cache follow each other, and the sums of the gradients took 1.4 times as long.
template <class V>
NORMDROP_INLINE void in_register(V& v) {
  asm("" : "+v"(v));
}

template <>
struct Choice<F32> {
  __mmask16 lanes;
  static NORMDROP_METHOD Choice not_above_zero(F32 v) {
    return {_mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_LE_OQ)};
  }
  static NORMDROP_METHOD Choice of_bits(uint32_t bits) { return {(__mmask16)bits}; }
  NORMDROP_METHOD uint32_t bits() const { return lanes; }
  NORMDROP_METHOD Choice others() const { return {(__mmask16)~lanes}; }
  NORMDROP_METHOD F32 keep(F32 a) const {
    in_register(a);
    return (F32)_mm512_maskz_mov_ps(lanes, (__m512)a);
  }
  NORMDROP_METHOD F32 pick(F32 a, F32 b) const {
    in_register(b);
    return (F32)_mm512_mask_mov_ps((__m512)b, lanes, (__m512)a);
  }
};
template <>
struct Choice<F64> {
  __mmask8 lanes;
  static NORMDROP_METHOD Choice not_above_zero(F64 v) {
    return {_mm512_cmp_pd_mask((__m512d)v, _mm512_setzero_pd(), _CMP_LE_OQ)};
  }
  static NORMDROP_METHOD Choice of_bits(uint32_t bits) { return {(__mmask8)bits}; }
  NORMDROP_METHOD uint32_t bits() const { return lanes; }
  NORMDROP_METHOD Choice others() const { return {(__mmask8)~lanes}; }
  NORMDROP_METHOD F64 keep(F64 a) const {
    in_register(a);
    return (F64)_mm512_maskz_mov_pd(lanes, (__m512d)a);
  }
  NORMDROP_METHOD F64 pick(F64 a, F64 b) const {
    in_register(b);
    return (F64)_mm512_mask_mov_pd((__m512d)b, lanes, (__m512d)a);
  }
};
#else
template <class V, class Mask>
struct ChoiceOfMasks {
  Mask lanes;
  static NORMDROP_METHOD Choice<V> not_above_zero(V v) { return {{(Mask)(v <= V{})}}; }
  static NORMDROP_METHOD Choice<V> of_bits(uint32_t bits) { return {{mask_of<Mask>(bits)}}; }
  NORMDROP_METHOD uint32_t bits() const { return bits_of(lanes); }
  NORMDROP_METHOD Choice<V> others() const { return {{~lanes}}; }
  NORMDROP_METHOD V keep(V a) const { return keep_where(lanes, a); }
  NORMDROP_METHOD V pick(V a, V b) const { return select(lanes, a, b); }
};
template <>
struct Choice<F32> : ChoiceOfMasks<F32, I32> {};
template <>
struct Choice<F64> : ChoiceOfMasks<F64, I64> {};
#endif

NORMDROP_INLINE double sum_of(F32 v) {
  double sum = 0.0;
  for (int i = 0; i < kFloats; i += 4) {
    sum += ((double)v[i] + (double)v[i + 1]) + ((double)v[i + 2] + (double)v[i + 3]);
  }
  return sum;
}

NORMDROP_INLINE double sum_of(F64 v) {
  double sum = 0.0;
  for (int i = 0; i < kDoubles; i += 2) {
    sum += v[i] + v[i + 1];
  }
  return sum;
}

NORMDROP_INLINE F32 fma(F32 a, F32 b, F32 c) {
#if defined(__AVX512F__)
  return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (F32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (F32)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

NORMDROP_INLINE F64 fma(F64 a, F64 b, F64 c) {
#if defined(__AVX512F__)
  return (F64)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (F64)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
  return (F64)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

NORMDROP_INLINE F64 sqrt_of(F64 v) {
#if defined(__AVX512F__)
  return (F64)_mm512_sqrt_pd((__m512d)v);
#elif defined(__AVX2__)
  return (F64)_mm256_sqrt_pd((__m256d)v);
#elif defined(__SSE2__)
  return (F64)_mm_sqrt_pd((__m128d)v);
#else
  for (int i = 0; i < kDoubles; ++i) {
    v[i] = __builtin_sqrt(v[i]);
  }
  return v;
#endif
}

// The same for one element: what is not a whole vector rounds as what is.
NORMDROP_INLINE float fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

NORMDROP_INLINE double fma(double a, double b, double c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// Some elements in double.
NORMDROP_INLINE F64 load_doubles(const double* p) { return load_vector<F64>(p); }
NORMDROP_INLINE F64 load_doubles(const float* p) {
  return __builtin_convertvector(load_vector<F32Half>(p), F64);
}
NORMDROP_INLINE void store_doubles(double* p, F64 v) { store_vector(p, v); }
NORMDROP_INLINE void store_doubles(float* p, F64 v) {
  store_vector(p, __builtin_convertvector(v, F32Half));
}

}  // namespace
}  // namespace normdrop::NORMDROP_ISA
