// Batch normalization: the loops.
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

#include "batch_norm_kernels.h"

#include "simd.h"

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

// ---- Rows: inner > 1 --------------------------------------------------------------------------

NORMDROP_INLINE int64_t bit_bytes(int64_t inner) { return (inner + 7) / 8; }

template <class T, Activation kAct, bool kResidual>
void normalize_rows(const BatchNormArgs& args, int64_t o0, int64_t o1, int64_t c0, int64_t c1,
                    int64_t i0, int64_t i1) {
  const int64_t sample = args.channels * args.inner;
  for (int64_t o = o1 - 1; o >= o0; --o) {
    for (int64_t c = c0; c < c1; ++c) {
      const int64_t row = o * args.channels + c;
      const int64_t at = row * args.inner + i0;
      const Normalize<T, kAct, kResidual, Broadcast> work = {
          static_cast<const T*>(args.x) + at,
          args.residual != nullptr ? static_cast<const T*>(args.residual) + at : nullptr,
          static_cast<T*>(args.out) + at,
          args.positive != nullptr ? args.positive + row * bit_bytes(args.inner) + i0 / 8 : nullptr,
          broadcast<T>(args.center, c),
          broadcast<T>(args.scale, c),
          broadcast<T>(args.shift, c),
          splat<VectorOf<T>>((ScalarOf<T>)args.slope),
          dropout<T, kAct>(args, at)};
      if (o > o0) {
        prefetch_row(work.x - sample, i1 - i0);
        if (work.has_residual()) {
          prefetch_row(work.residual - sample, i1 - i0);
        }
      }
      work.span(i1 - i0, args.stream);
    }
  }
  stream_fence();
}

template <class T, Activation kAct, bool kBits>
NORMDROP_INLINE Gradient<T, kAct, kBits, Broadcast> row_gradient(const BatchNormArgs& args,
                                                                 int64_t o, int64_t c, int64_t i) {
  const int64_t row = o * args.channels + c;
  const int64_t at = row * args.inner + i;
  return {static_cast<const T*>(args.x) + at,
          static_cast<const T*>(args.grad_y) + at,
          args.positive != nullptr ? args.positive + row * bit_bytes(args.inner) + i / 8 : nullptr,
          broadcast<T>(args.center, c),
          broadcast<T>(args.scale, c),
          broadcast<T>(args.shift, c),
          splat<VectorOf<T>>((ScalarOf<T>)args.slope),
          dropout<T, kAct>(args, at)};
}

template <class T, Activation kAct, bool kBits>
void gradient_rows(const BatchNormArgs& args, int64_t o0, int64_t o1, int64_t c0, int64_t c1,
                   int64_t i0, int64_t i1) {
  const int64_t sample = args.channels * args.inner;
  for (int64_t o = o1 - 1; o >= o0; --o) {
    for (int64_t c = c0; c < c1; ++c) {
      const int64_t at = (o * args.channels + c) * args.inner + i0;
      const GradientX<T, kAct, kBits, Broadcast> work = {
          row_gradient<T, kAct, kBits>(args, o, c, i0),
          static_cast<T*>(args.out) + at,
          args.grad_residual != nullptr ? static_cast<T*>(args.grad_residual) + at : nullptr,
          broadcast<T>(args.grad_slope, c),
          broadcast<T>(args.grad_shift, c),
          args.training ? ~MaskOf<T>{} : MaskOf<T>{}};
      if (o > o0) {
        prefetch_row(work.gradient.x - sample, i1 - i0);
        prefetch_row(work.gradient.grad_y - sample, i1 - i0);
      }
      work.span(i1 - i0, args.stream);
    }
  }
  stream_fence();
}

// Calls visit(c, x's offset, length) for every piece of block b, in channels [c0, c1).
template <class Visit>
NORMDROP_INLINE void walk_block(const BatchNormArgs& args, const RowBlocks& blocks, int64_t b,
                                int64_t c0, int64_t c1, const Visit& visit) {
  const int64_t o0 = b / blocks.parts * blocks.rows;
  const int64_t i0 = b % blocks.parts * blocks.length;
  const int64_t length = min_of(blocks.length, args.inner - i0);
  for (int64_t o = o0; o < min_of(o0 + blocks.rows, args.outer); ++o) {
    for (int64_t c = c0; c < c1; ++c) {
      visit(o, c, i0, length);
    }
  }
}

