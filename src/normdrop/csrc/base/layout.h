// How a tensor (N, C, ...) lies in memory, and a copy that lies as another does.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace normdrop {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// x seen as (outer, channels, inner): contiguous (N, C, H, W) is (N, C, H*W), channels_last is
// (N*H*W, C, 1). Any order of the dimensions has such a view, as long as they lie densely.
struct Layout {
  int64_t outer, channels, inner;
  bool is_dense;
};

inline Layout layout_of(const Tensor& x) {
  const auto sizes = x.sizes();
  const auto strides = x.strides();
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride and dimension, without those of size 1
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (sizes[d] != 1) {
      dims.emplace_back(strides[d], d);
    }
  }
  std::sort(dims.begin(), dims.end());
  Layout layout{1, sizes[1], 1, true};
  int64_t expected = 1;
  bool past_channels = sizes[1] == 1;
  for (const auto& [stride, d] : dims) {
    layout.is_dense = layout.is_dense && stride == expected;
    expected *= sizes[d];
    if (d == 1) {
      past_channels = true;
    } else {
      (past_channels && sizes[1] != 1 ? layout.outer : layout.inner) *= sizes[d];
    }
  }
  return layout;
}

// The channels of a position beside each other, positions and samples in their own order.
inline bool is_channels_last(const Tensor& x) {
  int64_t expected = 1;
  for (int64_t i = 0; i < x.dim(); ++i) {
    const int64_t d = i == 0 ? 1 : i == x.dim() - 1 ? 0 : x.dim() - i;
    if (x.size(d) != 1 && x.stride(d) != expected) {
      return false;
    }
    expected *= x.size(d);
  }
  return true;
}

inline bool has_same_layout(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) {
    return false;
  }
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != b.size(d) || (a.size(d) != 1 && a.stride(d) != b.stride(d))) {
      return false;
    }
  }
  return true;
}

// t itself if it lies as `like` does and has its type, else a copy that does.
inline Tensor in_layout_of(const Tensor& t, const Tensor& like) {
  if (t.scalar_type() == like.scalar_type() && has_same_layout(t, like)) {
    return t;
  }
  Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, t);
  return copy;
}

}  // namespace normdrop
