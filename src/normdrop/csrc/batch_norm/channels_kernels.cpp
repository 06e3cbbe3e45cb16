// Batch normalization: what is done once a channel, in double. See loops.h.

#include "batch_norm/loops.h"

namespace normdrop::NORMDROP_ISA {
namespace {

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

}  // namespace

extern const BatchNormChannels batch_norm_channels = {
    NORMDROP_TYPES(exact_statistics), merge_columns, add_columns, NORMDROP_TYPES(set_forward),
    NORMDROP_TYPES(set_backward)};

}  // namespace normdrop::NORMDROP_ISA