// Sums of d = x - shift and of d^2 over a row, four accumulators each.
//
// An accumulator takes four squares, then goes to the total. Where the mean is large, d is a
// multiple of the distance h of floats there, so a square is 0, 1 or 4 modulo 8 in units of h^2:
// added to a sum that has no room for these units, it is rounded down more often than up, by h^2/2
// on average. A block of squares added one by one lost 3.5e-7 of the variance at mean 1e4, std 1.
// Sums of four squares are rounded up as often as down.
template <class T>
NORMDROP_INLINE void sum_row(const T* x, int64_t n, VectorOf<T> shift, VectorOf<T>& total_d,
                             VectorOf<T>& total_dd) {
  using V = VectorOf<T>;
  constexpr int64_t W = Lanes<T>::width, kFour = 4;
  V d_sum[kUnroll] = {}, dd_sum[kUnroll] = {};
  const auto add = [&](int64_t at) NORMDROP_LAMBDA {
    NORMDROP_UNROLL
    for (int64_t u = 0; u < kUnroll; ++u) {
      const V d = Lanes<T>::load(x + at + u * W) - shift;
      d_sum[u] += d;
      dd_sum[u] = fma(d, d, dd_sum[u]);
    }
  };
  int64_t i = 0;
  for (; i + kFour * kUnroll * W <= n; i += kFour * kUnroll * W) {
    NORMDROP_UNROLL
    for (int64_t k = 0; k < kFour; ++k) {
      add(i + k * kUnroll * W);
    }
    total_d += (d_sum[0] + d_sum[1]) + (d_sum[2] + d_sum[3]);
    total_dd += (dd_sum[0] + dd_sum[1]) + (dd_sum[2] + dd_sum[3]);
    NORMDROP_UNROLL
    for (int64_t u = 0; u < kUnroll; ++u) {
      d_sum[u] = dd_sum[u] = V{};
    }
  }
  for (; i + kUnroll * W <= n; i += kUnroll * W) {
    add(i);
  }
  for (; i + W <= n; i += W) {
    const V d = Lanes<T>::load(x + i) - shift;
    d_sum[0] += d;
    dd_sum[0] = fma(d, d, dd_sum[0]);
  }
  if (i < n) {
    const V d = keep_where(first_lanes<MaskOf<T>>(n - i), load_first<T>(x + i, n - i) - shift);
    d_sum[1] += d;
    dd_sum[1] = fma(d, d, dd_sum[1]);
  }
  total_d += (d_sum[0] + d_sum[1]) + (d_sum[2] + d_sum[3]);
  total_dd += (dd_sum[0] + dd_sum[1]) + (dd_sum[2] + dd_sum[3]);
}

template <class T>
NORMDROP_INLINE double mean_of_first(const T* x, int64_t n) {
  VectorOf<T> sum{};
  int64_t i = 0;
  for (; i + Lanes<T>::width <= n; i += Lanes<T>::width) {
    sum += Lanes<T>::load(x + i);
  }
  if (i < n) {
    sum += load_first<T>(x + i, n - i);
  }
  return sum_of(sum) / (double)n;
}

constexpr int64_t kChannelTile = 32;

// Sums of a block's rows for a few channels: of eight rows first, so that short rows, too, add few
// to one accumulator.
template <class T, int64_t kChannels>
struct BlockSums {
  VectorOf<T> few_d[kChannels], few_dd[kChannels], d[kChannels], dd[kChannels];

  NORMDROP_METHOD void clear(int64_t channels) {
    for (int64_t c = 0; c < channels; ++c) {
      few_d[c] = few_dd[c] = d[c] = dd[c] = VectorOf<T>{};
    }
  }
  // Before row o of the first channel.
  NORMDROP_METHOD void start_row(int64_t o, int64_t channels) {
    if (o % 8 == 0) {
      flush(channels);
    }
  }
  NORMDROP_METHOD void flush(int64_t channels) {
    for (int64_t c = 0; c < channels; ++c) {
      d[c] += few_d[c];
      dd[c] += few_dd[c];
      few_d[c] = few_dd[c] = VectorOf<T>{};
    }
  }
};

// A block whose squares are mostly due to its shift's distance from its mean, by this share, is
// summed again about its mean. Only the first one: if the mean of a later block is far from that of
// the block before, the channel's spread is as large.
constexpr double kFar = 0.8;

NORMDROP_INLINE bool is_far(double n, double block_d, double block_dd) {
  return block_d * block_d > kFar * n * block_dd;
}

// A channel of a block again; out of line, since it is rare.
template <class T>
__attribute__((noinline)) void sum_block_again(const BatchNormArgs& args, const RowBlocks& blocks,
                                               int64_t b, int64_t c, double shift, double* block_d,
                                               double* block_dd) {
  BlockSums<T, 1> sums{};
  const auto k = splat<VectorOf<T>>((ScalarOf<T>)shift);
  const T* x = static_cast<const T*>(args.x);
  walk_block(args, blocks, b, c, c + 1,
             [&](int64_t o, int64_t, int64_t i, int64_t n) NORMDROP_LAMBDA {
               sums.start_row(o, 1);
               sum_row<T>(x + (o * args.channels + c) * args.inner + i, n, k, sums.few_d[0],
                          sums.few_dd[0]);
             });
  sums.flush(1);
  *block_d = sum_of(sums.d[0]);
  *block_dd = sum_of(sums.dd[0]);
}

// Sums over blocks, each with its own shift, brought to one fixed shift in double.
struct ShiftedSums {
  double count, origin, d, dd, shift;

  NORMDROP_METHOD void start(double first_shift) {
    count = d = dd = 0.0;
    origin = shift = first_shift;
  }
  // The next block: its sums about `shift`; its mean is the next shift.
  template <class Scalar>
  NORMDROP_METHOD void add(double n, double block_d, double block_dd) {
    const double move = shift - origin;
    count += n;
    d += block_d + n * move;
    dd += block_dd + move * (2.0 * block_d + n * move);
    shift = (double)(Scalar)(shift + block_d / n);
  }
  NORMDROP_METHOD Moments moments() const {
    const double m2 = dd - d * d / count;
    return {count, origin + d / count, m2 < 0.0 ? 0.0 : m2};
  }
};

