// Dropout: what its loops share, the arithmetic of one vector of elements.
//
// y = scale * (r * x), r_i ~ Bernoulli(keep); alpha dropout: y = r (scale * x + shift)
// + (1 - r) fill. The derivative is the same operation on the gradient with shift = fill = 0, so
// the mask is drawn again from the seed and nothing is kept for backward.
//
// A dropped element is selected, not multiplied by zero: infinity and NaN give zero.
// float32, bfloat16 and float16 are computed in float32, float64 in float64.
//
// Nothing here is parallel. A caller gives disjoint elements to each thread, each of which
// depends on its own index only; so there is no race and no dependence on the number of threads.

#pragma once

#include "base/lanes.h"
#include "dropout/kernels.h"

namespace normdrop::NORMDROP_ISA {
namespace {

template <class T>
struct Coefficients {
  using V = typename Lanes<T>::V;
  V scale, shift, fill;
  explicit Coefficients(const DropoutWork& work)
      : scale(splat<V>(work.scale)), shift(splat<V>(work.shift)), fill(splat<V>(work.fill)) {}
};

// The mask of one vector of T: a register of bits where there are such, else all ones in a lane
// that is kept.
#if defined(__AVX512F__)
template <int width>
struct LaneMaskOf;
template <>
struct LaneMaskOf<16> {
  typedef __mmask16 type;
};
template <>
struct LaneMaskOf<8> {
  typedef __mmask8 type;
};
template <class T>
using LaneMask = typename LaneMaskOf<Lanes<T>::width>::type;

// Keeps the compiler from making one masked load of a load and its choice: that would wait for the
// mask, and took three times as long where x comes from memory (Zen 5).
template <class V>
NORMDROP_INLINE V as_loaded(V x) {
  asm("" : "+v"(x));
  return x;
}

NORMDROP_INLINE F32 select(__mmask16 mask, F32 a, F32 b) {
  return (F32)_mm512_mask_mov_ps((__m512)b, mask, (__m512)a);
}
NORMDROP_INLINE F64 select(__mmask8 mask, F64 a, F64 b) {
  return (F64)_mm512_mask_mov_pd((__m512d)b, mask, (__m512d)a);
}
NORMDROP_INLINE F32 keep_where(__mmask16 mask, F32 a) {
  return (F32)_mm512_maskz_mov_ps(mask, (__m512)a);
}
NORMDROP_INLINE F64 keep_where(__mmask8 mask, F64 a) {
  return (F64)_mm512_maskz_mov_pd(mask, (__m512d)a);
}
#else
template <class T>
using LaneMask = typename Lanes<T>::Mask;

template <class V>
NORMDROP_INLINE V as_loaded(V x) {
  return x;
}
#endif

template <class T, bool kAffine>
NORMDROP_INLINE
    typename Lanes<T>::V drop(typename Lanes<T>::V x, LaneMask<T> mask, const Coefficients<T>& c) {
  const auto loaded = as_loaded(x);
  if constexpr (kAffine) {
    return select(mask, loaded * c.scale + c.shift, c.fill);
  } else {
    return keep_where(mask, loaded * c.scale);
  }
}

template <class T, bool kStream>
NORMDROP_INLINE void put(T* y, typename Lanes<T>::V v) {
  if constexpr (kStream) {
    Lanes<T>::stream(y, v);
  } else {
    Lanes<T>::store(y, v);
  }
}

// ---- Entry points: choose the instance ---------------------------------------------------------

template <class F>
NORMDROP_INLINE void for_type(DropoutType type, const F& f) {
  switch (type) {
    case DropoutType::float32:
      return f(float{});
    case DropoutType::float64:
      return f(double{});
    case DropoutType::bfloat16:
      return f(bfloat16{});
    case DropoutType::float16:
      return f(half{});
  }
}

bool is_affine(const DropoutWork& work) { return work.shift != 0 || work.fill != 0; }

#define NORMDROP_DISPATCH(function, ...)                                                \
  for_type(work.type, [&](auto type) {                                                  \
    using T = decltype(type);                                                           \
    is_affine(work) ? function<T, true>(__VA_ARGS__) : function<T, false>(__VA_ARGS__); \
  })

}  // namespace
}  // namespace normdrop::NORMDROP_ISA
