// Both passes over rows (inner > 1), forward and backward alike: sums of every channel, what
// follows from them for the channel, then elements.
//
// A task is a few channels, both passes, the second from the last sample to the first, so that it
// begins with what is still in the cache. Where there are fewer channels than threads, the passes
// are separate tasks over blocks and rows, with the same sums.

#pragma once

#include <algorithm>
#include <vector>

#include "batch_norm/work.h"

namespace normdrop {

constexpr int64_t kGroupBlocks = 16;      // blocks of a channel that one task sums
constexpr int64_t kTaskElements = 65536;  // of an elementwise pass

struct RowPlan {
  RowBlocks blocks;
  int64_t tile;  // channels of a task, so that short rows are read in runs of some length
  int64_t tiles;
  int64_t groups;  // of kGroupBlocks blocks

  explicit RowPlan(const Layout& x) : blocks(row_blocks(x.outer, x.inner)) {
    tile = std::min<int64_t>(std::max<int64_t>(1, 1024 / x.inner), x.channels);
    tiles = (x.channels + tile - 1) / tile;
    groups = (blocks.count + kGroupBlocks - 1) / kGroupBlocks;
  }

  int64_t parts() const { return groups * tile; }  // of a tile's sums, (groups, tile)

  bool one_task_a_tile() const {
    return groups == 1 || tiles >= 2 * static_cast<int64_t>(torch::stable::get_num_threads());
  }

  // Elementwise over all rows, the last first.
  template <class Run>
  void for_pieces(const Layout& x, const Run& run) const {
    const int64_t piece = std::min(x.inner, kTaskElements);
    const int64_t pieces = (x.inner + piece - 1) / piece;
    const int64_t width = std::min(std::max<int64_t>(kTaskElements / x.inner, 1), x.channels);
    const int64_t widths = (x.channels + width - 1) / width;
    const int64_t tasks = x.outer * widths * pieces;
    parallel_tasks(tasks, x.outer * x.channels * x.inner, [&](int64_t i) {
      const int64_t task = tasks - 1 - i;
      const int64_t o = task / (widths * pieces);
      const int64_t c = task / pieces % widths * width;
      const int64_t at = task % pieces * piece;
      run(o, o + 1, c, std::min(c + width, x.channels), at, std::min(at + piece, x.inner));
    });
  }
};

// Sums of channels over blocks, and elements of rows: as in BatchNormRows.
template <class Part>
using SumRows = void (*)(const BatchNormArgs&, int64_t c0, int64_t c1, int64_t b0, int64_t b1,
                         Part* result);
using PassOverRows = void (*)(const BatchNormArgs&, int64_t o0, int64_t o1, int64_t c0, int64_t c1,
                              int64_t i0, int64_t i1);

// Without `sum` nothing is summed, without `pass` no elements are written. merge(c, parts, step,
// count) brings the sums of channel c together, parts[0], parts[step], ..., in this order whatever
// the threads; settle(c0, c1) then sets the constants of the channels' elements.
template <class Part, class Merge, class Settle>
void run_rows(const Work& work, SumRows<Part> sum, PassOverRows pass, const Merge& merge,
              const Settle& settle) {
  const Layout& x = work.x;
  const RowPlan plan(x);
  const auto sum_group = [&](int64_t t, int64_t g, Part* parts) {
    const int64_t c0 = t * plan.tile;
    sum(work.args, c0, std::min(c0 + plan.tile, x.channels), g * kGroupBlocks,
        std::min((g + 1) * kGroupBlocks, plan.blocks.count), parts + g * plan.tile);
  };
  const auto settle_tile = [&](int64_t t, const Part* parts) {
    const int64_t c0 = t * plan.tile, c1 = std::min(c0 + plan.tile, x.channels);
    for (int64_t c = c0; c < c1; ++c) {
      merge(c, parts + c - c0, plan.tile, plan.groups);
    }
    settle(c0, c1);
  };
  const bool is_whole = sum != nullptr && plan.one_task_a_tile();
  const bool draws = work.tiles_draw(is_whole, plan.tile);
  if (is_whole) {
    parallel_tasks(plan.tiles, work.elements_of_x(), [&](int64_t t) {
      const int64_t c0 = t * plan.tile, c1 = std::min(c0 + plan.tile, x.channels);
      if (draws) {
        work.draw_tile(c0, c1);
      }
      std::vector<Part> parts(static_cast<size_t>(plan.parts()));
      for (int64_t g = 0; g < plan.groups; ++g) {
        sum_group(t, g, parts.data());
      }
      settle_tile(t, parts.data());
      if (pass != nullptr) {
        pass(work.args, 0, x.outer, c0, c1, 0, x.inner);
      }
    });
    return;
  }
  if (sum != nullptr) {
    std::vector<Part> parts(static_cast<size_t>(plan.tiles * plan.parts()));
    parallel_tasks(plan.tiles * plan.groups, work.elements_of_x(), [&](int64_t i) {
      const int64_t t = i / plan.groups;
      sum_group(t, i % plan.groups, parts.data() + t * plan.parts());
    });
    for (int64_t t = 0; t < plan.tiles; ++t) {
      settle_tile(t, parts.data() + t * plan.parts());
    }
  } else {
    settle(0, x.channels);
  }
  if (pass != nullptr) {
    plan.for_pieces(x, [&](int64_t o0, int64_t o1, int64_t c0, int64_t c1, int64_t i0, int64_t i1) {
      pass(work.args, o0, o1, c0, c1, i0, i1);
    });
  }
}

}  // namespace normdrop
