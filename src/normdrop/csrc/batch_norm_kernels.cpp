// Batch normalization: the loops.
//
//   forward    y_hat = (x - mean) * invstd * weight + bias, computed as
//              y_hat = (x - center) * scale + shift, center being the mean rounded to float,
//              scale = invstd * weight, shift = bias + (center - mean) * scale;
//              y = act(y_hat + residual)
//   backward   g = grad_y * act'(y_hat + residual), which is also residual's gradient,
//              grad_bias = sum g, grad_weight = invstd * sum g * (x - mean),
//              grad_x = scale * (g - mean(g) - (x - mean) * invstd^2 * mean(g * (x - mean))),
//              computed as g * scale + (x - center) * grad_slope + grad_shift
//
// x is (outer, channels, inner). float, bfloat16 and half are computed in float, at most 4096
// elements of a channel (128 rows of columns) being summed in float before they go to double.
// Sums of squares are shifted by the mean of the elements before, so that nothing cancels: the
// error of m2 is at most a few roundings of m2 itself, wherever the mean is.
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

// act(z) = z for z > 0, slope * z elsewhere; slope 0 makes 0 of minus infinity, too.
template <class T>
struct Bend {
  VectorOf<T> slope;
  MaskOf<T> has_slope;

  NORMDROP_METHOD Bend() = default;
  explicit NORMDROP_METHOD Bend(double value)
      : slope(splat<VectorOf<T>>((ScalarOf<T>)value)),
        has_slope(value != 0.0 ? ~MaskOf<T>{} : MaskOf<T>{}) {}

  // NaN counts as positive, as in torch.
  static NORMDROP_METHOD MaskOf<T> is_negative(VectorOf<T> z) {
    return (MaskOf<T>)(z <= VectorOf<T>{});
  }
  NORMDROP_METHOD VectorOf<T> apply(VectorOf<T> a, MaskOf<T> negative) const {
    return select(negative, keep_where(has_slope, a * slope), a);
  }
};

template <class T, bool kBent, bool kResidual, template <class> class Constants>
struct Normalize {
  using V = VectorOf<T>;
  static constexpr bool kHasBits = kResidual && kBent;
  const T* x;
  const T* residual;
  T* y;
  uint8_t* positive;  // of the span's first element, or null
  Constants<T> center, scale, shift;
  Bend<T> bend;

  NORMDROP_METHOD V activated(V z, uint32_t& bits) const {
    if constexpr (kBent) {
      const MaskOf<T> negative = Bend<T>::is_negative(z);
      bits = kHasBits ? bits_of(~negative) : 0;
      return bend.apply(z, negative);
    }
    return z;
  }

  // Elements [i, i + width): computes y, gives the bits.
  template <bool kStream>
  NORMDROP_METHOD uint32_t whole(int64_t i) const {
    V z = fma(Lanes<T>::load(x + i) - center.at(i), scale.at(i), shift.at(i));
    if constexpr (kResidual) {
      z += Lanes<T>::load(residual + i);
    }
    uint32_t bits = 0;
    put<T, kStream>(y + i, activated(z, bits));
    return bits;
  }

  // Elements [i, i + n), n < width.
  NORMDROP_METHOD uint32_t partial(int64_t i, int64_t n) const {
    V z = fma(load_first<T>(x + i, n) - center.first(i, n), scale.first(i, n), shift.first(i, n));
    if constexpr (kResidual) {
      z += load_first<T>(residual + i, n);
    }
    uint32_t bits = 0;
    store_first<T>(y + i, activated(z, bits), n);
    return bits;
  }

  // Whole vectors from i on; gives where they end.
  template <bool kStream>
  NORMDROP_METHOD int64_t body(int64_t i, int64_t n) const {
    constexpr int64_t W = Lanes<T>::width;
    for (; i + kUnroll * W <= n; i += kUnroll * W) {
      uint64_t bits = 0;
      NORMDROP_UNROLL
      for (int64_t u = 0; u < kUnroll; ++u) {
        bits |= (uint64_t)whole<kStream>(i + u * W) << (u * W);
      }
      if constexpr (kHasBits) {
        memcpy(positive + i / 8, &bits, kUnroll * W / 8);
      }
    }
    return i;
  }