template <class T>
void statistics_rows(const BatchNormArgs& args, int64_t c0, int64_t c1, int64_t b0, int64_t b1,
                     Moments* result) {
  using V = VectorOf<T>;
  using Scalar = ScalarOf<T>;
  const T* x = static_cast<const T*>(args.x);
  const RowBlocks blocks = row_blocks(args.outer, args.inner);
  for (int64_t tile = c0; tile < c1; tile += kChannelTile) {
    const int64_t tile_end = min_of(tile + kChannelTile, c1);
    ShiftedSums sums[kChannelTile];
    BlockSums<T, kChannelTile> block_sums;
    for (int64_t c = tile; c < tile_end; ++c) {
      const int64_t o = b0 / blocks.parts * blocks.rows, i = b0 % blocks.parts * blocks.length;
      const T* start = x + (o * args.channels + c) * args.inner + i;
      sums[c - tile].start((double)(Scalar)mean_of_first(start, min_of(64, args.inner - i)));
    }
    for (int64_t b = b0; b < b1; ++b) {
      block_sums.clear(tile_end - tile);
      double count = 0.0;
      walk_block(args, blocks, b, tile, tile_end,
                 [&](int64_t o, int64_t c, int64_t i, int64_t n) NORMDROP_LAMBDA {
                   const T* row = x + (o * args.channels + c) * args.inner + i;
                   if (o + 1 < args.outer) {
                     prefetch_row(row + args.channels * args.inner, n);
                   }
                   if (c == tile) {
                     block_sums.start_row(o, tile_end - tile);
                     count += (double)n;
                   }
                   sum_row<T>(row, n, splat<V>((Scalar)sums[c - tile].shift),
                              block_sums.few_d[c - tile], block_sums.few_dd[c - tile]);
                 });
      block_sums.flush(tile_end - tile);
      for (int64_t c = 0; c < tile_end - tile; ++c) {
        double block_d = sum_of(block_sums.d[c]), block_dd = sum_of(block_sums.dd[c]);
        if (b == b0 && is_far(count, block_d, block_dd)) {
          sums[c].start((double)(Scalar)(sums[c].shift + block_d / count));
          sum_block_again<T>(args, blocks, b, tile + c, sums[c].shift, &block_d, &block_dd);
        }
        sums[c].template add<Scalar>(count, block_d, block_dd);
      }
    }
    for (int64_t c = tile; c < tile_end; ++c) {
      result[c - c0] = sums[c - tile].moments();
    }
  }
}

// Sums of g and of g * (x - center) over a row.
template <class T, class Source>
NORMDROP_INLINE void sum_gradient(const Source& source, int64_t n, VectorOf<T>& total_g,
                                  VectorOf<T>& total_gx) {
  using V = VectorOf<T>;
  constexpr int64_t W = Lanes<T>::width;
  V g_sum[kUnroll] = {}, gx_sum[kUnroll] = {};
  int64_t i = 0;
  V d;
  for (; i + kUnroll * W <= n; i += kUnroll * W) {
    const Bits bits = source.unrolled_bits(i);
    NORMDROP_UNROLL
    for (int64_t u = 0; u < kUnroll; ++u) {
      const V g = source.whole(i + u * W, bits >> (u * W), d);
      g_sum[u] += g;
      gx_sum[u] = fma(g, d, gx_sum[u]);
    }
  }
  const int64_t rest = i;
  const Bits bits = source.bits(i, n - i);
  for (; i + W <= n; i += W) {
    const V g = source.whole(i, bits >> (i - rest), d);
    g_sum[0] += g;
    gx_sum[0] = fma(g, d, gx_sum[0]);
  }
  if (i < n) {
    const V g = source.partial(i, n - i, bits >> (i - rest), d);
    g_sum[1] += g;
    gx_sum[1] = fma(g, d, gx_sum[1]);
  }
  total_g += (g_sum[0] + g_sum[1]) + (g_sum[2] + g_sum[3]);
  total_gx += (gx_sum[0] + gx_sum[1]) + (gx_sum[2] + gx_sum[3]);
}

template <class T, Activation kAct, bool kBits>
void gradient_sums_rows(const BatchNormArgs& args, int64_t c0, int64_t c1, int64_t b0, int64_t b1,
                        GradientSums* result) {
  using V = VectorOf<T>;
  const RowBlocks blocks = row_blocks(args.outer, args.inner);
  for (int64_t tile = c0; tile < c1; tile += kChannelTile) {
    const int64_t tile_end = min_of(tile + kChannelTile, c1);
    V g_sum[kChannelTile], gx_sum[kChannelTile];
    for (int64_t c = tile; c < tile_end; ++c) {
      result[c - c0] = {0.0, 0.0};
    }
    for (int64_t b = b0; b < b1; ++b) {
      for (int64_t c = 0; c < tile_end - tile; ++c) {
        g_sum[c] = gx_sum[c] = V{};
      }
      walk_block(args, blocks, b, tile, tile_end,
                 [&](int64_t o, int64_t c, int64_t i, int64_t n) NORMDROP_LAMBDA {
                   const auto source = row_gradient<T, kAct, kBits>(args, o, c, i);
                   if (o + 1 < args.outer) {
                     prefetch_row(source.x + args.channels * args.inner, n);
                     prefetch_row(source.grad_y + args.channels * args.inner, n);
                   }
                   sum_gradient<T>(source, n, g_sum[c - tile], gx_sum[c - tile]);
                 });
      for (int64_t c = tile; c < tile_end; ++c) {
        result[c - c0].g += sum_of(g_sum[c - tile]);
        result[c - c0].gx += sum_of(gx_sum[c - tile]);
      }
    }
  }
}

// ---- Columns: inner = 1 ------------------------------------------------------------------------
//
// A row has a multiple of kColumnMultiple columns, so it is whole vectors and whole bytes of bits.
// Memory wants few streams, each read in order: beyond the second-level cache, sums that took four
// rows of two tensors side by side, eight streams, were 2.5 times slower than one row after the
// other. So where the constants repeat every few vectors, sums run over all elements in order and
// stay in registers (flat); elsewhere they take a few rows together, so that constants and sums are
// loaded and stored less often, and fetch the rows after those into the second-level cache.

constexpr int64_t kFirstRows = 8;  // whose mean is the first shift; of a flat range, spread over it

