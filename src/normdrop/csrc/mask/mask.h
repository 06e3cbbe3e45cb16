// The dropout mask of a whole tensor, one bit an element, in the order of the tensor's memory.

#pragma once

#include "base/layout.h"
#include "mask/random.h"

namespace normdrop {

// The mask's own order is (sample, channel, position). Memory has the same or, if it is transposed
// (channels_last), (sample, position, channel).
class Mask {
 public:
  // Checks the arguments. x must be contiguous or channels_last.
  Mask(const Tensor& x, const Tensor& seed, int64_t threshold, int64_t sample_offset);

  // What draw() and draw_all() write to, and its size in words. Eight bytes behind the bits can be
  // read.
  int64_t words() const;
  void set_memory(uint64_t* words) { words_ = words; }

  // Element i of memory has bit first_bit() + i.
  const uint8_t* bits() const;
  int64_t first_bit() const { return transposed_ ? 0 : static_cast<int64_t>(first_ % 64); }

  // Draws the bits of elements [begin, end) of memory: both multiples of grain(), or end their
  // number. Where grain() is zero, all are drawn at once, with draw_all.
  int64_t grain() const;
  void draw(int64_t begin, int64_t end) const;
  void draw_all() const;

 private:
  int64_t elements() const { return samples_ * channels_ * positions_; }
  int64_t own_words() const { return count_keep_words(first_, elements()); }
  int64_t units() const { return (samples_ * positions_ + 7) / 8; }  // of 8 positions
  bool has_blocks() const;
  void gather(int64_t unit, uint8_t* rows) const;

  KeepRule rule_;
  uint64_t first_;  // the first element's index in the mask
  int64_t samples_, channels_, positions_;
  bool transposed_;
  uint64_t* words_ = nullptr;
};

}  // namespace normdrop
