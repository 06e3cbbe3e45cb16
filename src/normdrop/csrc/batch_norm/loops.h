// Batch normalization: what its loops share, the arithmetic of one span of elements. The loops are
// in rows_kernels.cpp and columns_kernels.cpp.
//
//   forward    y_hat = (x - mean) * invstd * weight + bias, computed as
//              y_hat = (x - center) * scale + shift, center being the mean rounded to float,
//              scale = invstd * weight, shift = bias + (center - mean) * scale;
//              y = r * act(y_hat + residual) * drop_scale, r being the dropout mask
//   backward   g = r * grad_y * drop_scale * act'(y_hat + residual), also residual's gradient,
//              grad_bias = sum g, grad_weight = invstd * sum g * (x - mean),
//              grad_x = scale * (g - mean(g) - (x - mean) * invstd^2 * mean(g * (x - mean))),
//              computed as g * scale + (x - center) * grad_slope + grad_shift
//
// x is (outer, channels, inner). float, bfloat16 and half are computed in float, at most 4096
// elements of a channel (256 rows of columns) being summed in float before they go to double.
// Sums of squares are shifted by the mean of the block before, so that nothing cancels: together
// they are at most a few times m2, wherever the mean is, and so is their error. The first block
// has the mean of a few elements; if that proves far from its own mean, it is summed again.
//
// Nothing here is parallel. A caller gives disjoint channels, blocks or rows to each thread.

#pragma once

#include "batch_norm/kernels.h"

#include "base/lanes.h"

namespace normdrop::NORMDROP_ISA {
namespace {

template <class T>
using VectorOf = typename Lanes<T>::V;
template <class T>
using MaskOf = typename Lanes<T>::Mask;
template <class T>
using ScalarOf = typename Lanes<T>::Scalar;

constexpr int64_t kUnroll = 4;

NORMDROP_INLINE F64 not_negative(F64 v) { return select((I64)(v < F64{}), F64{}, v); }

// A row often begins on another page, where the processor's own prefetching does not reach.
template <class T>
NORMDROP_INLINE void prefetch_row(const T* p, int64_t n) {
  const char* bytes = (const char*)p;
  const int64_t end = n * (int64_t)sizeof(T) < 1024 ? n * (int64_t)sizeof(T) : 1024;
  for (int64_t i = 0; i < end; i += 64) {
    __builtin_prefetch(bytes + i);
  }
}

NORMDROP_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

// A block whose squares are mostly due to its shift's distance from its mean, by this share, is
// summed again about its mean. Only the first one: if the mean of a later block is far from that of
// the block before, the channel's spread is as large.
constexpr double kFar = 0.8;

// ---- Elementwise: one span of elements that lie side by side -----------------------------------

// Constants of a row of the row kernels: the same for all elements.
template <class T>
struct Broadcast {
  VectorOf<T> value;
  NORMDROP_METHOD VectorOf<T> at(int64_t) const { return value; }
  NORMDROP_METHOD VectorOf<T> first(int64_t, int64_t) const { return value; }
};

template <class T>
NORMDROP_INLINE Broadcast<T> broadcast(const void* constants, int64_t c) {
  return {splat<VectorOf<T>>(static_cast<const ScalarOf<T>*>(constants)[c])};
}

// Constants of a row of the column kernels: one for each element.
template <class T>
struct Columns {
  const ScalarOf<T>* values;
  NORMDROP_METHOD VectorOf<T> at(int64_t c) const { return load_vector<VectorOf<T>>(values + c); }
  NORMDROP_METHOD VectorOf<T> first(int64_t c, int64_t n) const {
    return load_first<ScalarOf<T>>(values + c, n);
  }
};

template <class T>
NORMDROP_INLINE Columns<T> columns(const void* constants, int64_t c) {
  return {static_cast<const ScalarOf<T>*>(constants) + c};
}

template <class T, bool kStream>
NORMDROP_INLINE void put(T* p, VectorOf<T> v) {
  if constexpr (kStream) {
    Lanes<T>::stream(p, v);
  } else {
    Lanes<T>::store(p, v);
  }
}

// Elements before the first that lies on a vector's boundary; -1 if streaming is not possible.
// `tied` says that the span's start cannot move.
template <class T>
NORMDROP_INLINE int64_t unaligned_head(const T* p, int64_t n, bool tied) {
  const uint64_t bytes = Lanes<T>::width * sizeof(T);
  const uint64_t past = (uint64_t)p % bytes;
  if (past == 0) {
    return 0;
  }
  const int64_t head = (int64_t)((bytes - past) / sizeof(T));
  return tied || past % sizeof(T) != 0 || head >= n ? -1 : head;
}

// act(z) = z for z > 0, slope * z elsewhere. kDropped is any of them, with dropout after it: there
// a residual and the bits of the sign, too, are known at run time only, so that one instance does.
enum Activation { kIdentity, kRelu, kLeaky, kDropped };

template <class T>
using ChoiceOf = Choice<VectorOf<T>>;

// Elements with whole bytes of bits, in vectors: 8 or more.
template <class T>
constexpr int64_t kUnit = Lanes<T>::width < 8 ? 8 : Lanes<T>::width;

// a, bent where `negative` says; NaN counts as positive, as in torch.
template <class T, Activation kAct>
NORMDROP_INLINE VectorOf<T> bend(VectorOf<T> a, ChoiceOf<T> negative, VectorOf<T> slope) {
  if constexpr (kAct == kRelu) {
    (void)slope;
    return negative.others().keep(a);
  } else if constexpr (kAct == kDropped) {  // of infinity, too, a slope of zero makes zero
    return negative.pick(keep_where((MaskOf<T>)(slope != VectorOf<T>{}), a * slope), a);
  } else {
    return negative.pick(a * slope, a);
  }
}

// Dropout, after the activation: what is dropped is selected, so infinity and NaN give zero.
template <class T, Activation kAct>
struct Dropout {
  const uint8_t* kept;
  int64_t first;  // the bit of the span's first element
  VectorOf<T> scale;

