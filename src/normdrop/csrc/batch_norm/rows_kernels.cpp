// Batch normalization of rows: inner > 1. See loops.h.

#include "batch_norm/loops.h"

namespace normdrop::NORMDROP_ISA {
namespace {

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

}  // namespace

extern const BatchNormRows batch_norm_rows = {
    NORMDROP_TYPES(statistics_rows), NORMDROP_TYPES(row_gradient_sums),
    NORMDROP_TYPES(row_normalize), NORMDROP_TYPES(row_gradients)};

}  // namespace normdrop::NORMDROP_ISA
