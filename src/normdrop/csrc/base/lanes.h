// Elements in memory and the vectors they are computed in.
//
// float, bfloat16 and half are computed in float, double in double: Lanes<T>::V is the vector in
// which T is computed, Lanes<T>::width its number of elements.

#pragma once

#include "base/simd.h"

namespace normdrop::NORMDROP_ISA {
namespace {

struct bfloat16 {
  uint16_t bits;
};
struct half {
  uint16_t bits;
};

// ---- 16-bit types, rounding to nearest even ----------------------------------------------------

// Between 16 and 32 bits a lane. GCC 12 converts in halves where one or two instructions do it.
NORMDROP_INLINE U32 extend(U16Half v) {
#if defined(__AVX512F__)
  return (U32)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
  return (U32)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, U32);
#endif
}

// The upper halves must be zero.
NORMDROP_INLINE U16Half truncate(U32 v) {
#if defined(__AVX512F__)
  return (U16Half)_mm512_cvtepi32_epi16((__m512i)v);
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);
  return (U16Half)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(v, U16Half);
#endif
}

NORMDROP_INLINE F32 widen(U16Half bits, bfloat16) { return (F32)(extend(bits) << 16); }

NORMDROP_INLINE U16Half narrow(F32 v, bfloat16) {
  const U32 bits = (U32)v;
  const U32 rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const U32 nan = (U32)(v != v);
  return truncate((nan & 0x7FC0) | (~nan & rounded));
}

#if !defined(__F16C__) && !defined(__aarch64__)
union FloatBits {
  uint32_t bits;
  float value;
};

__attribute__((noinline)) float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16;
  FloatBits f;
  f.bits = (uint32_t)(h & 0x7FFF) << 13;
  if ((h & 0x7C00) == 0x7C00) {
    f.bits |= 0x7F800000 | ((h & 0x3FF) != 0 ? 0x400000 : 0);
  } else {
    f.value *= 0x1p112f;  // the exponent's bias; makes subnormal numbers right, too
  }
  f.bits |= sign;
  return f.value;
}

__attribute__((noinline)) uint16_t float_to_half(float value) {
  FloatBits f;
  f.value = value;
  const uint32_t sign = (f.bits >> 16) & 0x8000;
  f.bits &= 0x7FFFFFFF;
  if (f.bits > 0x7F800000) {
    return (uint16_t)(sign | 0x7E00);
  }
  if (f.bits >= 0x477FF000) {  // 65520 and above round to infinity
    return (uint16_t)(sign | 0x7C00);
  }
  if (f.bits < 0x38800000) {  // subnormal in half: let the addition round
    f.value += 0.5f;
    return (uint16_t)(sign | (f.bits - 0x3F000000));
  }
  f.bits += 0xFFF + ((f.bits >> 13) & 1);
  return (uint16_t)(sign | ((f.bits - 0x38000000) >> 13));
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
  F32 v{};
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
  U16Half bits{};
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
  NORMDROP_INLINE V load(const float* p) { return load_vector<V>(p); }
  NORMDROP_INLINE void store(float* p, V v) { store_vector(p, v); }
  NORMDROP_INLINE void stream(float* p, V v) { stream_vector(p, v); }
};

template <>
struct Lanes<double> {
  using Scalar = double;
  using V = F64;
  using Mask = I64;
  static constexpr int width = kDoubles;
  NORMDROP_INLINE V load(const double* p) { return load_vector<V>(p); }
  NORMDROP_INLINE void store(double* p, V v) { store_vector(p, v); }
  NORMDROP_INLINE void stream(double* p, V v) { stream_vector(p, v); }
};

template <class T>
struct LanesOf16Bits {
  using Scalar = float;
  using V = F32;
  using Mask = I32;
  static constexpr int width = kFloats;
  NORMDROP_INLINE V load(const T* p) { return widen(load_vector<U16Half>(p), T{}); }
  NORMDROP_INLINE void store(T* p, V v) { store_vector(p, narrow(v, T{})); }
  NORMDROP_INLINE void stream(T* p, V v) { stream_vector(p, narrow(v, T{})); }
};
template <>
struct Lanes<bfloat16> : LanesOf16Bits<bfloat16> {};
template <>
struct Lanes<half> : LanesOf16Bits<half> {};

#if defined(__AVX512F__)
NORMDROP_INLINE __mmask16 first_bits(int64_t n) { return (__mmask16)((1u << n) - 1); }
#endif

// The first n elements (0 <= n <= width); the others are zero.
template <class T>
NORMDROP_INLINE typename Lanes<T>::V load_first(const T* p, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (F32)_mm512_maskz_loadu_ps(first_bits(n), p);
  } else if constexpr (sizeof(T) == 8) {
    return (F64)_mm512_maskz_loadu_pd((__mmask8)first_bits(n), p);
  } else {
    return widen((U16Half)_mm256_maskz_loadu_epi16(first_bits(n), p), T{});
  }
#else
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    return (F32)_mm256_maskload_ps((const float*)p, (__m256i)first_lanes<I32>(n));
  } else if constexpr (sizeof(T) == 8) {
    return (F64)_mm256_maskload_pd((const double*)p, (__m256i)first_lanes<I64>(n));
  }
#endif
  T buffer[Lanes<T>::width] = {};
  for (int64_t i = 0; i < n; ++i) {
    buffer[i] = p[i];
  }
  return Lanes<T>::load(buffer);
#endif
}

template <class T>
NORMDROP_INLINE void store_first(T* p, typename Lanes<T>::V v, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, first_bits(n), (__m512)v);
  } else if constexpr (sizeof(T) == 8) {
    _mm512_mask_storeu_pd(p, (__mmask8)first_bits(n), (__m512d)v);
  } else {
    _mm256_mask_storeu_epi16(p, first_bits(n), (__m256i)narrow(v, T{}));
  }
#else
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    _mm256_maskstore_ps((float*)p, (__m256i)first_lanes<I32>(n), (__m256)v);
    return;
  } else if constexpr (sizeof(T) == 8) {
    _mm256_maskstore_pd((double*)p, (__m256i)first_lanes<I64>(n), (__m256d)v);
    return;
  }
#endif
  T buffer[Lanes<T>::width];
  Lanes<T>::store(buffer, v);
  for (int64_t i = 0; i < n; ++i) {
    p[i] = buffer[i];
  }
#endif
}

}  // namespace
}  // namespace normdrop::NORMDROP_ISA