  // Bit k is element i + k, for as many as one round of an unrolled loop takes.
  NORMDROP_METHOD uint64_t bits(int64_t i) const {
    if constexpr (kAct != kDropped) {
      return 0;
    }
    const uint64_t index = (uint64_t)(first + i), shift = index % 8;
    uint64_t result;
    memcpy(&result, kept + index / 8, 8);
    result >>= shift;
    if constexpr (kUnroll * Lanes<T>::width > 56) {
      result |= (uint64_t)kept[index / 8 + 8] << 1 << (63 - shift);
    }
    return result;
  }

  NORMDROP_METHOD VectorOf<T> apply(VectorOf<T> v, uint64_t bits) const {
    if constexpr (kAct == kDropped) {
      return ChoiceOf<T>::of_bits((uint32_t)bits).keep(v * scale);
    }
    return v;
  }
};

template <class T, Activation kAct>
NORMDROP_INLINE Dropout<T, kAct> dropout(const BatchNormArgs& args, int64_t at) {
  return {args.kept, args.kept_first + at, splat<VectorOf<T>>((ScalarOf<T>)args.drop_scale)};
}

template <class T, Activation kAct, bool kResidual, template <class> class Constants>
struct Normalize {
  using V = VectorOf<T>;
  static constexpr bool kHasBits = kResidual && kAct != kIdentity;
  const T* x;
  const T* residual;
  T* y;
  uint8_t* positive;  // of the span's first element, or null
  Constants<T> center, scale, shift;
  V slope;
  Dropout<T, kAct> dropout;

  NORMDROP_METHOD bool has_residual() const {
    return kResidual && (kAct != kDropped || residual != nullptr);
  }
  NORMDROP_METHOD bool has_bits() const {
    return kHasBits && (kAct != kDropped || positive != nullptr);
  }

  NORMDROP_METHOD V activated(V z, uint32_t& bits, uint64_t kept) const {
    if constexpr (kAct != kIdentity) {
      const auto negative = ChoiceOf<T>::not_above_zero(z);
      bits = kHasBits ? negative.others().bits() : 0;
      return dropout.apply(bend<T, kAct>(z, negative, slope), kept);
    }
    return z;
  }

  // Elements [i, i + width): computes y, gives the bits.
  template <bool kStream>
  NORMDROP_METHOD uint32_t whole(int64_t i, uint64_t kept) const {
    V z = fma(Lanes<T>::load(x + i) - center.at(i), scale.at(i), shift.at(i));
    if (has_residual()) {
      z += Lanes<T>::load(residual + i);
    }
    uint32_t bits = 0;
    put<T, kStream>(y + i, activated(z, bits, kept));
    return bits;
  }

  // Elements [i, i + n), n < width.
  NORMDROP_METHOD uint32_t partial(int64_t i, int64_t n, uint64_t kept) const {
    V z = fma(load_first<T>(x + i, n) - center.first(i, n), scale.first(i, n), shift.first(i, n));
    if (has_residual()) {
      z += load_first<T>(residual + i, n);
    }
    uint32_t bits = 0;
    store_first<T>(y + i, activated(z, bits, kept), n);
    return bits;
  }