  NORMDROP_METHOD void span(int64_t n, bool stream) const {
    constexpr int64_t W = Lanes<T>::width;
    const int64_t head = stream ? unaligned_head(y, n, kHasBits) : -1;
    if (head > 0) {
      partial(0, head);
    }
    int64_t i = head >= 0 ? body<true>(head, n) : body<false>(0, n);
    uint64_t bits = 0;
    const int64_t rest = i;
    for (; i + W <= n; i += W) {
      bits |= (uint64_t)whole<false>(i) << (i - rest);
    }
    if (i < n) {
      bits |= (uint64_t)partial(i, n - i) << (i - rest);
    }
    if constexpr (kHasBits) {
      for (int64_t done = rest; done < n; done += 8, bits >>= 8) {
        positive[done / 8] = (uint8_t)bits;
      }
    }
  }
};

template <class T, bool kBent, bool kBits, template <class> class Constants>
struct Gradient {
  using V = VectorOf<T>;
  const T* x;
  const T* grad_y;
  const uint8_t* positive;
  Constants<T> center, scale, shift;
  Bend<T> bend;

  // g, and d = x - center, of elements [i, i + width).
  NORMDROP_METHOD V whole(int64_t i, uint64_t bits, V& d) const {
    d = Lanes<T>::load(x + i) - center.at(i);
    const V g = Lanes<T>::load(grad_y + i);
    if constexpr (kBent && kBits) {
      return bend.apply(g, ~mask_of<MaskOf<T>>((uint32_t)bits));
    } else if constexpr (kBent) {
      return bend.apply(g, Bend<T>::is_negative(fma(d, scale.at(i), shift.at(i))));
    }
    return g;
  }

  // The same of [i, i + n), n < width; zero beyond.
  NORMDROP_METHOD V partial(int64_t i, int64_t n, uint64_t bits, V& d) const {
    d = keep_where(first_lanes<MaskOf<T>>(n), load_first<T>(x + i, n) - center.first(i, n));
    const V g = load_first<T>(grad_y + i, n);
    if constexpr (kBent && kBits) {
      return bend.apply(g, ~mask_of<MaskOf<T>>((uint32_t)bits));
    } else if constexpr (kBent) {
      return bend.apply(g, Bend<T>::is_negative(fma(d, scale.first(i, n), shift.first(i, n))));
    }
    return g;
  }

  // The bits of elements [i, i + n), n <= 64, i divisible by 8.
  NORMDROP_METHOD uint64_t bits(int64_t i, int64_t n) const {
    uint64_t result = 0;
    if constexpr (kBent && kBits) {
      for (int64_t byte = 0; byte * 8 < n; ++byte) {
        result |= (uint64_t)positive[i / 8 + byte] << (8 * byte);
      }
    }
    return result;
  }
  NORMDROP_METHOD uint64_t unrolled_bits(int64_t i) const {
    uint64_t result = 0;
    if constexpr (kBent && kBits) {
      memcpy(&result, positive + i / 8, kUnroll * Lanes<T>::width / 8);
    }
    return result;
  }
};

template <class T, bool kBent, bool kBits, template <class> class Constants>
struct GradientX {
  using V = VectorOf<T>;
  Gradient<T, kBent, kBits, Constants> gradient;
  T* grad_x;
  T* grad_residual;  // or null
  Constants<T> grad_slope, grad_shift;
  MaskOf<T> training;  // in evaluation an infinite x must not reach the gradient

  template <bool kStream>
  NORMDROP_METHOD void whole(int64_t i, uint64_t bits) const {
    V d;
    const V g = gradient.whole(i, bits, d);
    const V inner = fma(keep_where(training, d), grad_slope.at(i), grad_shift.at(i));
    put<T, kStream>(grad_x + i, fma(g, gradient.scale.at(i), inner));
    if (grad_residual != nullptr) {
      put<T, kStream>(grad_residual + i, g);
    }
  }

