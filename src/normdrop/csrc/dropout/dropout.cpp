// Dropout: checks, the order in which memory is walked, and registration. The loops are in
// dropout_kernels.cpp and transposed_kernels.cpp, the generator in mask/random.h.
//
// The mask is defined on the input's logical (row-major) index. Memory is walked in the output's
// own order: dimensions are sorted by stride and joined where they lie one after the other, each
// with its step in the mask. What remains is one dimension (contiguous), channels beside each other
// with positions fastest in the mask (transposed), or anything else (strided). The latter two write
// the mask's bits first, one bit an element, and read them in their own order.

#include "dropout/kernels.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "mask/kernels.h"

namespace normdrop {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 1 << 14;  // elements that are worth a thread
constexpr int64_t kStreamBytes = int64_t{1} << 24;

DropoutType type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DropoutType::float32;
    case ScalarType::Double:
      return DropoutType::float64;
    case ScalarType::BFloat16:
      return DropoutType::bfloat16;
    case ScalarType::Half:
      return DropoutType::float16;
    default:
      STD_TORCH_CHECK(false, "dropout: x must be float32, float64, bfloat16 or float16, got ",
                      torch::headeronly::toString(x.scalar_type()));
  }
}

// The dimensions in memory, outermost first, joined where x, y and the mask allow.
std::vector<DropoutDim> order_dims(const Tensor& x, const Tensor& y,
                                   const std::vector<int64_t>& mask_sizes) {
  std::vector<DropoutDim> dims;
  int64_t step = 1;
  for (int64_t d = x.dim() - 1; d >= 0; --d) {
    const int64_t size = x.sizes()[d];
    if (size != 1) {
      dims.push_back({size, x.strides()[d], y.strides()[d], mask_sizes[d] == 1 ? 0 : step});
    }
    step *= mask_sizes[d];
  }
  std::reverse(dims.begin(), dims.end());
  std::stable_sort(dims.begin(), dims.end(),
                   [](const DropoutDim& a, const DropoutDim& b) { return a.y > b.y; });
  std::vector<DropoutDim> joined;
  for (const DropoutDim& dim : dims) {
    if (!joined.empty()) {
      DropoutDim& outer = joined.back();
      if (outer.x == dim.x * dim.size && outer.y == dim.y * dim.size &&
          outer.mask == dim.mask * dim.size) {
        outer = {outer.size * dim.size, dim.x, dim.y, dim.mask};
        continue;
      }
    }
    joined.push_back(dim);
  }
  if (joined.empty()) {
    joined.push_back({1, 1, 1, 1});
  }
  return joined;
}

bool is_transposed(const std::vector<DropoutDim>& dims) {
  if (dims.size() != 2 && dims.size() != 3) {
    return false;
  }
  const DropoutDim& inner = dims.back();
  return inner.x == 1 && inner.y == 1 && inner.mask > 1 && dims[dims.size() - 2].mask == 1;
}