// Columns of the flat sums: as many as have both sums in registers.
#if defined(__AVX512F__)
constexpr int64_t kFlatVectors = 8;
#else
constexpr int64_t kFlatVectors = 4;
#endif
template <class T>
constexpr int64_t kFlat = kFlatVectors * Lanes<T>::width;

// Whether rows [m0, m1) can be seen as channels / kFlat ranges, each of m1 - m0 rows of kFlat.
template <class T>
NORMDROP_INLINE bool is_flat(const BatchNormArgs& args) {
  return args.channels % kFlat<T> == 0 && kFlat<T> % args.period == 0;
}

template <int64_t kRows>
struct Count {
  static constexpr int64_t rows = kRows;
};

// Calls visit(m, Count<n>) for rows [m, m + n), n being kRows or, at the end, 1.
template <int64_t kRows, class Visit>
NORMDROP_INLINE void walk_ascending(int64_t m0, int64_t m1, const Visit& visit) {
  int64_t m = m0;
  for (; m + kRows <= m1; m += kRows) {
    visit(m, Count<kRows>{});
  }
  for (; m < m1; ++m) {
    visit(m, Count<1>{});
  }
}

constexpr int64_t kRowsAhead = 4;

// A fetch beyond the tensor's end does nothing.
NORMDROP_INLINE void prefetch_second_level(const void* p) { __builtin_prefetch(p, 0, 2); }

// Calls visit(m) for the rows [m0, m1): the last 256 KiB first, since a pass before this one left
// them in the cache, but ascending within, since that is what the processor prefetches.
template <class T, class Visit>
NORMDROP_INLINE void walk_columns(const BatchNormArgs& args, int64_t m0, int64_t m1,
                                  const Visit& visit) {
  const int64_t run = 262144 / (int64_t)sizeof(T) / args.channels + 1;
  for (int64_t end = m1; end > m0; end -= run) {
    for (int64_t m = end - run > m0 ? end - run : m0; m < end; ++m) {
      visit(m);
    }
  }
  stream_fence();
}

template <class T, Activation kAct, bool kResidual>
void normalize_columns(const BatchNormArgs& args, int64_t m0, int64_t m1) {
  walk_columns<T>(args, m0, m1, [&](int64_t m) NORMDROP_LAMBDA {
    const int64_t at = m * args.channels;
    const Normalize<T, kAct, kResidual, Columns> work = {
        static_cast<const T*>(args.x) + at,
        args.residual != nullptr ? static_cast<const T*>(args.residual) + at : nullptr,
        static_cast<T*>(args.out) + at,
        args.positive != nullptr ? args.positive + at / 8 : nullptr,
        columns<T>(args.center, 0),
        columns<T>(args.scale, 0),
        columns<T>(args.shift, 0),
        splat<VectorOf<T>>((ScalarOf<T>)args.slope),
        dropout<T, kAct>(args, at)};
    work.span(args.channels, args.stream);
  });
}

template <class T, Activation kAct, bool kBits>
NORMDROP_INLINE Gradient<T, kAct, kBits, Columns> column_gradient(const BatchNormArgs& args,
                                                                  int64_t at) {
  return {static_cast<const T*>(args.x) + at,
          static_cast<const T*>(args.grad_y) + at,
          args.positive != nullptr ? args.positive + at / 8 : nullptr,
          columns<T>(args.center, 0),
          columns<T>(args.scale, 0),
          columns<T>(args.shift, 0),
          splat<VectorOf<T>>((ScalarOf<T>)args.slope),
          dropout<T, kAct>(args, at)};
}

template <class T, Activation kAct, bool kBits>
void gradient_columns(const BatchNormArgs& args, int64_t m0, int64_t m1) {
  walk_columns<T>(args, m0, m1, [&](int64_t m) NORMDROP_LAMBDA {
    const int64_t at = m * args.channels;
    const GradientX<T, kAct, kBits, Columns> work = {
        column_gradient<T, kAct, kBits>(args, at),
        static_cast<T*>(args.out) + at,
        args.grad_residual != nullptr ? static_cast<T*>(args.grad_residual) + at : nullptr,
        columns<T>(args.grad_slope, 0),
        columns<T>(args.grad_shift, 0),
        args.training ? ~MaskOf<T>{} : MaskOf<T>{}};
    work.span(args.channels, args.stream);
  });
}

// g and d = x - center of a few rows, one unit of columns after the other.
template <class T, Activation kAct, bool kBits>
struct GradientUnit {
  using V = VectorOf<T>;
  static constexpr int64_t W = Lanes<T>::width, U = kUnit<T>;
  V slope, center[U / W], scale[U / W], shift[U / W];
  Dropout<T, kAct> dropout;

  NORMDROP_METHOD bool has_bits(const BatchNormArgs& args) const {
    return kBits && (kAct != kDropped || args.positive != nullptr);
  }

  NORMDROP_METHOD void load(const BatchNormArgs& args, int64_t c) {
    NORMDROP_UNROLL
    for (int64_t u = 0; u < U / W; ++u) {
      center[u] = columns<T>(args.center, c).at(u * W);
      scale[u] = columns<T>(args.scale, c).at(u * W);
      if constexpr (kAct != kIdentity && (!kBits || kAct == kDropped)) {
        shift[u] = columns<T>(args.shift, c).at(u * W);
      }
    }
  }

  // The bits of the unit that begins with element i.
  NORMDROP_METHOD Bits bits(const BatchNormArgs& args, int64_t i) const {
    Bits result = {0, dropout.bits(i)};
    if (has_bits(args)) {
      memcpy(&result.positive, args.positive + i / 8, U / 8);
    }
    return result;
  }

