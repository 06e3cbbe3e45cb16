// Batch normalization of columns: inner = 1. See loops.h.
//
// A row has a multiple of kColumnMultiple columns, so it is whole vectors and whole bytes of bits.
// Memory wants few streams, each read in order: beyond the second-level cache, sums that took four
// rows of two tensors side by side, eight streams, were 2.5 times slower than one row after the
// other. So where the constants repeat every few vectors, sums run over all elements in order and
// stay in registers (flat); elsewhere they take a few rows together, so that constants and sums are
// loaded and stored less often, and fetch the rows after those into the second-level cache.

#include "batch_norm/loops.h"

namespace normdrop::NORMDROP_ISA {
namespace {

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

extern const BatchNormColumns batch_norm_columns = {
    NORMDROP_TYPES(statistics_columns), NORMDROP_TYPES(column_gradient_sums),
    NORMDROP_TYPES(column_normalize), NORMDROP_TYPES(column_gradients)};

}  // namespace normdrop::NORMDROP_ISA
