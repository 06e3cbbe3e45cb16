// Small dense products for conv2d_kernels.cpp: C (rows, panel) = A B, C kept in registers.
//
// A panel is two vectors wide, of whose elements each takes 6 rows with AVX2 and 12 with AVX-512:
// as many sums as registers hold. Sums of a recursive struct have names of their own; gcc 12 keeps
// an array of them in memory, at a third of the speed.

#pragma once

#include <stdint.h>

#include "base/simd.h"

namespace normdrop::NORMDROP_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kBlockRows = 12;
#else
constexpr int kBlockRows = 6;
#endif

constexpr int64_t kPanel = 2 * kFloats;

template <int kRows, bool kWide>
struct Sums {
  Sums<kRows - 1, kWide> above;
  F32 left, right;

  NORMDROP_METHOD void begin(const float* c, int64_t c_row, bool add) {
    above.begin(c, c_row, add);
    const float* from = c + (kRows - 1) * c_row;
    left = add ? load_vector<F32>(from) : F32{};
    right = kWide && add ? load_vector<F32>(from + kFloats) : F32{};
  }
  NORMDROP_METHOD void add(const float* a, int64_t a_row, F32 b_left, F32 b_right) {
    above.add(a, a_row, b_left, b_right);
    const F32 factor = a[(kRows - 1) * a_row] - F32{};
    left = fma(factor, b_left, left);
    if constexpr (kWide) {
      right = fma(factor, b_right, right);
    }
  }
  NORMDROP_METHOD void end(float* c, int64_t c_row) const {
    above.end(c, c_row);
    float* to = c + (kRows - 1) * c_row;
    store_vector(to, left);
    if constexpr (kWide) {
      store_vector(to + kFloats, right);
    }
  }
};

template <bool kWide>
struct Sums<0, kWide> {
  NORMDROP_METHOD void begin(const float*, int64_t, bool) {}
  NORMDROP_METHOD void add(const float*, int64_t, F32, F32) {}
  NORMDROP_METHOD void end(float*, int64_t) const {}
};

// A is (rows, depth) or, transposed, (depth, rows), with a_row from one row to the next.
template <int kRows, bool kWide, bool kTransposed>
__attribute__((noinline)) void multiply_block(const float* a, int64_t a_row, const float* b,
                                              float* c, int64_t c_row, int64_t depth, bool add) {
  Sums<kRows, kWide> sums;
  sums.begin(c, c_row, add);
  for (int64_t d = 0; d < depth; ++d) {
    sums.add(a, kTransposed ? 1 : a_row, load_vector<F32>(b),
             kWide ? load_vector<F32>(b + kFloats) : F32{});
    a += kTransposed ? a_row : 1;
    b += kPanel;
  }
  sums.end(c, c_row);
}

template <int kRows, bool kWide, bool kTransposed>
NORMDROP_INLINE void multiply_rows(const float* a, int64_t a_row, const float* b, float* c,
                                   int64_t c_row, int64_t rows, int64_t depth, bool add) {
  for (; rows >= kRows; rows -= kRows) {
    multiply_block<kRows, kWide, kTransposed>(a, a_row, b, c, c_row, depth, add);
    a += kRows * (kTransposed ? 1 : a_row);
    c += kRows * c_row;
  }
  if constexpr (kRows > 1) {
    constexpr int next = kRows > 8 ? 8 : kRows > 4 ? 4 : kRows / 2;
    multiply_rows<next, kWide, kTransposed>(a, a_row, b, c, c_row, rows, depth, add);
  }
}

// Depth by depth, so that what is read of B, and of A where it is transposed, stays in the first
// cache. The order of the additions to an element is that of the depth, whatever the blocks.
template <bool kTransposed>
NORMDROP_INLINE void multiply_panel(const float* a, int64_t a_row, const float* b, float* c,
                                    int64_t c_row, int64_t rows, int64_t depth, int64_t width,
                                    bool add) {
  constexpr int64_t most = (kTransposed ? 4096 : 8192) / kPanel / 2;
  for (int64_t d = 0; d < depth; d += most) {
    const int64_t part = depth - d < most ? depth - d : most;
    const float* from = a + d * (kTransposed ? a_row : 1);
    if (width > kFloats) {
      multiply_rows<kBlockRows, true, kTransposed>(from, a_row, b + d * kPanel, c, c_row, rows,
                                                   part, add || d > 0);
    } else {
      multiply_rows<kBlockRows, false, kTransposed>(from, a_row, b + d * kPanel, c, c_row, rows,
                                                    part, add || d > 0);
    }
  }
}

}  // namespace
}  // namespace normdrop::NORMDROP_ISA