  NORMDROP_METHOD V g(const BatchNormArgs& args, int64_t i, int64_t u, Bits bits, V& d) const {
    d = Lanes<T>::load(static_cast<const T*>(args.x) + i + u * W) - center[u];
    const V grad_y = dropout.apply(Lanes<T>::load(static_cast<const T*>(args.grad_y) + i + u * W),
                                   bits.kept >> (u * W));
    if (has_bits(args)) {
      const uint32_t negative = ~(uint32_t)(bits.positive >> (u * W));
      return bend<T, kAct>(grad_y, ChoiceOf<T>::of_bits(negative), slope);
    }
    if constexpr (kAct != kIdentity) {
      return bend<T, kAct>(grad_y, ChoiceOf<T>::not_above_zero(fma(d, scale[u], shift[u])), slope);
    }
    return grad_y;
  }
};

// Columns whose sums stay in the first-level cache.
constexpr int64_t kStrip = 512;

// Sums of d = x - shift and of d^2 of a vector of columns over a few rows: of four in an
// accumulator, as in sum_row.
template <class T, int64_t kRows>
NORMDROP_INLINE void sum_columns(const T* x, int64_t channels, VectorOf<T> shift,
                                 VectorOf<T>& total_d, VectorOf<T>& total_dd) {
  using V = VectorOf<T>;
  V sum[2] = {}, square[2] = {};
  NORMDROP_UNROLL
  for (int64_t r = 0; r < kRows; ++r) {
    const V difference = Lanes<T>::load(x + r * channels) - shift;
    sum[r % 2] += difference;
    square[r % 2] = fma(difference, difference, square[r % 2]);
  }
  total_d += sum[0] + sum[1];
  total_dd += square[0] + square[1];
}

// A vector of columns of a block again, about their means, which become their shifts.
template <class T>
__attribute__((noinline)) void sum_columns_again(const T* x, int64_t channels, int64_t rows,
                                                 ScalarOf<T>* shift, ScalarOf<T>* block_d,
                                                 ScalarOf<T>* block_dd) {
  using V = VectorOf<T>;
  const V share = splat<V>((ScalarOf<T>)(1.0 / (double)rows));
  const V k = load_vector<V>(shift) + load_vector<V>(block_d) * share;
  V d{}, dd{};
  walk_ascending<8>(0, rows, [&](int64_t m, auto few) NORMDROP_LAMBDA {
    sum_columns<T, decltype(few)::rows>(x + m * channels, channels, k, d, dd);
  });
  store_vector(shift, k);
  store_vector(block_d, d);
  store_vector(block_dd, dd);
}

// Sums about the shift of `rows` rows of kFlat columns: of four rows in registers, then to memory.
// Of squares, too, four are added at once, as in sum_row.
template <class T>
NORMDROP_INLINE void flat_statistics(const T* x, int64_t rows, const ScalarOf<T>* shift,
                                     ScalarOf<T>* block_d, ScalarOf<T>* block_dd) {
  using V = VectorOf<T>;
  constexpr int64_t W = Lanes<T>::width, N = kFlatVectors, kRows = 4;
  for (int64_t m = 0; m < rows; m += kRows) {
    const T* end = x + min_of(m + kRows, rows) * kFlat<T>;
    V sum[N] = {}, square[N] = {};
    for (const T* row = x + m * kFlat<T>; row < end; row += kFlat<T>) {
      NORMDROP_UNROLL
      for (int64_t u = 0; u < N; ++u) {
        const V difference = Lanes<T>::load(row + u * W) - load_vector<V>(shift + u * W);
        sum[u] += difference;
        square[u] = fma(difference, difference, square[u]);
      }
    }
    NORMDROP_UNROLL
    for (int64_t u = 0; u < N; ++u) {
      store_vector(block_d + u * W, load_vector<V>(block_d + u * W) + sum[u]);
      store_vector(block_dd + u * W, load_vector<V>(block_dd + u * W) + square[u]);
    }
  }
}

