// The loops of the 3x3 convolution by Winograd's F(4x4, 3x3), one table an instruction set.
//
// A map is cut into tiles of 4 x 4 outputs, each from 6 x 6 inputs that begin one above and one
// left of them. With the points 0, +-a, +-b and infinity, a = 1 / sqrt(2), b = sqrt(2), and the
// matrices that docs/convolution.md derives,
//
//     y = A^T (U * V) A,    U = G w G^T,    V = B^T x B,
//
// where * is a product at each of the 36 positions, summed over the channels that go in: a matrix
// product (tiles x in) (in x out) a position. The gradient of the input is the same with w turned
// by 180 degrees and its channels exchanged; that of the weight is
//
//     grad_w = G^T (sum over tiles of V * D) G,    D = A grad_y A^T.

#pragma once

#include <stdint.h>

#include "base/dispatch.h"

namespace normdrop {

constexpr int64_t kTile = 4;        // outputs of a tile, in each direction
constexpr int64_t kPositions = 36;  // of a transformed tile

// Tiles first ... first + count - 1, counted through samples, rows of tiles, tiles of a row.
struct Conv2dTiles {
  int64_t height, width;  // of a map
  int64_t down, across;   // tiles of a map
  int64_t first, count;
};

// One matrix a position. Its columns lie in panels: column j of row i is at
// data[position * positions + i * row + (j / columns) * panel + j % columns], columns being
// Conv2dKernels::columns. With panel = columns its rows are dense.
struct Conv2dMatrix {
  float* data;
  int64_t positions, row, panel;
};

// w, (out, 3, 3, in) in memory.
struct Conv2dWeight {
  const float* data;
  int64_t out, in;
};

// Tensors are channels_last. Channels are any number; in a Conv2dMatrix they are filled up with
// zeros to a multiple of `lanes`.
struct Conv2dKernels {
  bool is_there;
  int64_t lanes, columns, rows;  // of a vector; of a panel, two vectors; of a block of products

  // V, one row a tile. `zeros` has as many as there are channels, filled up.
  void (*transform_x)(const Conv2dTiles&, const float* x, int64_t channels, const float* zeros,
                      const Conv2dMatrix& v);
  // D, one row a tile.
  void (*transform_grad_y)(const Conv2dTiles&, const float* grad_y, int64_t channels,
                           const float* zeros, const Conv2dMatrix& d);
  // The panel of U that begins with column `begin`, one row a channel that goes in: w's `in`
  // forward, its `out` backward.
  void (*transform_weight)(const Conv2dWeight&, int64_t begin, const Conv2dMatrix& u);
  void (*transform_weight_backward)(const Conv2dWeight&, int64_t begin, const Conv2dMatrix& u);
  // y's channels [begin, end) from M = U * V, whose column 0 is `begin`. bias may be null.
  void (*transform_product)(const Conv2dTiles&, const Conv2dMatrix& m, const float* bias,
                            int64_t channels, int64_t begin, int64_t end, float* y);
  // grad_w of w's rows [k0, k1), columns [begin, end), from the sums whose row 0 is k0 and whose
  // column 0 is `begin`.
  void (*transform_sums)(const Conv2dMatrix& sums, int64_t k0, int64_t k1, int64_t in,
                         int64_t begin, int64_t end, float* grad_w);

  // One panel of `width` columns: product = a b, a (rows, depth) dense, b (depth, columns).
  void (*multiply)(const float* a, int64_t a_row, const float* b, float* product,
                   int64_t product_row, int64_t rows, int64_t depth, int64_t width);
  // The same with a given as (depth, rows); adds to `product` if it shall.
  void (*multiply_transposed)(const float* a, int64_t a_row, const float* b, float* product,
                              int64_t product_row, int64_t rows, int64_t depth, int64_t width,
                              bool add);
};

NORMDROP_KERNEL_TABLE(Conv2dKernels, conv2d_kernels)

}  // namespace normdrop
