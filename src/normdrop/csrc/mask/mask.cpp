// The dropout mask as bits in the order of memory.
//
// In contiguous memory that is the mask's own order: words of 64 bits are drawn as they are. For
// channels_last a unit is 8 positions of all channels, C bytes. It is drawn position by position
// where 8 positions of a channel are one block of the generator; else all words are drawn first,
// in the mask's order, and transposed.
//
// Words and units are disjoint, and each depends on its own index only: there is no race and no
// dependence on the number of threads.

#include "mask/mask.h"

#include <cstring>

#include "base/parallel.h"
#include "mask/kernels.h"

namespace normdrop {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements that are worth a thread

// `count` <= 8 bits from bit `index` on.
uint8_t read_bits(const uint64_t* words, int64_t index, int64_t count) {
  uint16_t value;
  std::memcpy(&value, reinterpret_cast<const char*>(words) + index / 8, 2);
  return static_cast<uint8_t>((value >> index % 8) & ((1 << count) - 1));
}

// Bit 0 of every byte, byte k's as bit k.
uint8_t low_bits(uint64_t bytes) {
  return static_cast<uint8_t>((bytes & 0x0101010101010101) * 0x0102040810204080 >> 56);
}

// From rows, bit s of rows[c] being position s of channel c, to bits, where it is bit
// s * channels + c. Seven bytes behind the rows are zero.
void transpose(int64_t channels, const uint8_t* rows, uint8_t* bits) {
  if (channels % 8 != 0) {
    std::memset(bits, 0, static_cast<size_t>(channels));
  }
  for (int64_t c = 0; c < channels; c += 8) {
    uint64_t square;
    std::memcpy(&square, rows + c, 8);
    for (int64_t s = 0; s < 8; ++s) {
      const uint8_t byte = low_bits(square >> s);
      const int64_t to = s * channels + c;
      if (channels % 8 == 0) {
        bits[to / 8] = byte;
        continue;
      }
      bits[to / 8] |= static_cast<uint8_t>(byte << to % 8);
      if (const int spill = byte >> (8 - to % 8); spill != 0) {
        bits[to / 8 + 1] |= static_cast<uint8_t>(spill);
      }
    }
  }
}

}  // namespace

Mask::Mask(const Tensor& x, const Tensor& seed, int64_t threshold, int64_t sample_offset) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1,
                  "batch_norm: seed must be one int64 element, got ", seed.numel(), " of ",
                  torch::headeronly::toString(seed.scalar_type()));
  STD_TORCH_CHECK(threshold >= 0 && threshold <= (int64_t{1} << 32),
                  "batch_norm: threshold must be in [0, 2^32], got ", threshold);
  STD_TORCH_CHECK(sample_offset >= 0, "batch_norm: sample_offset must not be negative, got ",
                  sample_offset);
  transposed_ = !x.is_contiguous();
  STD_TORCH_CHECK(!transposed_ || is_channels_last(x),
                  "batch_norm: dropout needs x to be contiguous or channels_last");
  rule_ = make_keep_rule(static_cast<uint64_t>(*seed.const_data_ptr<int64_t>()),
                         static_cast<uint64_t>(threshold));
  samples_ = x.size(0);
  channels_ = x.size(1);
  positions_ = 1;
  for (int64_t d = 2; d < x.dim(); ++d) {
    positions_ *= x.size(d);
  }
  first_ = static_cast<uint64_t>(sample_offset) * static_cast<uint64_t>(channels_ * positions_);
}

bool Mask::has_blocks() const {
  const uint64_t last = first_ + static_cast<uint64_t>(elements() - 1);
  return first_ % 8 == 0 && channels_ % 8 == 0 && positions_ % 8 == 0 && first_ >> 35 == last >> 35;
}

int64_t Mask::grain() const {
  if (transposed_) {
    return has_blocks() ? 8 * channels_ : 0;
  }
  return first_ % 64 == 0 ? 64 : 0;
}

int64_t Mask::words() const {
  const int64_t of_units = transposed_ ? (units() * channels_ + 7) / 8 : 0;
  return (transposed_ && has_blocks() ? 0 : own_words()) + of_units + 2;
}

const uint8_t* Mask::bits() const {
  return reinterpret_cast<const uint8_t*>(words_ +
                                          (transposed_ && !has_blocks() ? own_words() : 0));
}

void Mask::draw(int64_t begin, int64_t end) const {
  if (transposed_) {
    const int64_t unit = 8 * channels_;
    mask_kernels().transposed_bits(rule_, first_, channels_, positions_, begin / unit,
                                   (end + unit - 1) / unit, reinterpret_cast<uint8_t*>(words_));
  } else {
    mask_kernels().fill_words(rule_, (first_ + static_cast<uint64_t>(begin)) >> 6,
                              (end - begin + 63) / 64, words_ + begin / 64);
  }
}

void Mask::draw_all() const {
  if (const int64_t step = grain(); step != 0) {
    const int64_t steps = (elements() + step - 1) / step;
    torch::stable::parallel_for(0, steps, kGrain / step + 1, [&](int64_t begin, int64_t end) {
      draw(begin * step, std::min(end * step, elements()));
    });
    return;
  }
  const int64_t words = own_words();
  torch::stable::parallel_for(0, words, kGrain / 64, [&](int64_t begin, int64_t end) {
    mask_kernels().fill_words(rule_, (first_ >> 6) + static_cast<uint64_t>(begin), end - begin,
                              words_ + begin);
  });
  if (!transposed_) {
    return;
  }
  uint8_t* bits = reinterpret_cast<uint8_t*>(words_ + words);
  const int64_t grain = kGrain / (8 * channels_) + 1;
  torch::stable::parallel_for(0, units(), grain, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> rows(static_cast<size_t>(channels_ + 7));
    for (int64_t unit = begin; unit < end; ++unit) {
      gather(unit, rows.data());
      transpose(channels_, rows.data(), bits + unit * channels_);
    }
  });
}

// From the words to rows[c]: bit s is position 8 unit + s of channel c.
void Mask::gather(int64_t unit, uint8_t* rows) const {
  const int64_t end = std::min(8 * unit + 8, samples_ * positions_);
  std::memset(rows, 0, static_cast<size_t>(channels_));
  for (int64_t at = 8 * unit, count = 0; at < end; at += count) {
    const int64_t sample = at / positions_, position = at % positions_;
    count = std::min(end - at, positions_ - position);
    int64_t index = static_cast<int64_t>(first_ % 64) + sample * channels_ * positions_ + position;
    for (int64_t c = 0; c < channels_; ++c, index += positions_) {
      rows[c] |= static_cast<uint8_t>(read_bits(words_, index, count) << (at - 8 * unit));
    }
  }
}

}  // namespace normdrop