template <class T>
void statistics_columns(const BatchNormArgs& args, int64_t m0, int64_t m1, double* mean,
                        double* m2) {
  using V = VectorOf<T>;
  using Scalar = ScalarOf<T>;
  constexpr int64_t W = Lanes<T>::width;
  if (args.channels % kColumnMultiple != 0) {  // the remainder, one row
    for (int64_t c = 0; c < args.channels; ++c) {
      mean[c] = (double)load_first<T>(static_cast<const T*>(args.x) + c, 1)[0];
      m2[c] = 0.0;
    }
    return;
  }
  // The sums of a block about `shift`, and all sums about `origin`, the first shift.
  alignas(64) Scalar shift[kStrip], block_d[kStrip], block_dd[kStrip], origin[kStrip];
  alignas(64) double d[kStrip], dd[kStrip];
  const bool flat = is_flat<T>(args);
  const int64_t step = flat ? kFlat<T> : kStrip, stride = flat ? kFlat<T> : args.channels;
  for (int64_t strip = 0; strip < args.channels; strip += step) {
    const int64_t count = min_of(step, args.channels - strip);
    // Of row m0 of the strip, or of the flat range.
    const T* x = static_cast<const T*>(args.x) + m0 * args.channels + strip * (flat ? m1 - m0 : 1);
    const int64_t first_rows = min_of(kFirstRows, m1 - m0);
    const int64_t spread = flat ? (m1 - m0) / first_rows : 1;
    const V first_share = splat<V>((Scalar)(1.0 / (double)first_rows));
    for (int64_t c = 0; c < count; c += W) {
      V sum{};
      for (int64_t m = 0; m < first_rows; ++m) {
        sum += Lanes<T>::load(x + m * spread * stride + c);
      }
      sum *= first_share;
      store_vector(shift + c, sum);
      store_vector(origin + c, sum);
    }
    memset(d, 0, count * sizeof(double));
    memset(dd, 0, count * sizeof(double));
    for (int64_t block = m0; block < m1; block += kColumnBlock) {
      const int64_t block_end = min_of(block + kColumnBlock, m1);
      memset(block_d, 0, count * sizeof(Scalar));
      memset(block_dd, 0, count * sizeof(Scalar));
      if (flat) {
        flat_statistics<T>(x + (block - m0) * stride, block_end - block, shift, block_d, block_dd);
      } else {
        walk_ascending<4>(block - m0, block_end - m0, [&](int64_t m, auto rows) NORMDROP_LAMBDA {
          constexpr int64_t kRows = decltype(rows)::rows;
          for (int64_t c = 0; c < count; c += W) {
            const T* row = x + m * stride + c;
            NORMDROP_UNROLL
            for (int64_t r = 0; r < kRows; ++r) {
              prefetch_second_level(row + (r + kRowsAhead) * stride);
            }
            V sum = load_vector<V>(block_d + c), square = load_vector<V>(block_dd + c);
            sum_columns<T, kRows>(row, stride, load_vector<V>(shift + c), sum, square);
            store_vector(block_d + c, sum);
            store_vector(block_dd + c, square);
          }
        });
      }
      const F64 rows = splat<F64>((double)(block_end - block));
      const F64 share = splat<F64>(1.0 / (double)(block_end - block));
      const V far = splat<V>((Scalar)(kFar * (double)(block_end - block)));  // as is_far
      for (int64_t c = 0; block == m0 && c < count; c += W) {
        const V s = load_vector<V>(block_d + c), q = load_vector<V>(block_dd + c);
        if (bits_of((MaskOf<T>)(s * s > far * q)) != 0) {
          sum_columns_again<T>(x + c, stride, block_end - block, shift + c, block_d + c,
                               block_dd + c);
          store_vector(origin + c, load_vector<V>(shift + c));
        }
      }
      for (int64_t c = 0; c < count; c += kDoubles) {
        const F64 s = load_doubles(block_d + c), q = load_doubles(block_dd + c);
        const F64 k = load_doubles(shift + c);
        const F64 move = k - load_doubles(origin + c);
        store_vector(d + c, load_vector<F64>(d + c) + fma(rows, move, s));
        store_vector(dd + c, load_vector<F64>(dd + c) + fma(move, s + fma(rows, move, s), q));
        store_doubles(shift + c, fma(s, share, k));
      }
    }
    const F64 share = splat<F64>(1.0 / (double)(m1 - m0));
    for (int64_t c = 0; c < count; c += kDoubles) {
      const F64 sum = load_vector<F64>(d + c), moved = sum * share;
      store_vector(mean + strip + c, load_doubles(origin + c) + moved);
      store_vector(m2 + strip + c, not_negative(load_vector<F64>(dd + c) - sum * moved));
    }
  }
}

// Sums of `rows` rows of kFlat columns, from element `at` on.
template <class T, Activation kAct, bool kBits>
NORMDROP_INLINE void flat_gradient_sums(const BatchNormArgs& args, int64_t at, int64_t rows,
                                        ScalarOf<T>* block_g, ScalarOf<T>* block_gx) {
  using V = VectorOf<T>;
  constexpr int64_t W = Lanes<T>::width, N = kFlatVectors, kRows = 16;
  for (int64_t m = 0; m < rows; m += kRows) {
    const int64_t end = min_of(m + kRows, rows);
    V sum[N] = {}, product[N] = {};
    for (int64_t row = m; row < end; ++row) {
      const auto source = column_gradient<T, kAct, kBits>(args, at + row * kFlat<T>);
      NORMDROP_UNROLL
      for (int64_t u = 0; u < N; ++u) {
        const int64_t first = u / kUnroll * kUnroll;
        const Bits bits = source.unrolled_bits(first * W) >> ((u - first) * W);
        V d;
        const V g = source.whole(u * W, bits, d);
        sum[u] += g;
        product[u] = fma(g, d, product[u]);
      }
    }
    NORMDROP_UNROLL
    for (int64_t u = 0; u < N; ++u) {
      store_vector(block_g + u * W, load_vector<V>(block_g + u * W) + sum[u]);
      store_vector(block_gx + u * W, load_vector<V>(block_gx + u * W) + product[u]);
    }
  }
}

