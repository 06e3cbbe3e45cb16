// The 3x3 convolution by Winograd's F(4x4, 3x3): see kernels.h. Everything in float32.
//
// Work is split by tiles, by columns of a matrix or by rows of a weight, each of which is computed
// by itself in a fixed order: there is no race, and no dependence on the number of threads.

#include "conv2d/kernels.h"

#if defined(__AVX2__)
#include "base/lanes.h"
#include "conv2d/products.h"
#include "conv2d/transforms.h"
#endif

namespace normdrop::NORMDROP_ISA {

#if defined(__AVX2__)
namespace {

// ---- helpers ------------------------------------------------------------------------------------

// Transforms kInside x kInside vectors, in(i, j) being the one of row i and column j, by kLine in
// both directions, and calls out(position, vector).
template <int kInside, int kOutside, void (*kLine)(const F32*, F32*), class In, class Out>
NORMDROP_INLINE void transform_tile(const In& in, const Out& out) {
  F32 columns[kOutside * kInside];
  NORMDROP_UNROLL for (int j = 0; j < kInside; ++j) {
    F32 from[kInside], to[kOutside];
    NORMDROP_UNROLL for (int i = 0; i < kInside; ++i) { from[i] = in(i, j); }
    kLine(from, to);
    NORMDROP_UNROLL for (int i = 0; i < kOutside; ++i) { columns[i * kInside + j] = to[i]; }
  }
  NORMDROP_UNROLL for (int i = 0; i < kOutside; ++i) {
    F32 to[kOutside];
    kLine(columns + i * kInside, to);
    NORMDROP_UNROLL for (int j = 0; j < kOutside; ++j) { out(i, j, to[j]); }
  }
}

// Calls visit(c, n) for the vectors of channels [0, channels), n being the number of channels that
// a vector has.
template <class Visit>
NORMDROP_INLINE void each_vector(int64_t channels, const Visit& visit) {
  int64_t c = 0;
  for (; c + kFloats <= channels; c += kFloats) {
    visit(c, (int64_t)kFloats);
  }
  if (c < channels) {
    visit(c, channels - c);
  }
}

NORMDROP_INLINE F32 load(const float* p, int64_t n) {
  return n == kFloats ? load_vector<F32>(p) : load_first(p, n);
}
NORMDROP_INLINE void store(float* p, F32 v, int64_t n) {
  n == kFloats ? store_vector(p, v) : store_first(p, v, n);
}

NORMDROP_INLINE float* at(const Conv2dMatrix& matrix, int64_t row, int64_t column) {
  return matrix.data + row * matrix.row + column / kPanel * matrix.panel + column % kPanel;
}

// Calls visit(i, pixel, top, left) for every tile: the number i among them, the index of its map's
// first pixel, and its first row and column there.
template <class Visit>
NORMDROP_INLINE void each_tile(const Conv2dTiles& tiles, const Visit& visit) {
  for (int64_t i = 0; i < tiles.count; ++i) {
    const int64_t line = (tiles.first + i) / tiles.across;
    const int64_t sample = line / tiles.down;
    visit(i, sample * tiles.height * tiles.width, (line - sample * tiles.down) * kTile,
          (tiles.first + i - line * tiles.across) * kTile);
  }
}

// One row of `matrix` a tile: the kInside x kInside pixels from (-kBefore, -kBefore) on, zeros
// outside the map, transformed.
template <int kInside, int kBefore, void (*kLine)(const F32*, F32*)>
void transform_pixels(const Conv2dTiles& tiles, const float* x, int64_t channels,
                      const float* zeros, const Conv2dMatrix& matrix) {
  each_tile(tiles, [&](int64_t t, int64_t map, int64_t top, int64_t left) NORMDROP_LAMBDA {
    const float* pixels[kInside * kInside];
    for (int64_t i = 0; i < kInside; ++i) {
      for (int64_t j = 0; j < kInside; ++j) {
        const int64_t h = top + i - kBefore, w = left + j - kBefore;
        const bool is_inside = h >= 0 && h < tiles.height && w >= 0 && w < tiles.width;
        pixels[i * kInside + j] = is_inside ? x + (map + h * tiles.width + w) * channels : zeros;
      }
    }
    each_vector(channels, [&](int64_t c, int64_t n) NORMDROP_LAMBDA {
      float* to = at(matrix, t, c);
      transform_tile<kInside, 6, kLine>(
          [&](int i, int j) NORMDROP_LAMBDA { return load(pixels[i * kInside + j] + c, n); },
          [&](int i, int j, F32 v)
              NORMDROP_LAMBDA { store_vector(to + (i * 6 + j) * matrix.positions, v); });
    });
  });
}

// ---- weights ------------------------------------------------------------------------------------

typedef float F8 __attribute__((vector_size(32)));

NORMDROP_INLINE void transpose(F8* rows) {
  F8 pairs[8], fours[8];
  NORMDROP_UNROLL for (int i = 0; i < 8; i += 2) {
    pairs[i] = (F8)_mm256_unpacklo_ps((__m256)rows[i], (__m256)rows[i + 1]);
    pairs[i + 1] = (F8)_mm256_unpackhi_ps((__m256)rows[i], (__m256)rows[i + 1]);
  }
  NORMDROP_UNROLL for (int i = 0; i < 8; i += 4) {
    NORMDROP_UNROLL for (int j = 0; j < 2; ++j) {
      const __m256 low = (__m256)pairs[i + j], high = (__m256)pairs[i + j + 2];
      fours[i + 2 * j] = (F8)_mm256_shuffle_ps(low, high, 0x44);
      fours[i + 2 * j + 1] = (F8)_mm256_shuffle_ps(low, high, 0xEE);
    }
  }
  NORMDROP_UNROLL for (int i = 0; i < 4; ++i) {
    const __m256 low = (__m256)fours[i], high = (__m256)fours[i + 4];
    rows[i] = (F8)_mm256_permute2f128_ps(low, high, 0x20);
    rows[i + 4] = (F8)_mm256_permute2f128_ps(low, high, 0x31);
  }
}

// columns[c][s][k] = w[begin + k][s][first + c], zero where w has no such channel: eight channels
// that go in, the nine of a kernel, a panel of those that come out.
NORMDROP_INLINE void turn_weight(const Conv2dWeight& w, int64_t begin, int64_t first,
                                 float (*columns)[9][kPanel]) {
  for (int64_t k = 0; k < kPanel; k += 8) {
    const bool is_whole = begin + k + 8 <= w.out && first + 8 <= w.in;
    for (int64_t s = 0; s < 9; ++s) {
      F8 rows[8];
      for (int64_t i = 0; i < 8; ++i) {
        const float* from = w.data + ((begin + k + i) * 9 + s) * w.in + first;
        if (is_whole) {
          rows[i] = load_vector<F8>(from);
          continue;
        }
        rows[i] = F8{};
        for (int64_t c = 0; c < 8 && begin + k + i < w.out && first + c < w.in; ++c) {
          rows[i][c] = from[c];
        }
      }
      transpose(rows);
      for (int64_t c = 0; c < 8; ++c) {
        store_vector(columns[c][s] + k, rows[c]);
      }
    }
  }
}

template <class In>
NORMDROP_INLINE void transform_weight_vector(const In& in, const Conv2dMatrix& u, float* to) {
  transform_tile<3, 6, transform_weight_line>(in, [&](int i, int j, F32 v) NORMDROP_LAMBDA {
    store_vector(to + (i * 6 + j) * u.positions, v);
  });
}

void transform_weight(const Conv2dWeight& w, int64_t begin, const Conv2dMatrix& u) {
  alignas(64) float columns[8][9][kPanel];
  for (int64_t first = 0; first < w.in; first += 8) {
    turn_weight(w, begin, first, columns);
    for (int64_t c = 0; c < 8 && first + c < w.in; ++c) {
      for (int64_t k = 0; k < kPanel && begin + k < w.out; k += kFloats) {
        transform_weight_vector(
            [&](int i, int j)
                NORMDROP_LAMBDA { return load_vector<F32>(columns[c][i * 3 + j] + k); },
            u, u.data + (first + c) * u.row + k);
      }
    }
  }
}

void transform_weight_backward(const Conv2dWeight& w, int64_t begin, const Conv2dMatrix& u) {
  const int64_t width = w.in - begin < kPanel ? w.in - begin : kPanel;
  for (int64_t k = 0; k < w.out; ++k) {
    each_vector(width, [&](int64_t c, int64_t n) NORMDROP_LAMBDA {
      const float* from = w.data + (k * 9 + 8) * w.in + begin + c;
      transform_weight_vector([&](int i, int j)
                                  NORMDROP_LAMBDA { return load(from - (i * 3 + j) * w.in, n); },
                              u, u.data + k * u.row + c);
    });
  }
}

// ---- back ---------------------------------------------------------------------------------------

template <bool kBias>
NORMDROP_INLINE void transform_product_to(const Conv2dTiles& tiles, const Conv2dMatrix& m,
                                          const float* bias, int64_t channels, int64_t begin,
                                          int64_t end, float* y) {
  each_tile(tiles, [&](int64_t t, int64_t map, int64_t top, int64_t left) NORMDROP_LAMBDA {
    const int64_t below = tiles.height - top, beside = tiles.width - left;
    float* to = y + (map + top * tiles.width + left) * channels + begin;
    each_vector(end - begin, [&](int64_t c, int64_t n) NORMDROP_LAMBDA {
      const float* from = at(m, t, c);
      const F32 shift = kBias ? load(bias + begin + c, n) : F32{};
      transform_tile<6, 4, transform_product_line>(
          [&](int i, int j)
              NORMDROP_LAMBDA { return load_vector<F32>(from + (i * 6 + j) * m.positions); },
          [&](int i, int j, F32 v) NORMDROP_LAMBDA {
            if (i < below && j < beside) {
              store(to + (i * tiles.width + j) * channels + c, kBias ? v + shift : v, n);
            }
          });
    });
  });
}

void transform_product(const Conv2dTiles& tiles, const Conv2dMatrix& m, const float* bias,
                       int64_t channels, int64_t begin, int64_t end, float* y) {
  if (bias != nullptr) {
    transform_product_to<true>(tiles, m, bias, channels, begin, end, y);
  } else {
    transform_product_to<false>(tiles, m, bias, channels, begin, end, y);
  }
}

void transform_sums(const Conv2dMatrix& sums, int64_t k0, int64_t k1, int64_t in, int64_t begin,
                    int64_t end, float* grad_w) {
  for (int64_t k = k0; k < k1; ++k) {
    each_vector(end - begin, [&](int64_t c, int64_t n) NORMDROP_LAMBDA {
      const float* from = at(sums, k - k0, c);
      float* to = grad_w + k * 9 * in + begin + c;
      transform_tile<6, 3, transform_sums_line>(
          [&](int i, int j)
              NORMDROP_LAMBDA { return load_vector<F32>(from + (i * 6 + j) * sums.positions); },
          [&](int i, int j, F32 v) NORMDROP_LAMBDA { store(to + (i * 3 + j) * in, v, n); });
    });
  }
}

void multiply(const float* a, int64_t a_row, const float* b, float* product, int64_t product_row,
              int64_t rows, int64_t depth, int64_t width) {
  multiply_panel<false>(a, a_row, b, product, product_row, rows, depth, width, false);
}

void multiply_transposed(const float* a, int64_t a_row, const float* b, float* product,
                         int64_t product_row, int64_t rows, int64_t depth, int64_t width,
                         bool add) {
  multiply_panel<true>(a, a_row, b, product, product_row, rows, depth, width, add);
}

}  // namespace

extern const Conv2dKernels conv2d_kernels = {
    true,
    kFloats,
    kPanel,
    kBlockRows,
    transform_pixels<6, 1, transform_x_line>,
    transform_pixels<4, 0, transform_grad_y_line>,
    transform_weight,
    transform_weight_backward,
    transform_product,
    transform_sums,
    multiply,
    multiply_transposed,
};

#else

extern const Conv2dKernels conv2d_kernels = {};

#endif

}  // namespace normdrop::NORMDROP_ISA