void run(const Tensor& x, const Tensor& y, const Tensor& seed, int64_t threshold, double scale,
         double shift, double fill, int64_t sample_offset,
         const std::vector<int64_t>& shared_dims) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1,
                  "dropout: seed must be one int64 element, got ", seed.numel(), " of ",
                  torch::headeronly::toString(seed.scalar_type()));
  STD_TORCH_CHECK(threshold >= 0 && threshold <= (int64_t{1} << 32),
                  "dropout: threshold must be in [0, 2^32], got ", threshold);
  STD_TORCH_CHECK(sample_offset >= 0, "dropout: sample_offset must not be negative, got ",
                  sample_offset);
  const int64_t ndim = x.dim();
  const DropoutWork work{
      x.const_data_ptr(),
      y.mutable_data_ptr(),
      type_of(x),
      scale,
      shift,
      fill,
      x.const_data_ptr() != y.const_data_ptr() && x.numel() * x.element_size() >= kStreamBytes};
  if (x.numel() == 0) {
    return;
  }
  const KeepRule rule =
      make_keep_rule((uint64_t)*seed.const_data_ptr<int64_t>(), (uint64_t)threshold);
  const DropoutKernels& kernels = dropout_kernels();

  std::vector<int64_t> mask_sizes(x.sizes().begin(), x.sizes().end());
  for (const int64_t d : shared_dims) {
    STD_TORCH_CHECK(d >= 0 && d < ndim, "dropout: shared_dims must lie in [0, ", ndim, "), got ",
                    d);
    mask_sizes[d] = 1;
  }
  int64_t per_sample = 1;
  for (int64_t d = 1; d < ndim; ++d) {
    per_sample *= mask_sizes[d];
  }
  const int64_t count = ndim == 0 ? 1 : mask_sizes[0] * per_sample;
  const uint64_t first = (uint64_t)sample_offset * (uint64_t)per_sample;
  const int64_t word_count = count_keep_words(first, count);
  const auto walk_contiguous = [&] {
    torch::stable::parallel_for(0, word_count, kGrain / 64, [&](int64_t begin, int64_t end) {
      kernels.contiguous(work, rule, first, count, begin, end);
    });
  };
  if (shared_dims.empty() && x.is_contiguous() && y.is_contiguous()) {
    return walk_contiguous();
  }

  std::vector<DropoutDim> dims = order_dims(x, y, mask_sizes);
  const DropoutDim inner = dims.back();
  if (dims.size() == 1 && inner.x == 1 && inner.y == 1 && inner.mask == 1) {
    return walk_contiguous();
  }
  const bool transposed = is_transposed(dims);
  if (transposed && dims.size() == 2) {
    dims.insert(dims.begin(), {1, 0, 0, 0});
  }
  const bool same_high_half = first >> 35 == (first + (uint64_t)count - 1) >> 35;
  if (transposed && same_high_half &&
      (first | (uint64_t)(dims[0].mask | dims[1].size | inner.mask)) % kBlockPositions == 0) {
    const int64_t units = dims[0].size * dims[1].size / kBlockPositions;
    const int64_t grain = std::max<int64_t>(1, kGrain / (kBlockPositions * inner.size));
    torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
      transposed_dropout_kernels().with_blocks(work, rule, first, dims.data(), begin, end);
    });
    return;
  }

  // One word more, since bits are read eight bytes at a time.
  const std::unique_ptr<uint64_t[]> words(new uint64_t[word_count + 1]);
  words[word_count] = 0;
  torch::stable::parallel_for(0, word_count, kGrain / 32, [&](int64_t begin, int64_t end) {
    mask_kernels().fill_words(rule, (first >> 6) + (uint64_t)begin, end - begin,
                              words.get() + begin);
  });
  const int64_t offset = (int64_t)(first & 63);

  if (transposed) {
    const int64_t tiles = (dims[1].size + kTransposedTile - 1) / kTransposedTile;
    const int64_t grain = std::max<int64_t>(1, kGrain / (kTransposedTile * inner.size));
    torch::stable::parallel_for(0, dims[0].size * tiles, grain, [&](int64_t begin, int64_t end) {
      transposed_dropout_kernels().with_words(work, words.get(), offset, dims.data(), begin, end);
    });
    return;
  }

  const int64_t pieces = (inner.size + kStridedPiece - 1) / kStridedPiece;
  const int64_t rows = x.numel() / inner.size;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::min(inner.size, kStridedPiece));
  torch::stable::parallel_for(0, rows * pieces, grain, [&](int64_t begin, int64_t end) {
    kernels.strided(work, words.get(), offset, dims.data(), (int)dims.size(), begin, end);
  });
}

Tensor dropout(const Tensor& x, const Tensor& seed, int64_t threshold, double scale, double shift,
               double fill, int64_t sample_offset, const std::vector<int64_t>& shared_dims) {
  Tensor y = torch::stable::empty_like(x);
  run(x, y, seed, threshold, scale, shift, fill, sample_offset, shared_dims);
  return y;
}

void dropout_into(const Tensor& x, const Tensor& seed, int64_t threshold, double scale,
                  double shift, double fill, int64_t sample_offset,
                  const std::vector<int64_t>& shared_dims, Tensor& y) {
  STD_TORCH_CHECK(y.scalar_type() == x.scalar_type() && y.dim() == x.dim() &&
                      std::equal(x.sizes().begin(), x.sizes().end(), y.sizes().begin()),
                  "dropout: y must have x's shape and type");
  for (int64_t d = 0; d < y.dim(); ++d) {
    STD_TORCH_CHECK(y.sizes()[d] < 2 || y.strides()[d] != 0,
                    "dropout: cannot write into an expanded tensor; clone() it first");
  }
  run(x, y, seed, threshold, scale, shift, fill, sample_offset, shared_dims);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(normdrop, CPU, m) {
  m.impl("dropout", TORCH_BOX(&dropout));
  m.impl("dropout_into", TORCH_BOX(&dropout_into));
}

}  // namespace normdrop