template <class T, Activation kAct, bool kBits>
void gradient_sums_columns(const BatchNormArgs& args, int64_t m0, int64_t m1, double* g,
                           double* gx) {
  using V = VectorOf<T>;
  using Scalar = ScalarOf<T>;
  using Unit = GradientUnit<T, kAct, kBits>;
  constexpr int64_t W = Unit::W, U = Unit::U;
  if (args.channels % kColumnMultiple != 0) {  // the remainder, one row
    const auto source = column_gradient<T, kAct, kBits>(args, 0);
    for (int64_t c = 0; c < args.channels; c += U) {
      for (int64_t i = c; i < min_of(c + U, args.channels); i += W) {
        const int64_t n = min_of(W, args.channels - i);
        V d;
        const V value = source.partial(i, n, source.bits(c, i + n - c) >> (i - c), d);
        const V product = value * d;
        for (int64_t k = 0; k < n; ++k) {
          g[i + k] = (double)value[k];
          gx[i + k] = (double)product[k];
        }
      }
    }
    return;
  }
  alignas(64) Scalar block_g[kStrip], block_gx[kStrip];
  Unit unit;
  unit.slope = splat<V>((Scalar)args.slope);
  unit.dropout = dropout<T, kAct>(args, 0);
  const bool flat = is_flat<T>(args);
  const int64_t step = flat ? kFlat<T> : kStrip;
  for (int64_t strip = 0; strip < args.channels; strip += step) {
    const int64_t count = min_of(step, args.channels - strip);
    memset(g + strip, 0, count * sizeof(double));
    memset(gx + strip, 0, count * sizeof(double));
    for (int64_t block = m0; block < m1; block += kColumnBlock) {
      const int64_t block_end = min_of(block + kColumnBlock, m1);
      memset(block_g, 0, count * sizeof(Scalar));
      memset(block_gx, 0, count * sizeof(Scalar));
      if (flat) {
        const int64_t at = m0 * args.channels + strip * (m1 - m0) + (block - m0) * kFlat<T>;
        flat_gradient_sums<T, kAct, kBits>(args, at, block_end - block, block_g, block_gx);
      } else {
        walk_ascending<2>(block, block_end, [&](int64_t m, auto rows) NORMDROP_LAMBDA {
          for (int64_t c = 0; c < count; c += U) {
            unit.load(args, strip + c);
            V sum[U / W] = {}, product[U / W] = {};
            NORMDROP_UNROLL
            for (int64_t r = 0; r < decltype(rows)::rows; ++r) {
              const int64_t i = (m + r) * args.channels + strip + c;
              const int64_t ahead = i + kRowsAhead * args.channels;
              prefetch_second_level(static_cast<const T*>(args.x) + ahead);
              prefetch_second_level(static_cast<const T*>(args.grad_y) + ahead);
              const Bits bits = unit.bits(args, i);
              NORMDROP_UNROLL
              for (int64_t u = 0; u < U / W; ++u) {
                V d;
                const V value = unit.g(args, i, u, bits, d);
                sum[u] += value;
                product[u] = fma(value, d, product[u]);
              }
            }
            NORMDROP_UNROLL
            for (int64_t u = 0; u < U / W; ++u) {
              const int64_t to = c + u * W;
              store_vector(block_g + to, load_vector<V>(block_g + to) + sum[u]);
              store_vector(block_gx + to, load_vector<V>(block_gx + to) + product[u]);
            }
          }
        });
      }
      for (int64_t c = 0; c < count; c += kDoubles) {
        double *to_g = g + strip + c, *to_gx = gx + strip + c;
        store_vector(to_g, load_vector<F64>(to_g) + load_doubles(block_g + c));
        store_vector(to_gx, load_vector<F64>(to_gx) + load_doubles(block_gx + c));
      }
    }
  }
}

// ---- Channels: one vector element each, in double ----------------------------------------------

// Partial moments are brought together about the first one's mean: no division a part, and an
// error of a few roundings in double of the result.
bool merge_columns(const ColumnParts& parts, const double* counts, double* mean, double* var) {
  const int64_t channels = parts.channels;
  bool is_finite = true;
  for (int64_t c = 0; c < channels; c += kDoubles) {
    F64 sum{}, m2{}, total{}, origin{};
    for (int64_t p = 0; p < parts.count; ++p) {
      const F64 part_mean = load_vector<F64>(parts.first + p * channels + c);
      const F64 part_m2 = load_vector<F64>(parts.second + p * channels + c);
      const F64 n = splat<F64>(counts[p / parts.fold]);
      origin = p == 0 ? part_mean : origin;
      const F64 move = part_mean - origin;
      const F64 moved = n * move;
      total += n;
      sum += moved;
      m2 += fma(moved, move, part_m2);
    }
    const F64 shift = sum / total;
    const F64 result = origin + shift, variance = not_negative((m2 - sum * shift) / total);
    const int64_t n = min_of(kDoubles, channels - c);
    store_first<double>(mean + c, result, n);
    store_first<double>(var + c, variance, n);
    const F64 probe = (result - result) + (variance - variance);  // NaN unless both are finite
    for (int64_t k = 0; k < n; ++k) {
      is_finite = is_finite && probe[k] == 0.0;
    }
  }
  return is_finite;
}

void add_columns(const ColumnParts& parts, double* first, double* second) {
  const int64_t channels = parts.channels;
  for (int64_t c = 0; c < channels; c += kDoubles) {
    F64 a{}, b{};
    for (int64_t p = 0; p < parts.count; ++p) {
      a += load_vector<F64>(parts.first + p * channels + c);
      b += load_vector<F64>(parts.second + p * channels + c);
    }
    const int64_t n = min_of(kDoubles, channels - c);
    store_first<double>(first + c, a, n);
    store_first<double>(second + c, b, n);
  }
}

NORMDROP_INLINE F64 rounded(F64 v, float) {
  alignas(64) float buffer[kDoubles];
  store_doubles(buffer, v);
  return load_doubles(buffer);
}
NORMDROP_INLINE F64 rounded(F64 v, double) { return v; }

template <class Scalar>
NORMDROP_INLINE void store_constant(const ChannelArgs& args, const void* vector, int64_t c, F64 v,
                                    int64_t n) {
  Scalar* to = const_cast<Scalar*>(static_cast<const Scalar*>(vector)) + c;
  alignas(64) Scalar buffer[kDoubles];
  store_doubles(buffer, v);
  for (int64_t f = 0; f < args.fold; ++f, to += args.channels) {
    if (n == kDoubles) {
      memcpy(to, buffer, sizeof(buffer));
    } else {
      memcpy(to, buffer, (size_t)n * sizeof(Scalar));
    }
  }
}

