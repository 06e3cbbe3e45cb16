// The 3x3 convolution with stride 1 and padding 1: checks, the order of the work, registration.
// The loops are in conv2d_kernels.cpp, the algorithm is told in kernels.h.
//
// V, U and their product take 36 floats where the tensors have 16 and 9, so they are made in parts
// that stay in a cache. Where there are many tiles for the channels, U is made once and the tiles
// come in blocks; where there are many channels, V is made of many tiles and U panel by panel. The
// sizes were measured on a processor with 512 KiB and 32 MiB of second and third cache; around them
// the time is nearly flat.

#include "conv2d/kernels.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "base/layout.h"
#include "base/parallel.h"
#include "base/scratch.h"
#include "base/tensors.h"

namespace normdrop {
namespace {

constexpr int64_t kBlockTiles = 48;          // whose V and product stay in the second cache
constexpr int64_t kManyWeights = 256 * 512;  // more, and U, or the sums, stay in none
constexpr int64_t kSharedFloats = 5 << 20;   // of V, or V and D, that stay in the third
constexpr int64_t kBlockFloats = 600000;     // of V and D where sums are to stay as well
constexpr int64_t kChunkTiles = 8;           // that one thread transforms at a time

int64_t ceil_of(int64_t a, int64_t b) { return (a + b - 1) / b; }

Conv2dTiles tiles_of(const Tensor& x) {
  const int64_t down = ceil_of(x.size(2), kTile), across = ceil_of(x.size(3), kTile);
  return {x.size(2), x.size(3), down, across, 0, x.size(0) * down * across};
}

Conv2dTiles part_of(const Conv2dTiles& tiles, int64_t first, int64_t most) {
  Conv2dTiles part = tiles;
  part.first = tiles.first + first;
  part.count = std::min(most, tiles.count - first);
  return part;
}

// Threads that are worth waking.
int64_t threads_for(const Conv2dTiles& tiles, int64_t in, int64_t out) {
  return tiles.count * in * out < 16384 ? 1 : torch::stable::get_num_threads();
}

// Matrices of one operator. Their rows and positions lie apart by what is no power of two, since
// those would share few sets of a cache.
class Matrices {
 public:
  explicit Matrices(const Conv2dKernels& kernels) : kernels_(kernels) {}

  int64_t panels(int64_t columns) const { return ceil_of(columns, kernels_.columns); }

  // Row by row.
  Conv2dMatrix by_rows(int64_t rows, int64_t columns) const {
    const int64_t filled = ceil_of(columns, kernels_.lanes) * kernels_.lanes;
    const int64_t row = filled + (filled >= 256 ? 16 : 0);
    return {nullptr, rows * row + 16, row, kernels_.columns};
  }
  // Panel by panel.
  Conv2dMatrix by_panels(int64_t rows, int64_t columns) const {
    const int64_t panel = rows * kernels_.columns;
    return {nullptr, panels(columns) * panel + 16, kernels_.columns, panel};
  }

 private:
  const Conv2dKernels& kernels_;
};

int64_t floats_of(const Conv2dMatrix& matrix) { return kPositions * matrix.positions; }

Conv2dMatrix in_memory(Conv2dMatrix matrix, float* data) {
  matrix.data = data;
  return matrix;
}

Conv2dMatrix from_row(Conv2dMatrix matrix, int64_t row) {
  matrix.data += row * matrix.row;
  return matrix;
}

Conv2dMatrix from_panel(Conv2dMatrix matrix, int64_t panel) {
  matrix.data += panel * matrix.panel;
  return matrix;
}

const float* zeros_of(Scratch& scratch, int64_t count) {
  float* zeros = scratch.take<float>(count);
  std::fill(zeros, zeros + count, 0.0F);
  return zeros;
}

// ---- forward, and the gradient of the input -----------------------------------------------------

struct Convolution {
  const Conv2dKernels& kernels;
  Conv2dTiles tiles;
  const float* x;
  Conv2dWeight weight;
  const float* bias;  // or null
  float* y;
  bool backward;
  int64_t in, out;  // channels of x and y: exchanged, to weight's, in backward