  // Whole vectors from i on; gives where they end.
  template <bool kStream>
  NORMDROP_METHOD int64_t body(int64_t i, int64_t n) const {
    constexpr int64_t W = Lanes<T>::width;
    for (; i + kUnroll * W <= n; i += kUnroll * W) {
      const uint64_t kept = dropout.bits(i);
      uint64_t bits = 0;
      NORMDROP_UNROLL
      for (int64_t u = 0; u < kUnroll; ++u) {
        bits |= (uint64_t)whole<kStream>(i + u * W, kept >> (u * W)) << (u * W);
      }
      if (has_bits()) {
        memcpy(positive + i / 8, &bits, kUnroll * W / 8);
      }
    }
    return i;
  }

  NORMDROP_METHOD void span(int64_t n, bool stream) const {
    constexpr int64_t W = Lanes<T>::width;
    const int64_t head = stream ? unaligned_head(y, n, has_bits()) : -1;
    if (head > 0) {
      partial(0, head, dropout.bits(0));
    }
    int64_t i = head >= 0 ? body<true>(head, n) : body<false>(0, n);
    const int64_t rest = i;
    const uint64_t kept = dropout.bits(rest);
    uint64_t bits = 0;
    for (; i + W <= n; i += W) {
      bits |= (uint64_t)whole<false>(i, kept >> (i - rest)) << (i - rest);
    }
    if (i < n) {
      bits |= (uint64_t)partial(i, n - i, kept >> (i - rest)) << (i - rest);
    }
    if (has_bits()) {
      for (int64_t done = rest; done < n; done += 8, bits >>= 8) {
        positive[done / 8] = (uint8_t)bits;
      }
    }
  }
};

// One bit an element: the sign of what went into the activation, and the dropout mask.
struct Bits {
  uint64_t positive, kept;
  NORMDROP_METHOD Bits operator>>(int64_t n) const { return {positive >> n, kept >> n}; }
};

template <class T, Activation kAct, bool kBits, template <class> class Constants>
struct Gradient {
  using V = VectorOf<T>;
  const T* x;
  const T* grad_y;
  const uint8_t* positive;
  Constants<T> center, scale, shift;
  V slope;
  Dropout<T, kAct> dropout;

  NORMDROP_METHOD bool has_bits() const {
    return kBits && (kAct != kDropped || positive != nullptr);
  }

  // g, and d = x - center, of elements [i, i + width).
  NORMDROP_METHOD V whole(int64_t i, Bits bits, V& d) const {
    d = Lanes<T>::load(x + i) - center.at(i);
    const V g = dropout.apply(Lanes<T>::load(grad_y + i), bits.kept);
    if (has_bits()) {
      return bend<T, kAct>(g, ChoiceOf<T>::of_bits(~(uint32_t)bits.positive), slope);
    }
    if constexpr (kAct != kIdentity) {
      const V z = fma(d, scale.at(i), shift.at(i));
      return bend<T, kAct>(g, ChoiceOf<T>::not_above_zero(z), slope);
    }
    return g;
  }

  // The same of [i, i + n), n < width; zero beyond.
  NORMDROP_METHOD V partial(int64_t i, int64_t n, Bits bits, V& d) const {
    d = keep_where(first_lanes<MaskOf<T>>(n), load_first<T>(x + i, n) - center.first(i, n));
    const V g = dropout.apply(load_first<T>(grad_y + i, n), bits.kept);
    if (has_bits()) {
      return bend<T, kAct>(g, ChoiceOf<T>::of_bits(~(uint32_t)bits.positive), slope);
    }
    if constexpr (kAct != kIdentity) {
      const V z = fma(d, scale.first(i, n), shift.first(i, n));
      return bend<T, kAct>(g, ChoiceOf<T>::not_above_zero(z), slope);
    }
    return g;
  }