template <class T>
void set_forward(const ChannelArgs& args, const BatchNormArgs& loops, int64_t c0, int64_t c1) {
  using Scalar = ScalarOf<T>;
  const F64 one = splat<F64>(1.0), eps = splat<F64>(args.eps);
  for (int64_t c = c0; c < c1; c += kDoubles) {
    const int64_t n = min_of(kDoubles, c1 - c);
    const F64 mean = load_first<double>(args.mean + c, n);
    const F64 invstd = one / sqrt_of(load_first<double>(args.var + c, n) + eps);
    const F64 weight = args.weight == nullptr ? one : load_first<double>(args.weight + c, n);
    const F64 bias = args.bias == nullptr ? F64{} : load_first<double>(args.bias + c, n);
    const F64 center = rounded(mean, Scalar{}), scale = weight * invstd;
    store_constant<Scalar>(args, loops.center, c, center, n);
    store_constant<Scalar>(args, loops.scale, c, scale, n);
    store_constant<Scalar>(args, loops.shift, c, bias + (center - mean) * scale, n);
  }
}

// From the sums about the center to the gradients of bias and weight, in place.
template <class T>
void set_backward(const ChannelArgs& args, const BatchNormArgs& loops, int64_t c0, int64_t c1,
                  double* g, double* gx) {
  using Scalar = ScalarOf<T>;
  const F64 one = splat<F64>(1.0), eps = splat<F64>(args.eps);
  const F64 share = splat<F64>(-1.0 / args.count);
  const I64 training = loops.training ? ~I64{} : I64{};
  for (int64_t c = c0; c < c1; c += kDoubles) {
    const int64_t n = min_of(kDoubles, c1 - c);
    const F64 mean = load_first<double>(args.mean + c, n);
    const F64 invstd = one / sqrt_of(load_first<double>(args.var + c, n) + eps);
    const F64 weight = args.weight == nullptr ? one : load_first<double>(args.weight + c, n);
    const F64 off = rounded(mean, Scalar{}) - mean, scale = weight * invstd;
    const F64 sum_g = load_first<double>(g + c, n);
    const F64 sum_gx = (load_first<double>(gx + c, n) + off * sum_g) * invstd;
    store_first<double>(gx + c, sum_gx, n);
    const F64 slope = scale * invstd * sum_gx * share;
    const F64 shift = slope * off + scale * sum_g * share;
    store_constant<Scalar>(args, loops.grad_slope, c, keep_where(training, slope), n);
    store_constant<Scalar>(args, loops.grad_shift, c, keep_where(training, shift), n);
  }
}

// ---- What float cannot hold --------------------------------------------------------------------

// Two passes in double, for a channel whose sums overflowed in float, or that holds NaN.
template <class T>
void exact_statistics(const BatchNormArgs& args, int64_t c, Moments* result) {
  const T* x = static_cast<const T*>(args.x);
  const double count = (double)(args.outer * args.inner);
  double sum = 0.0, m2 = 0.0;
  for (int pass = 0; pass < 2; ++pass) {
    const double mean = sum / count;
    for (int64_t o = 0; o < args.outer; ++o) {
      const T* row = x + (o * args.channels + c) * args.inner;
      for (int64_t i = 0; i < args.inner; ++i) {
        const double value = (double)load_first<T>(row + i, 1)[0];
        if (pass == 0) {
          sum += value;
        } else {
          m2 += (value - mean) * (value - mean);
        }
      }
    }
  }
  *result = {count, sum / count, m2};
}

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

template <class T>
void row_normalize(const BatchNormArgs& args, int64_t o0, int64_t o1, int64_t c0, int64_t c1,
                   int64_t i0, int64_t i1) {
  NORMDROP_CHOOSE_NORMALIZE(normalize_rows, o0, o1, c0, c1, i0, i1)
}

template <class T>
void row_gradients(const BatchNormArgs& args, int64_t o0, int64_t o1, int64_t c0, int64_t c1,
                   int64_t i0, int64_t i1) {
  NORMDROP_CHOOSE_GRADIENT(gradient_rows, o0, o1, c0, c1, i0, i1)
}

template <class T>
void row_gradient_sums(const BatchNormArgs& args, int64_t c0, int64_t c1, int64_t b0, int64_t b1,
                       GradientSums* result) {
  NORMDROP_CHOOSE_GRADIENT(gradient_sums_rows, c0, c1, b0, b1, result)
}

template <class T>
void column_normalize(const BatchNormArgs& args, int64_t m0, int64_t m1) {
  NORMDROP_CHOOSE_NORMALIZE(normalize_columns, m0, m1)
}

template <class T>
void column_gradients(const BatchNormArgs& args, int64_t m0, int64_t m1) {
  NORMDROP_CHOOSE_GRADIENT(gradient_columns, m0, m1)
}

template <class T>
void column_gradient_sums(const BatchNormArgs& args, int64_t m0, int64_t m1, double* g,
                          double* gx) {
  NORMDROP_CHOOSE_GRADIENT(gradient_sums_columns, m0, m1, g, gx)
}

}  // namespace

// In the order of DataType.
#define NORMDROP_TYPES(function) \
  {function<float>, function<double>, function<bfloat16>, function<half>}

extern const BatchNormKernels batch_norm_kernels = {NORMDROP_TYPES(statistics_rows),
                                                    NORMDROP_TYPES(row_gradient_sums),
                                                    NORMDROP_TYPES(row_normalize),
                                                    NORMDROP_TYPES(row_gradients),
                                                    NORMDROP_TYPES(statistics_columns),
                                                    NORMDROP_TYPES(column_gradient_sums),
                                                    NORMDROP_TYPES(column_normalize),
                                                    NORMDROP_TYPES(column_gradients),
                                                    NORMDROP_TYPES(exact_statistics),
                                                    merge_columns,
                                                    add_columns,
                                                    NORMDROP_TYPES(set_forward),
                                                    NORMDROP_TYPES(set_backward)};

}  // namespace normdrop::NORMDROP_ISA