  void transform_weight(int64_t panel, const Conv2dMatrix& u) const {
    const auto transform = backward ? kernels.transform_weight_backward : kernels.transform_weight;
    transform(weight, panel * kernels.columns, u);
  }
  int64_t width_of(int64_t panel) const {
    return std::min(kernels.columns, out - panel * kernels.columns);
  }
};

void convolve_by_blocks(const Convolution& work) {
  const Conv2dKernels& kernels = work.kernels;
  const Matrices matrices(kernels);
  const int64_t panels = matrices.panels(work.out);
  const int64_t threads = threads_for(work.tiles, work.in, work.out);
  const int64_t rounds = ceil_of(work.tiles.count, kBlockTiles * threads);
  const int64_t even = ceil_of(work.tiles.count, rounds * threads);
  const int64_t most = ceil_of(even, kernels.rows) * kernels.rows;
  const int64_t blocks = ceil_of(work.tiles.count, most);
  const int64_t workers = std::min(threads, blocks);

  const Conv2dMatrix u_form = matrices.by_panels(work.in, work.out);
  const Conv2dMatrix v_form = matrices.by_rows(most, work.in);
  const Conv2dMatrix m_form = matrices.by_rows(most, work.out);
  const int64_t each = floats_of(v_form) + floats_of(m_form);
  Scratch scratch(Scratch::bytes_of(floats_of(u_form), sizeof(float)) +
                  Scratch::bytes_of(workers * each, sizeof(float)) +
                  Scratch::bytes_of(work.in + kernels.lanes, sizeof(float)));
  const Conv2dMatrix u = in_memory(u_form, scratch.take<float>(floats_of(u_form)));
  float* own = scratch.take<float>(workers * each);
  const float* zeros = zeros_of(scratch, work.in + kernels.lanes);

  parallel_workers(std::min(threads, panels), panels, [&](int64_t, int64_t panel) {
    work.transform_weight(panel, from_panel(u, panel));
  });
  parallel_workers(workers, blocks, [&](int64_t worker, int64_t block) {
    const Conv2dTiles tiles = part_of(work.tiles, block * most, most);
    const Conv2dMatrix v = in_memory(v_form, own + worker * each);
    const Conv2dMatrix m = in_memory(m_form, v.data + floats_of(v_form));
    kernels.transform_x(tiles, work.x, work.in, zeros, v);
    for (int64_t p = 0; p < kPositions; ++p) {
      for (int64_t panel = 0; panel < panels; ++panel) {
        kernels.multiply(v.data + p * v.positions, v.row,
                         u.data + p * u.positions + panel * u.panel,
                         m.data + p * m.positions + panel * m.panel, m.row, tiles.count, work.in,
                         work.width_of(panel));
      }
    }
    kernels.transform_product(tiles, m, work.bias, work.out, 0, work.out, work.y);
  });
}

void convolve_by_panels(const Convolution& work) {
  const Conv2dKernels& kernels = work.kernels;
  const Matrices matrices(kernels);
  const int64_t panels = matrices.panels(work.out);
  const int64_t threads = threads_for(work.tiles, work.in, work.out);
  const int64_t workers = std::min(threads, panels);
  const int64_t fit = kSharedFloats / (kPositions * work.in) / kernels.rows * kernels.rows;
  const int64_t most = std::min(work.tiles.count, std::max(fit, kBlockTiles));

  const Conv2dMatrix v_form = matrices.by_rows(most, work.in);
  const Conv2dMatrix u_form = matrices.by_panels(work.in, kernels.columns);
  const Conv2dMatrix m_form = matrices.by_rows(most, kernels.columns);
  const int64_t each = floats_of(u_form) + floats_of(m_form);
  Scratch scratch(Scratch::bytes_of(floats_of(v_form), sizeof(float)) +
                  Scratch::bytes_of(workers * each, sizeof(float)) +
                  Scratch::bytes_of(work.in + kernels.lanes, sizeof(float)));
  const Conv2dMatrix v = in_memory(v_form, scratch.take<float>(floats_of(v_form)));
  float* own = scratch.take<float>(workers * each);
  const float* zeros = zeros_of(scratch, work.in + kernels.lanes);

  for (int64_t first = 0; first < work.tiles.count; first += most) {
    const Conv2dTiles tiles = part_of(work.tiles, first, most);
    const int64_t chunks = ceil_of(tiles.count, kChunkTiles);
    parallel_workers(std::min(threads, chunks), chunks, [&](int64_t, int64_t chunk) {
      const Conv2dTiles part = part_of(tiles, chunk * kChunkTiles, kChunkTiles);
      kernels.transform_x(part, work.x, work.in, zeros, from_row(v, chunk * kChunkTiles));
    });
    parallel_workers(workers, panels, [&](int64_t worker, int64_t panel) {
      const Conv2dMatrix u = in_memory(u_form, own + worker * each);
      const Conv2dMatrix m = in_memory(m_form, u.data + floats_of(u_form));
      const int64_t begin = panel * kernels.columns, width = work.width_of(panel);
      work.transform_weight(panel, u);
      for (int64_t p = 0; p < kPositions; ++p) {
        kernels.multiply(v.data + p * v.positions, v.row, u.data + p * u.positions,
                         m.data + p * m.positions, m.row, tiles.count, work.in, width);
      }
      kernels.transform_product(tiles, m, work.bias, work.out, begin, begin + width, work.y);
    });
  }
}

void convolve(const Convolution& work) {
  if (work.in * work.out > kManyWeights || work.out >= 8 * work.tiles.count) {
    convolve_by_panels(work);
  } else {
    convolve_by_blocks(work);
  }
}

// ---- the gradient of the weight -----------------------------------------------------------------

struct WeightGradient {
  const Conv2dKernels& kernels;
  Conv2dTiles tiles;
  const float *x, *grad_y;
  float* grad_w;
  int64_t in, out;
};

// Sums over tiles are split by the columns of their result only, never into parts of a sum.
void weight_gradient(const WeightGradient& work) {
  const Conv2dKernels& kernels = work.kernels;
  const Matrices matrices(kernels);
  const int64_t panels = matrices.panels(work.in);
  const int64_t threads = threads_for(work.tiles, work.in, work.out);
  const bool has_many = work.in * work.out > kManyWeights;
  const int64_t fit =
      (has_many ? kSharedFloats : kBlockFloats) / (kPositions * (work.in + work.out));
  const int64_t most = std::min(work.tiles.count, std::max(fit, kBlockTiles / 2));
  // With few tiles the sums of a panel are complete at once, and never leave the cache.
  const bool at_once = has_many && most == work.tiles.count;
  const int64_t workers = std::min(threads, panels);

  const Conv2dMatrix v_form = matrices.by_panels(most, work.in);
  const Conv2dMatrix d_form = matrices.by_rows(most, work.out);
  const Conv2dMatrix sums_form = matrices.by_panels(work.out, at_once ? kernels.columns : work.in);
  const int64_t copies = at_once ? workers : 1;
  const int64_t zeros_count = std::max(work.in, work.out) + kernels.lanes;
  Scratch scratch(Scratch::bytes_of(floats_of(v_form), sizeof(float)) +
                  Scratch::bytes_of(floats_of(d_form), sizeof(float)) +
                  Scratch::bytes_of(copies * floats_of(sums_form), sizeof(float)) +
                  Scratch::bytes_of(zeros_count, sizeof(float)));
  const Conv2dMatrix v = in_memory(v_form, scratch.take<float>(floats_of(v_form)));
  const Conv2dMatrix d = in_memory(d_form, scratch.take<float>(floats_of(d_form)));
  float* all_sums = scratch.take<float>(copies * floats_of(sums_form));
  const float* zeros = zeros_of(scratch, zeros_count);

  const auto width_of = [&](int64_t panel) {
    return std::min(kernels.columns, work.in - panel * kernels.columns);
  };
  for (int64_t first = 0; first < work.tiles.count; first += most) {
    const Conv2dTiles tiles = part_of(work.tiles, first, most);
    const int64_t chunks = ceil_of(tiles.count, kChunkTiles);
    parallel_workers(std::min(threads, chunks), chunks, [&](int64_t, int64_t chunk) {
      const int64_t row = chunk * kChunkTiles;
      const Conv2dTiles part = part_of(tiles, row, kChunkTiles);
      kernels.transform_x(part, work.x, work.in, zeros, from_row(v, row));
      kernels.transform_grad_y(part, work.grad_y, work.out, zeros, from_row(d, row));
    });
    const auto add = [&](int64_t p, int64_t panel, const Conv2dMatrix& sums) {
      kernels.multiply_transposed(d.data + p * d.positions, d.row,
                                  v.data + p * v.positions + panel * v.panel,
                                  sums.data + p * sums.positions, sums.row, work.out, tiles.count,
                                  width_of(panel), first > 0);
    };
    if (at_once) {
      parallel_workers(workers, panels, [&](int64_t worker, int64_t panel) {
        const Conv2dMatrix sums = in_memory(sums_form, all_sums + worker * floats_of(sums_form));
        for (int64_t p = 0; p < kPositions; ++p) {
          add(p, panel, sums);
        }
        const int64_t begin = panel * kernels.columns;
        kernels.transform_sums(sums, 0, work.out, work.in, begin, begin + width_of(panel),
                               work.grad_w);
      });
      return;
    }
    const Conv2dMatrix sums = in_memory(sums_form, all_sums);
    const int64_t tasks = kPositions * panels;
    parallel_workers(std::min(threads, tasks), tasks, [&](int64_t, int64_t task) {
      const int64_t panel = task % panels;
      add(task / panels, panel, from_panel(sums, panel));
    });
  }
  const Conv2dMatrix sums = in_memory(sums_form, all_sums);
  const int64_t chunks = ceil_of(work.out, kChunkTiles);
  parallel_workers(std::min(threads, chunks), chunks, [&](int64_t, int64_t chunk) {
    const int64_t k = chunk * kChunkTiles;
    kernels.transform_sums(from_row(sums, k), k, std::min(k + kChunkTiles, work.out), work.in, 0,
                           work.in, work.grad_w);
  });
}

// ---- operators ----------------------------------------------------------------------------------

Tensor new_channels_last(int64_t n, int64_t c, int64_t h, int64_t w) {
  const int64_t sizes[] = {n, c, h, w}, strides[] = {h * w * c, 1, w * c, c};
  return in_huge_pages(new_strided(4, sizes, strides, ScalarType::Float));
}

// t itself, or a copy in channels_last.
Tensor in_channels_last(const Tensor& t, const char* operation, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4, operation, ": ", name, " must have 4 dimensions, got ", t.dim());
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, operation, ": ", name,
                  " must be float32, got ", torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(t.is_cpu(), operation, ": ", name, " must be on the CPU");
  STD_TORCH_CHECK(t.numel() > 0, operation, ": ", name, " must not be empty");
  if (is_channels_last(t)) {
    return t;
  }
  Tensor copy = new_channels_last(t.size(0), t.size(1), t.size(2), t.size(3));
  torch::stable::copy_(copy, t);
  return copy;
}

void check_shape(const Tensor& t, int64_t n, int64_t c, int64_t h, int64_t w, const char* operation,
                 const char* name) {
  STD_TORCH_CHECK(t.size(0) == n && t.size(1) == c && t.size(2) == h && t.size(3) == w, operation,
                  ": ", name, " must have shape (", n, ", ", c, ", ", h, ", ", w, "), got (",
                  t.size(0), ", ", t.size(1), ", ", t.size(2), ", ", t.size(3), ")");
}

const Conv2dKernels& checked_kernels(const char* operation) {
  const Conv2dKernels& kernels = conv2d_kernels();
  STD_TORCH_CHECK(kernels.is_there, operation, ": needs a processor with AVX2");
  return kernels;
}

const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
float* mutable_floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

Conv2dWeight weight_of(const Tensor& weight) {
  return {floats(weight), weight.size(0), weight.size(1)};
}

Tensor conv2d(const Tensor& given_x, const Tensor& given_weight,
              const std::optional<Tensor>& given_bias) {
  const Conv2dKernels& kernels = checked_kernels("conv2d");
  const Tensor x = in_channels_last(given_x, "conv2d", "x");
  const Tensor weight = in_channels_last(given_weight, "conv2d", "weight");
  const int64_t in = x.size(1), out = weight.size(0);
  check_shape(weight, out, in, 3, 3, "conv2d", "weight");
  std::optional<Tensor> bias;
  if (given_bias.has_value()) {
    STD_TORCH_CHECK(given_bias->numel() == out && given_bias->scalar_type() == ScalarType::Float &&
                        given_bias->is_cpu(),
                    "conv2d: bias must be ", out, " elements of float32 on the CPU, got ",
                    given_bias->numel(), " of ",
                    torch::headeronly::toString(given_bias->scalar_type()));
    bias = torch::stable::contiguous(*given_bias);
  }
  Tensor y = new_channels_last(x.size(0), out, x.size(2), x.size(3));
  convolve({kernels, tiles_of(x), floats(x), weight_of(weight),
            bias.has_value() ? floats(*bias) : nullptr, mutable_floats(y), false, in, out});
  return y;
}

std::tuple<Tensor, Tensor> conv2d_backward(const Tensor& given_grad_y, const Tensor& given_x,
                                           const Tensor& given_weight, bool need_x,
                                           bool need_weight) {
  const Conv2dKernels& kernels = checked_kernels("conv2d_backward");
  const Tensor grad_y = in_channels_last(given_grad_y, "conv2d_backward", "grad_y");
  const Tensor x = in_channels_last(given_x, "conv2d_backward", "x");
  const Tensor weight = in_channels_last(given_weight, "conv2d_backward", "weight");
  const int64_t in = x.size(1), out = weight.size(0);
  check_shape(weight, out, in, 3, 3, "conv2d_backward", "weight");
  check_shape(grad_y, x.size(0), out, x.size(2), x.size(3), "conv2d_backward", "grad_y");
  const Conv2dTiles tiles = tiles_of(x);
  Tensor grad_x = new_vector(0, ScalarType::Float);
  Tensor grad_weight = new_vector(0, ScalarType::Float);
  if (need_x) {
    grad_x = new_channels_last(x.size(0), in, x.size(2), x.size(3));
    convolve({kernels, tiles, floats(grad_y), weight_of(weight), nullptr, mutable_floats(grad_x),
              true, out, in});
  }
  if (need_weight) {
    grad_weight = new_channels_last(out, in, 3, 3);
    weight_gradient(
        {kernels, tiles, floats(x), floats(grad_y), mutable_floats(grad_weight), in, out});
  }
  return {grad_x, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(normdrop, CPU, m) {
  m.impl("conv2d", TORCH_BOX(&conv2d));
  m.impl("conv2d_backward", TORCH_BOX(&conv2d_backward));
}

}  // namespace normdrop