  // The bits of elements [i, i + n), n <= 64, i divisible by 8 where there are bits of the sign.
  NORMDROP_METHOD Bits bits(int64_t i, int64_t n) const {
    Bits result = {0, dropout.bits(i)};
    if (has_bits()) {
      for (int64_t byte = 0; byte * 8 < n; ++byte) {
        result.positive |= (uint64_t)positive[i / 8 + byte] << (8 * byte);
      }
    }
    return result;
  }
  NORMDROP_METHOD Bits unrolled_bits(int64_t i) const {
    Bits result = {0, dropout.bits(i)};
    if (has_bits()) {
      memcpy(&result.positive, positive + i / 8, kUnroll * Lanes<T>::width / 8);
    }
    return result;
  }
};

template <class T, Activation kAct, bool kBits, template <class> class Constants>
struct GradientX {
  using V = VectorOf<T>;
  Gradient<T, kAct, kBits, Constants> gradient;
  T* grad_x;
  T* grad_residual;  // or null
  Constants<T> grad_slope, grad_shift;
  MaskOf<T> training;  // in evaluation an infinite x must not reach the gradient

  template <bool kStream>
  NORMDROP_METHOD void whole(int64_t i, Bits bits) const {
    V d;
    const V g = gradient.whole(i, bits, d);
    const V inner = fma(keep_where(training, d), grad_slope.at(i), grad_shift.at(i));
    put<T, kStream>(grad_x + i, fma(g, gradient.scale.at(i), inner));
    if (grad_residual != nullptr) {
      put<T, kStream>(grad_residual + i, g);
    }
  }

  NORMDROP_METHOD void partial(int64_t i, int64_t n, Bits bits) const {
    V d;
    const V g = gradient.partial(i, n, bits, d);
    const V inner = fma(keep_where(training, d), grad_slope.first(i, n), grad_shift.first(i, n));
    store_first<T>(grad_x + i, fma(g, gradient.scale.first(i, n), inner), n);
    if (grad_residual != nullptr) {
      store_first<T>(grad_residual + i, g, n);
    }
  }

  template <bool kStream>
  NORMDROP_METHOD int64_t body(int64_t i, int64_t n) const {
    constexpr int64_t W = Lanes<T>::width;
    for (; i + kUnroll * W <= n; i += kUnroll * W) {
      const Bits bits = gradient.unrolled_bits(i);
      NORMDROP_UNROLL
      for (int64_t u = 0; u < kUnroll; ++u) {
        whole<kStream>(i + u * W, bits >> (u * W));
      }
    }
    return i;
  }

  NORMDROP_METHOD void span(int64_t n, bool stream) const {
    constexpr int64_t W = Lanes<T>::width;
    const bool tied = gradient.has_bits() || grad_residual != nullptr;
    const int64_t head = stream ? unaligned_head(grad_x, n, tied) : -1;
    if (head > 0) {
      partial(0, head, gradient.bits(0, head));
    }
    int64_t i = head >= 0 ? body<true>(head, n) : body<false>(0, n);
    const int64_t rest = i;
    const Bits bits = gradient.bits(i, n - i);
    for (; i + W <= n; i += W) {
      whole<false>(i, bits >> (i - rest));
    }
    if (i < n) {
      partial(i, n - i, bits >> (i - rest));
    }
  }
};

// ---- Entry points: choose the instance ---------------------------------------------------------

#define NORMDROP_CHOOSE(function, with, ...)                             \
  if (args.slope == 1.0) {                                               \
    return function<T, kIdentity, with>(args, __VA_ARGS__);              \
  }                                                                      \
  return args.slope == 0.0 ? function<T, kRelu, with>(args, __VA_ARGS__) \
                           : function<T, kLeaky, with>(args, __VA_ARGS__);

#define NORMDROP_CHOOSE_NORMALIZE(function, ...)           \
  if (args.kept != nullptr) {                              \
    return function<T, kDropped, true>(args, __VA_ARGS__); \
  } else if (args.residual != nullptr) {                   \
    NORMDROP_CHOOSE(function, true, __VA_ARGS__)           \
  } else {                                                 \
    NORMDROP_CHOOSE(function, false, __VA_ARGS__)          \
  }

// The identity leaves no bits.
#define NORMDROP_CHOOSE_GRADIENT(function, ...)                              \
  if (args.kept != nullptr) {                                                \
    return function<T, kDropped, true>(args, __VA_ARGS__);                   \
  } else if (args.positive != nullptr) {                                     \
    return args.slope == 0.0 ? function<T, kRelu, true>(args, __VA_ARGS__)   \
                             : function<T, kLeaky, true>(args, __VA_ARGS__); \
  } else {                                                                   \
    NORMDROP_CHOOSE(function, false, __VA_ARGS__)                            \
  }

// In the order of DataType.
#define NORMDROP_TYPES(function) \
  {function<float>, function<double>, function<bfloat16>, function<half>}

}  // namespace
}  // namespace normdrop::NORMDROP_ISA
