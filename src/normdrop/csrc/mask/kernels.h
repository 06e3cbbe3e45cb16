// What draws the mask's bits, one table an instruction set.

#pragma once

#include "base/dispatch.h"
#include "mask/random.h"

namespace normdrop {

struct MaskKernels {
  // Words first_word ... first_word + count - 1 of the mask.
  void (*fill_words)(const KeepRule&, uint64_t first_word, int64_t count, uint64_t* words);
  // The mask's bits for channels_last: unit number u, of kBlockPositions positions, begins with bit
  // 8 * channels * u. The conditions of
  // with_blocks in dropout/kernels.h hold, and channels is a multiple of 8.
  void (*transposed_bits)(const KeepRule&, uint64_t first, int64_t channels, int64_t positions,
                          int64_t begin, int64_t end, uint8_t* bits);
};

NORMDROP_KERNEL_TABLE(MaskKernels, mask_kernels)

}  // namespace normdrop
