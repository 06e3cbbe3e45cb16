// Vectors for the kernels, in the compiler's own vector extension: one source for SSE2, AVX2,
// AVX-512 and NEON. Intrinsics only where the extension has no word for it.
//
// float, bfloat16 and half are computed in float, double in double: Lanes<T>::V is the vector in
// which T is computed, Lanes<T>::width its number of elements.

#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define NORMDROP_INLINE static inline __attribute__((always_inline))

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

// may_alias and alignment 1: loads and stores need not be aligned.
typedef float F32 __attribute__((vector_size(kVectorBytes)));
typedef double F64 __attribute__((vector_size(kVectorBytes)));
typedef int32_t I32 __attribute__((vector_size(kVectorBytes)));
typedef int64_t I64 __attribute__((vector_size(kVectorBytes)));
typedef uint32_t U32 __attribute__((vector_size(kVectorBytes)));
typedef uint64_t U64 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t U16 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t U16Half __attribute__((vector_size(kVectorBytes / 2)));
typedef float F32Half __attribute__((vector_size(kVectorBytes / 2)));

struct bfloat16 {
  uint16_t bits;
};
struct half {
  uint16_t bits;
};

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

// ---- 16-bit types, rounding to nearest even ----------------------------------------------------

NORMDROP_INLINE F32 widen(U16Half bits, bfloat16) {
  return (F32)(__builtin_convertvector(bits, U32) << 16);
}

NORMDROP_INLINE U16Half narrow(F32 v, bfloat16) {
  const U32 bits = (U32)v;
  const U32 rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const U32 nan = (U32)(v != v);
  return __builtin_convertvector((nan & 0x7FC0) | (~nan & rounded), U16Half);
}

#if !defined(__F16C__) && !defined(__aarch64__)
NORMDROP_INLINE float half_to_float(uint16_t h) {
  // The exponent moves by 112; the multiplication makes subnormal numbers right.
  uint32_t bits = (uint32_t)(h & 0x7FFF) << 13;
  if ((h & 0x7C00) == 0x7C00) {
    bits |= 0x7F800000;
    bits |= (h & 0x3FF) != 0 ? 0x400000 : 0;
  }
  float f;
  memcpy(&f, &bits, 4);
  if ((h & 0x7C00) != 0x7C00) {
    f *= 0x1p112f;
  }
  memcpy(&bits, &f, 4);
  bits |= (uint32_t)(h & 0x8000) << 16;
  memcpy(&f, &bits, 4);
  return f;
}

NORMDROP_INLINE uint16_t float_to_half(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7FFFFFFF;
  if (bits > 0x7F800000) {
    return (uint16_t)(sign | 0x7E00);
  }
  if (bits >= 0x477FF000) {  // 65520 and above round to infinity
    return (uint16_t)(sign | 0x7C00);
  }
  if (bits < 0x38800000) {  // subnormal in half: let the addition round
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    memcpy(&bits, &magnitude, 4);
    return (uint16_t)(sign | (bits - 0x3F000000));
  }
  bits += 0xFFF + ((bits >> 13) & 1);
  return (uint16_t)(sign | ((bits - 0x38000000) >> 13));
}
#endif

NORMDROP_INLINE F32 widen(U16Half bits, half) {
#if defined(__AVX512F__)
  return (F32)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__)
  return (F32)_mm256_cvtph_ps((__m128i)bits);
#elif defined(__aarch64__)
  return (F32)vcvt_f32_f16((float16x4_t)bits);
#else
  F32 v;
  for (int i = 0; i < kFloats; ++i) {
    v[i] = half_to_float(bits[i]);
  }
  return v;
#endif
}

NORMDROP_INLINE U16Half narrow(F32 v, half) {
#if defined(__AVX512F__)
  return (U16Half)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (U16Half)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  return (U16Half)vcvt_f16_f32((float32x4_t)v);
#else
  U16Half bits;
  for (int i = 0; i < kFloats; ++i) {
    bits[i] = float_to_half(v[i]);
  }
  return bits;
#endif
}

// ---- Lanes<T>: storage type T, computed in V ---------------------------------------------------

template <class T>
struct Lanes;

template <>
struct Lanes<float> {
  using Scalar = float;
  using V = F32;
  using Mask = I32;
  static constexpr int width = kFloats;
  static inline __attribute__((always_inline)) V load(const float* p) { return load_vector<V>(p); }
  NORMDROP_INLINE void store(float* p, V v) { store_vector(p, v); }
  NORMDROP_INLINE void stream(float* p, V v) { stream_vector(p, v); }
};

template <>
struct Lanes<double> {
  using Scalar = double;
  using V = F64;
  using Mask = I64;
  static constexpr int width = kDoubles;
  static inline __attribute__((always_inline)) V load(const double* p) { return load_vector<V>(p); }
  NORMDROP_INLINE void store(double* p, V v) { store_vector(p, v); }
  NORMDROP_INLINE void stream(double* p, V v) { stream_vector(p, v); }
};

template <class T>
struct LanesOf16Bits {
  using Scalar = float;
  using V = F32;
  using Mask = I32;
  static constexpr int width = kFloats;
  static inline __attribute__((always_inline)) V load(const T* p) { return widen(load_vector<U16Half>(p), T{}); }
  NORMDROP_INLINE void store(T* p, V v) { store_vector(p, narrow(v, T{})); }
  NORMDROP_INLINE void stream(T* p, V v) { stream_vector(p, narrow(v, T{})); }
};
template <>
struct Lanes<bfloat16> : LanesOf16Bits<bfloat16> {};
template <>
struct Lanes<half> : LanesOf16Bits<half> {};

// The first n elements (n <= width); the others are zero.
template <class T>
NORMDROP_INLINE typename Lanes<T>::V load_first(const T* p, int64_t n) {
  T buffer[Lanes<T>::width] = {};
  for (int64_t i = 0; i < n; ++i) {
    buffer[i] = p[i];
  }
  return Lanes<T>::load(buffer);
}

template <class T>
NORMDROP_INLINE void store_first(T* p, typename Lanes<T>::V v, int64_t n) {
  T buffer[Lanes<T>::width];
  Lanes<T>::store(buffer, v);
  for (int64_t i = 0; i < n; ++i) {
    p[i] = buffer[i];
  }
}

template <class V>
NORMDROP_INLINE V splat(double value) {
  return (V){} + static_cast<decltype(V{}[0] + 0)>(value);
}

}  // namespace
}  // namespace normdrop::NORMDROP_ISA
