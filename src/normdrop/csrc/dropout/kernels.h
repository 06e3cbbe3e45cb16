// The loops of dropout, one table an instruction set. See loops.h.

#pragma once

#include <stdint.h>

#include "base/dispatch.h"
#include "mask/random.h"

namespace normdrop {

enum class DropoutType { float32, float64, bfloat16, float16 };

// y = scale * x + shift where the mask keeps, fill where it drops.
struct DropoutWork {
  const void* x;
  void* y;
  DropoutType type;
  double scale, shift, fill;
  bool stream;  // write y past the cache
};

// One dimension in memory: size, strides of x and y in elements, stride of the mask's index.
struct DropoutDim {
  int64_t size, x, y, mask;
};

struct DropoutKernels {
  // Memory in the mask's order: element j is mask element first + j. Works on those elements that
  // lie in the words begin ... end - 1, counted from first's.
  void (*contiguous)(const DropoutWork&, const KeepRule&, uint64_t first, int64_t count,
                     int64_t begin, int64_t end);
  // Any strides; bit (offset + index) of words is the mask. dims are outermost first. Works on
  // rows begin ... end - 1 of the innermost dimension, or on pieces of kStridedPiece of it.
  void (*strided)(const DropoutWork&, const uint64_t* words, int64_t offset, const DropoutDim* dims,
                  int ndim, int64_t begin, int64_t end);
};

// Channels beside each other.
struct TransposedDropoutKernels {
  // As strided, for dims = (outer, middle, inner) where the mask's order is middle fastest
  // (channels_last: samples, positions, channels). Works on units begin ... end - 1, each of
  // kTransposedTile positions of one outer index.
  void (*with_words)(const DropoutWork&, const uint64_t* words, int64_t offset,
                     const DropoutDim* dims, int64_t begin, int64_t end);
  // The same with the mask drawn where it is used instead of read from words. first and the
  // mask's steps of outer and inner are multiples of 8, the size of middle as well, and the numbers
  // of all blocks have the same high half. Units have kBlockPositions positions.
  void (*with_blocks)(const DropoutWork&, const KeepRule&, uint64_t first, const DropoutDim* dims,
                      int64_t begin, int64_t end);
};

constexpr int64_t kStridedPiece = 4096;
constexpr int64_t kTransposedTile = 32;

NORMDROP_KERNEL_TABLE(DropoutKernels, dropout_kernels)
NORMDROP_KERNEL_TABLE(TransposedDropoutKernels, transposed_dropout_kernels)

}  // namespace normdrop