  NORMDROP_METHOD void partial(int64_t i, int64_t n, uint64_t bits) const {
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
      const uint64_t bits = gradient.unrolled_bits(i);
      NORMDROP_UNROLL
      for (int64_t u = 0; u < kUnroll; ++u) {
        whole<kStream>(i + u * W, bits >> (u * W));
      }
    }
    return i;
  }

  NORMDROP_METHOD void span(int64_t n, bool stream) const {
    constexpr int64_t W = Lanes<T>::width;
    const bool tied = (kBent && kBits) || grad_residual != nullptr;
    const int64_t head = stream ? unaligned_head(grad_x, n, tied) : -1;
    if (head > 0) {
      partial(0, head, 0);
    }
    int64_t i = head >= 0 ? body<true>(head, n) : body<false>(0, n);
    const int64_t rest = i;
    const uint64_t bits = i < n ? gradient.bits(i, n - i) : 0;
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

template <class T, bool kBent, bool kResidual>
void normalize_rows(const BatchNormArgs& args, int64_t o0, int64_t o1, int64_t c0, int64_t c1,
                    int64_t i0, int64_t i1) {
  const int64_t sample = args.channels * args.inner;
  for (int64_t o = o1 - 1; o >= o0; --o) {
    for (int64_t c = c0; c < c1; ++c) {
      const int64_t row = o * args.channels + c;
      const int64_t at = row * args.inner + i0;
      const Normalize<T, kBent, kResidual, Broadcast> work = {
          static_cast<const T*>(args.x) + at,
          kResidual ? static_cast<const T*>(args.residual) + at : nullptr,
          static_cast<T*>(args.out) + at,
          args.positive != nullptr ? args.positive + row * bit_bytes(args.inner) + i0 / 8 : nullptr,
          broadcast<T>(args.center, c),
          broadcast<T>(args.scale, c),
          broadcast<T>(args.shift, c),
          Bend<T>(args.slope)};
      if (o > o0) {
        prefetch_row(work.x - sample, i1 - i0);
        if constexpr (kResidual) {
          prefetch_row(work.residual - sample, i1 - i0);
        }
      }
      work.span(i1 - i0, args.stream);
    }
  }
  stream_fence();
}

template <class T, bool kBent, bool kBits>
NORMDROP_INLINE Gradient<T, kBent, kBits, Broadcast> row_gradient(const BatchNormArgs& args,
                                                                  int64_t o, int64_t c, int64_t i) {
  const int64_t row = o * args.channels + c;
  const int64_t at = row * args.inner + i;
  return {static_cast<const T*>(args.x) + at,
          static_cast<const T*>(args.grad_y) + at,
          kBits ? args.positive + row * bit_bytes(args.inner) + i / 8 : nullptr,
          broadcast<T>(args.center, c),
          broadcast<T>(args.scale, c),
          broadcast<T>(args.shift, c),
          Bend<T>(args.slope)};
}

template <class T, bool kBent, bool kBits>
void gradient_rows(const BatchNormArgs& args, int64_t o0, int64_t o1, int64_t c0, int64_t c1,
                   int64_t i0, int64_t i1) {
  const int64_t sample = args.channels * args.inner;
  for (int64_t o = o1 - 1; o >= o0; --o) {
    for (int64_t c = c0; c < c1; ++c) {
      const int64_t at = (o * args.channels + c) * args.inner + i0;
      const GradientX<T, kBent, kBits, Broadcast> work = {
          row_gradient<T, kBent, kBits>(args, o, c, i0),
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
template <class T>
NORMDROP_INLINE void sum_row(const T* x, int64_t n, VectorOf<T> shift, VectorOf<T>& total_d,
                             VectorOf<T>& total_dd) {
  using V = VectorOf<T>;
  constexpr int64_t W = Lanes<T>::width;
  V d_sum[kUnroll] = {}, dd_sum[kUnroll] = {};
  int64_t i = 0;
  for (; i + kUnroll * W <= n; i += kUnroll * W) {
    NORMDROP_UNROLL
    for (int64_t u = 0; u < kUnroll; ++u) {
      const V d = Lanes<T>::load(x + i + u * W) - shift;
      d_sum[u] += d;
      dd_sum[u] = fma(d, d, dd_sum[u]);
    }
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

constexpr int64_t kChannelTile = 32;

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
    V d_sum[kChannelTile], dd_sum[kChannelTile];
    for (int64_t c = tile; c < tile_end; ++c) {
      const int64_t o = b0 / blocks.parts * blocks.rows, i = b0 % blocks.parts * blocks.length;
      const T* start = x + (o * args.channels + c) * args.inner + i;
      sums[c - tile].start((double)(Scalar)mean_of_first(start, min_of(64, args.inner - i)));
    }
    for (int64_t b = b0; b < b1; ++b) {
      for (int64_t c = tile; c < tile_end; ++c) {
        d_sum[c - tile] = dd_sum[c - tile] = V{};
      }
      double count = 0.0;
      walk_block(args, blocks, b, tile, tile_end,
                 [&](int64_t o, int64_t c, int64_t i, int64_t n) NORMDROP_LAMBDA {
                   const T* row = x + (o * args.channels + c) * args.inner + i;
                   if (o + 1 < args.outer) {
                     prefetch_row(row + args.channels * args.inner, n);
                   }
                   sum_row<T>(row, n, splat<V>((Scalar)sums[c - tile].shift), d_sum[c - tile],
                              dd_sum[c - tile]);
                   count += c == tile ? (double)n : 0.0;
                 });
      for (int64_t c = 0; c < tile_end - tile; ++c) {
        sums[c].template add<Scalar>(count, sum_of(d_sum[c]), sum_of(dd_sum[c]));
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
    const uint64_t bits = source.unrolled_bits(i);
    NORMDROP_UNROLL
    for (int64_t u = 0; u < kUnroll; ++u) {
      const V g = source.whole(i + u * W, bits >> (u * W), d);
      g_sum[u] += g;
      gx_sum[u] = fma(g, d, gx_sum[u]);
    }
  }
  const int64_t rest = i;
  const uint64_t bits = i < n ? source.bits(i, n - i) : 0;
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

template <class T, bool kBent, bool kBits>
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
                   const auto source = row_gradient<T, kBent, kBits>(args, o, c, i);
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

// The bits of n elements from element i on, n <= 16, within their bytes.
template <bool kBits>
NORMDROP_INLINE uint64_t bits_at(const uint8_t* bytes, int64_t i, int64_t n) {
  if constexpr (!kBits) {
    return 0;
  }
  const uint32_t bits = n > 8 ? bytes[i / 8] | (uint32_t)bytes[i / 8 + 1] << 8 : bytes[i / 8];
  return bits >> (i % 8);
}

// ---- Columns: inner = 1 ------------------------------------------------------------------------

constexpr int64_t kFirstRows = 8;  // whose mean is the first shift

// Calls visit(m) for the rows [m0, m1): the last 64 KiB first, since a pass before this one left
// them in the cache, but ascending within, since that is what the processor prefetches.
template <class T, class Visit>
NORMDROP_INLINE void walk_columns(const BatchNormArgs& args, int64_t m0, int64_t m1,
                                  const Visit& visit) {
  const int64_t run = 65536 / (int64_t)sizeof(T) / args.channels + 1;
  for (int64_t end = m1; end > m0; end -= run) {
    for (int64_t m = end - run > m0 ? end - run : m0; m < end; ++m) {
      visit(m);
    }
  }
  stream_fence();
}

template <class T, bool kBent, bool kResidual>
void normalize_columns(const BatchNormArgs& args, int64_t m0, int64_t m1) {
  walk_columns<T>(args, m0, m1, [&](int64_t m) NORMDROP_LAMBDA {
    const int64_t at = m * args.channels;
    const Normalize<T, kBent, kResidual, Columns> work = {
        static_cast<const T*>(args.x) + at,
        kResidual ? static_cast<const T*>(args.residual) + at : nullptr,
        static_cast<T*>(args.out) + at,
        args.positive != nullptr ? args.positive + at / 8 : nullptr,
        columns<T>(args.center, 0),
        columns<T>(args.scale, 0),
        columns<T>(args.shift, 0),
        Bend<T>(args.slope)};
    work.span(args.channels, args.stream);
  });
}

template <class T, bool kBent, bool kBits>
NORMDROP_INLINE Gradient<T, kBent, kBits, Columns> column_gradient(const BatchNormArgs& args,
                                                                   int64_t at, int64_t c) {
  return {static_cast<const T*>(args.x) + at,
          static_cast<const T*>(args.grad_y) + at,
          kBits ? args.positive + at / 8 : nullptr,
          columns<T>(args.center, c),
          columns<T>(args.scale, c),
          columns<T>(args.shift, c),
          Bend<T>(args.slope)};
}

template <class T, bool kBent, bool kBits>
void gradient_columns(const BatchNormArgs& args, int64_t m0, int64_t m1) {
  walk_columns<T>(args, m0, m1, [&](int64_t m) NORMDROP_LAMBDA {
    const int64_t at = m * args.channels;
    const GradientX<T, kBent, kBits, Columns> work = {
        column_gradient<T, kBent, kBits>(args, at, 0),
        static_cast<T*>(args.out) + at,
        args.grad_residual != nullptr ? static_cast<T*>(args.grad_residual) + at : nullptr,
        columns<T>(args.grad_slope, 0),
        columns<T>(args.grad_shift, 0),
        args.training ? ~MaskOf<T>{} : MaskOf<T>{}};
    work.span(args.channels, args.stream);
  });
}

// Columns whose sums stay in the first-level cache. They are loaded and stored for every row: to
// hold them in registers over several rows read 1.4 times slower, memory wants one stream.
constexpr int64_t kStrip = 512;

template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

// Calls visit(c, n, whole) for every vector of columns of a strip, n < width for the last.
template <class T, class Visit>
NORMDROP_INLINE void walk_strip(int64_t count, const Visit& visit) {
  int64_t c = 0;
  for (; c + Lanes<T>::width <= count; c += Lanes<T>::width) {
    visit(c, Lanes<T>::width, Flag<true>{});
  }
  if (c < count) {
    visit(c, count - c, Flag<false>{});
  }
}

template <class T>
void statistics_columns(const BatchNormArgs& args, int64_t m0, int64_t m1, double* mean,
                        double* m2) {
  using V = VectorOf<T>;
  using Scalar = ScalarOf<T>;
  constexpr int64_t W = Lanes<T>::width;
  // The sums of a block about `shift`, and all sums about `origin`, the first shift.
  Scalar shift[kStrip + W], block_d[kStrip + W], block_dd[kStrip + W], origin[kStrip + W];
  double d[kStrip + W], dd[kStrip + W];
  for (int64_t strip = 0; strip < args.channels; strip += kStrip) {
    const int64_t count = min_of(kStrip, args.channels - strip);
    const T* x = static_cast<const T*>(args.x) + strip;
    const auto load = [&](int64_t m, int64_t c, int64_t n, auto whole) NORMDROP_LAMBDA {
      const T* at = x + m * args.channels + c;
      if constexpr (decltype(whole)::value) {
        return Lanes<T>::load(at);
      } else {
        return load_first<T>(at, n);
      }
    };
    const int64_t first_rows = min_of(kFirstRows, m1 - m0);
    walk_strip<T>(count, [&](int64_t c, int64_t n, auto whole) NORMDROP_LAMBDA {
      V sum{};
      for (int64_t m = m0; m < m0 + first_rows; ++m) {
        sum += load(m, c, n, whole);
      }
      sum = sum / splat<V>((Scalar)first_rows);
      store_vector(shift + c, sum);
      store_vector(origin + c, sum);
    });
    memset(d, 0, sizeof(d));
    memset(dd, 0, sizeof(dd));
    for (int64_t block = m0; block < m1; block += kColumnBlock) {
      const int64_t block_end = min_of(block + kColumnBlock, m1);
      memset(block_d, 0, sizeof(block_d));
      memset(block_dd, 0, sizeof(block_dd));
      for (int64_t m = block; m < block_end; ++m) {
        walk_strip<T>(count, [&](int64_t c, int64_t n, auto whole) NORMDROP_LAMBDA {
          const V difference = load(m, c, n, whole) - load_vector<V>(shift + c);
          store_vector(block_d + c, load_vector<V>(block_d + c) + difference);
          store_vector(block_dd + c, fma(difference, difference, load_vector<V>(block_dd + c)));
        });
      }
      const F64 rows = splat<F64>((double)(block_end - block));
      const F64 share = splat<F64>(1.0 / (double)(block_end - block));
      for (int64_t c = 0; c < count; c += kDoubles) {
        const F64 s = load_doubles(block_d + c), q = load_doubles(block_dd + c);
        const F64 k = load_doubles(shift + c);
        const F64 move = k - load_doubles(origin + c);
        store_vector(d + c, load_vector<F64>(d + c) + fma(rows, move, s));
        store_vector(dd + c, load_vector<F64>(dd + c) + fma(move, s + fma(rows, move, s), q));
        store_doubles(shift + c, fma(s, share, k));
      }
    }
    const double share = 1.0 / (double)(m1 - m0);
    for (int64_t c = 0; c < count; ++c) {
      const double sum = dd[c] - d[c] * d[c] * share;
      mean[strip + c] = (double)origin[c] + d[c] * share;
      m2[strip + c] = sum < 0.0 ? 0.0 : sum;
    }
  }
}

template <class T, bool kBent, bool kBits>
void gradient_sums_columns(const BatchNormArgs& args, int64_t m0, int64_t m1, double* g,
                           double* gx) {
  using V = VectorOf<T>;
  using Scalar = ScalarOf<T>;
  constexpr int64_t W = Lanes<T>::width;
  Scalar block_g[kStrip + W], block_gx[kStrip + W];
  for (int64_t strip = 0; strip < args.channels; strip += kStrip) {
    const int64_t count = min_of(kStrip, args.channels - strip);
    memset(g + strip, 0, count * sizeof(double));
    memset(gx + strip, 0, count * sizeof(double));
    for (int64_t block = m0; block < m1; block += kColumnBlock) {
      const int64_t block_end = min_of(block + kColumnBlock, m1);
      memset(block_g, 0, sizeof(block_g));
      memset(block_gx, 0, sizeof(block_gx));
      for (int64_t m = block; m < block_end; ++m) {
        const int64_t row = m * args.channels + strip;
        walk_strip<T>(count, [&](int64_t c, int64_t n, auto whole) NORMDROP_LAMBDA {
          const auto source = column_gradient<T, kBent, kBits>(args, row + c, strip + c);
          const uint64_t bits = bits_at < kBent && kBits > (args.positive, row + c, n);
          V value, difference;
          if constexpr (decltype(whole)::value) {
            value = source.whole(0, bits, difference);
          } else {
            value = source.partial(0, n, bits, difference);
          }
          store_vector(block_g + c, load_vector<V>(block_g + c) + value);
          store_vector(block_gx + c, fma(value, difference, load_vector<V>(block_gx + c)));
        });
      }
      for (int64_t c = 0; c < count; ++c) {
        g[strip + c] += (double)block_g[c];
        gx[strip + c] += (double)block_gx[c];
      }
    }
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

#define NORMDROP_CHOOSE_NORMALIZE(function, ...)                                    \
  if (args.slope == 1.0) {                                                          \
    return args.residual != nullptr ? function<T, false, true>(args, __VA_ARGS__)   \
                                    : function<T, false, false>(args, __VA_ARGS__); \
  }                                                                                 \
  return args.residual != nullptr ? function<T, true, true>(args, __VA_ARGS__)      \
                                  : function<T, true, false>(args, __VA_ARGS__);

#define NORMDROP_CHOOSE_GRADIENT(function, ...)                                \
  if (args.slope == 1.0) {                                                     \
    return function<T, false, false>(args, __VA_ARGS__);                       \
  }                                                                            \
  return args.positive != nullptr ? function<T, true, true>(args, __VA_ARGS__) \
                                  : function<T, true, false>(args, __VA_ARGS__);

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

extern const BatchNormKernels batch_norm_kernels = {
    NORMDROP_TYPES(statistics_rows),    NORMDROP_TYPES(row_gradient_sums),
    NORMDROP_TYPES(row_normalize),      NORMDROP_TYPES(row_gradients),
    NORMDROP_TYPES(statistics_columns), NORMDROP_TYPES(column_gradient_sums),
    NORMDROP_TYPES(column_normalize),   NORMDROP_TYPES(column_gradients),
    NORMDROP_TYPES(exact_statistics)};

}  // namespace normdrop::NORMDROP_ISA
