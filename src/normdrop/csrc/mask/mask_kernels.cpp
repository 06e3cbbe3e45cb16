// The bits of the dropout mask, drawn in vectors. See random.h.

#include "mask/kernels.h"

namespace normdrop::NORMDROP_ISA {
namespace {

void fill_words_entry(const KeepRule& rule, uint64_t first_word, int64_t count, uint64_t* words) {
  fill_keep_words(KeepStream(rule), first_word, count, words);
}

void transposed_bits(const KeepRule& rule, uint64_t first, int64_t channels, int64_t positions,
                     int64_t begin, int64_t end, uint8_t* bits) {
  constexpr int kStep = kFloats < 8 ? 8 : kFloats;  // channels that give whole bytes
  const KeepStream stream(rule);
  const int64_t tiles = positions / kBlockPositions;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t sample = unit / tiles, position = unit % tiles * kBlockPositions;
    const uint64_t i = first + (uint64_t)(sample * channels * positions + position);
    uint8_t* to = bits + unit * channels;
    for (int64_t c = 0; c < channels; c += kStep) {
      uint32_t of_position[kBlockPositions] = {};
      NORMDROP_UNROLL
      for (int k = 0; k < kStep; k += kFloats) {
        I16 keep[4];
        stream.columns(i + (uint64_t)((c + k) * positions), (uint64_t)positions, keep);
        NORMDROP_UNROLL
        for (int v = 0; v < 4; ++v) {
          of_position[2 * v] |= bits_of((I32)((U32)keep[v] << 16)) << k;
          of_position[2 * v + 1] |= bits_of((I32)keep[v]) << k;
        }
      }
      for (int s = 0; s < kBlockPositions; ++s) {
        uint8_t* at = to + (s * channels + c) / 8;
        at[0] = (uint8_t)of_position[s];
        if (kStep > 8 && c + 8 < channels) {
          at[1] = (uint8_t)(of_position[s] >> 8);
        }
      }
    }
  }
}

}  // namespace

extern const MaskKernels mask_kernels = {fill_words_entry, transposed_bits};

}  // namespace normdrop::NORMDROP_ISA
