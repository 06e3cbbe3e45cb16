// The loops of batch normalization, one table an instruction set, one function a data type.
//
// x is seen as (outer, channels, inner), dense in this order. `row_*` are for inner > 1: a row is
// the inner elements of one (outer, channel) pair, and has its own constants. `column_*` are for
// inner = 1: a row is the channels of one position, and every column has its own constants.

#pragma once

#include <stdint.h>

#include "base/dispatch.h"

namespace normdrop {

enum DataType { kFloat32, kFloat64, kBFloat16, kFloat16, kDataTypes };

// All pointers to x's type, except: `positive` has bits; the constants, one a channel, have the
// type computed in, float or double.
struct BatchNormArgs {
  int64_t outer, channels, inner;
  int64_t period;  // columns: every so many the constants repeat
  const void* x;
  const void* residual;  // forward: or null
  const void* grad_y;    // backward
  void* out;             // forward: y; backward: grad_x
  void* grad_residual;   // backward: or null
  uint8_t* positive;     // or null
  const void* center;    // the mean, rounded to the type computed in
  const void* scale;     // y_hat = (x - center) * scale + shift
  const void* shift;
  const void* grad_slope;  // grad_x = g * scale + (x - center) * grad_slope + grad_shift
  const void* grad_shift;
  const uint8_t* kept;  // or null: the dropout mask, one bit an element in the order of memory
  int64_t kept_first;   // the bit of x's first element
  double drop_scale;    // of what is kept
  double slope;         // of the activation where it is not positive: 1 is the identity, 0 is ReLU
  bool training;        // backward: grad_x depends on x
  bool stream;          // write past the cache
};

struct Moments {
  double count, mean, m2;  // m2 = sum of (x - mean)^2
};

struct GradientSums {
  double g, gx;  // sums of g and of g * (x - center), g being the gradient of y_hat
};

// Blocks of a channel in the row kernels: `rows` rows each or, where a row is long, one of `parts`
// parts of `length` elements of one row. They depend on the shape alone, so that the sums do not
// depend on the number of threads.
struct RowBlocks {
  int64_t rows, parts, length, count;
};

inline RowBlocks row_blocks(int64_t outer, int64_t inner) {
  constexpr int64_t target = 4096;
  RowBlocks blocks{};
  blocks.rows = inner < target ? target / inner : 1;
  blocks.rows = blocks.rows < 128 ? blocks.rows : 128;  // additions to one accumulator
  const int64_t parts = (inner + target - 1) / target;
  blocks.length = ((inner + parts - 1) / parts + 63) / 64 * 64;
  blocks.parts = (inner + blocks.length - 1) / blocks.length;
  blocks.count = (outer + blocks.rows - 1) / blocks.rows * blocks.parts;
  return blocks;
}

// Rows of the column kernels that are summed in float before they go to double.
constexpr int64_t kColumnBlock = 256;

// The columns of a row in the column kernels are a multiple of this; any number of them are taken
// as a single row, the remainder.
constexpr int64_t kColumnMultiple = 16;

// Two sums for each column of `count` parts, (count, channels). `fold` parts, of as many rows each,
// belong to one chunk. Eight more elements can be read behind either.
struct ColumnParts {
  int64_t channels, fold, count;
  double *first, *second;
};

// Vectors of one element a channel.
struct ChannelArgs {
  int64_t channels, fold;  // the constants of BatchNormArgs are repeated `fold` times
  double count;            // elements of a channel
  double eps;
  double *mean, *var;
  const double *weight, *bias;  // or null
};

// Rows: inner > 1.
struct BatchNormRows {
  // Channels [c0, c1) over blocks [b0, b1); result[c - c0].
  void (*statistics[kDataTypes])(const BatchNormArgs&, int64_t c0, int64_t c1, int64_t b0,
                                 int64_t b1, Moments* result);
  void (*gradient_sums[kDataTypes])(const BatchNormArgs&, int64_t c0, int64_t c1, int64_t b0,
                                    int64_t b1, GradientSums* result);
  // Elements [i0, i1) of the rows [o0, o1) x [c0, c1), the last o first.
  void (*normalize[kDataTypes])(const BatchNormArgs&, int64_t o0, int64_t o1, int64_t c0,
                                int64_t c1, int64_t i0, int64_t i1);
  void (*gradients[kDataTypes])(const BatchNormArgs&, int64_t o0, int64_t o1, int64_t c0,
                                int64_t c1, int64_t i0, int64_t i1);
};

// Columns: inner = 1.
struct BatchNormColumns {
  // Rows [m0, m1), all columns.
  void (*statistics[kDataTypes])(const BatchNormArgs&, int64_t m0, int64_t m1, double* mean,
                                 double* m2);
  void (*gradient_sums[kDataTypes])(const BatchNormArgs&, int64_t m0, int64_t m1, double* g,
                                    double* gx);
  // Rows [m0, m1), the last first.
  void (*normalize[kDataTypes])(const BatchNormArgs&, int64_t m0, int64_t m1);
  void (*gradients[kDataTypes])(const BatchNormArgs&, int64_t m0, int64_t m1);
};

// Once a channel, in double.
struct BatchNormChannels {
  // One channel in double throughout, slowly.
  void (*exact_statistics[kDataTypes])(const BatchNormArgs&, int64_t c, Moments* result);
  // From the parts, means and m2, each of counts[part / fold] rows; says whether all is finite.
  bool (*merge_columns)(const ColumnParts&, const double* counts, double* mean, double* var);
  void (*add_columns)(const ColumnParts&, double* first, double* second);
  // The constants of the loops, of the channels [c0, c1).
  void (*set_forward[kDataTypes])(const ChannelArgs&, const BatchNormArgs&, int64_t c0, int64_t c1);
  void (*set_backward[kDataTypes])(const ChannelArgs&, const BatchNormArgs&, int64_t c0, int64_t c1,
                                   double* g, double* gx);
};

NORMDROP_KERNEL_TABLE(BatchNormRows, batch_norm_rows)
NORMDROP_KERNEL_TABLE(BatchNormColumns, batch_norm_columns)
NORMDROP_KERNEL_TABLE(BatchNormChannels, batch_norm_channels)

}  // namespace normdrop
