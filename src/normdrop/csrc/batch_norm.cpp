// Batch normalization: checks, constants, and who computes what. The loops and their algebra are
// in batch_norm_kernels.cpp.
//
// Statistics come from partial sums over blocks that depend on the shape alone, merged in a fixed
// order in double. So the result has the same bits for any number of threads.
//
//   rows (inner > 1): a task is a few channels, both passes, the second from the last sample to
//     the first, so that it begins with what is still in the cache. Where there are fewer channels
//     than threads, the passes are separate tasks over blocks and rows, with the same sums.
//   columns (inner = 1): a task is a chunk of rows; all partial sums are merged between the passes.
//     Narrow matrices are folded: k rows of C channels are seen as one row of k*C, at least 512,
//     so that what a row costs by itself does not count.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "batch_norm_kernels.h"
#include "layout.h"

namespace normdrop {
namespace {

using torch::stable::empty_like;

constexpr int64_t kGroupBlocks = 16;      // blocks of a channel that one task sums
constexpr int64_t kTaskElements = 65536;  // of an elementwise pass

// ---- Tensors -----------------------------------------------------------------------------------

DataType data_type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::Double:
      return kFloat64;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    default:
      STD_TORCH_CHECK(false, "batch_norm: x must be float32, float64, bfloat16 or float16");
      return kFloat32;
  }
}

// The elements of a small floating-point vector, in double.
std::vector<double> to_doubles(const std::optional<Tensor>& vector, int64_t count, double fill,
                               const char* name) {
  std::vector<double> result(count, fill);
  if (!vector.has_value()) {
    return result;
  }
  STD_TORCH_CHECK(vector->numel() == count, "batch_norm: ", name, " must have ", count,
                  " elements, got ", vector->numel());
  STD_TORCH_CHECK(vector->is_cpu(), "batch_norm: ", name, " must be on the CPU, where x is");
  Tensor source = vector->is_contiguous() ? *vector : torch::stable::contiguous(*vector);
  const ScalarType type = source.scalar_type();
  if (type == ScalarType::Float) {
    const float* p = static_cast<const float*>(source.data_ptr());
    std::copy(p, p + count, result.begin());
    return result;
  }
  if (type != ScalarType::Double) {
    source = torch::stable::to(source, ScalarType::Double);
  }
  const double* p = static_cast<const double*>(source.data_ptr());
  std::copy(p, p + count, result.begin());
  return result;
}

Tensor new_doubles(const Tensor& like, int64_t count) {
  return torch::stable::new_empty(like, {count}, ScalarType::Double);
}

Tensor new_vector(const Tensor& like, const std::vector<double>& values, ScalarType type) {
  const auto count = static_cast<int64_t>(values.size());
  if (type == ScalarType::Float) {
    Tensor result = torch::stable::new_empty(like, {count}, type);
    std::copy(values.begin(), values.end(), static_cast<float*>(result.data_ptr()));
    return result;
  }
  Tensor result = new_doubles(like, count);
  std::copy(values.begin(), values.end(), static_cast<double*>(result.data_ptr()));
  return type == ScalarType::Double ? result : torch::stable::to(result, type);
}

Tensor new_nothing(const Tensor& like, ScalarType type) {
  return torch::stable::new_empty(like, {0}, type);
}

int64_t bytes_of(const Tensor& x) { return x.numel() * static_cast<int64_t>(x.element_size()); }

// Bytes beyond which a result is written past the cache: half of the last-level cache.
int64_t stream_threshold() {
  static const int64_t bytes = [] {
    int64_t cache = 0;
#ifdef _SC_LEVEL3_CACHE_SIZE
    cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    return std::min<int64_t>(std::max<int64_t>(cache / 2, 8 << 20), 64 << 20);
  }();
  return bytes;
}

// ---- The constants of the loops ----------------------------------------------------------------

// Vectors in the type computed in, each repeated `fold` times.
class Constants {
 public:
  Constants(DataType type, int64_t channels, int64_t fold)
      : is_double_(type == kFloat64), channels_(channels), fold_(fold) {
    // Every vector on a cache line's boundary, and not a power of two apart.
    const int64_t length = channels * fold * (is_double_ ? 2 : 1);
    stride_ = (length + 15) / 16 * 16 + 80;
    storage_.reset(new float[static_cast<size_t>(kVectors * stride_ + 16)]);
    values_ = storage_.get();
    while (reinterpret_cast<uintptr_t>(values_) % 64 != 0) {
      ++values_;
    }
  }

  void set(int vector, int64_t c, double value) {
    for (int64_t f = 0; f < fold_; ++f) {
      float* start = values_ + vector * stride_;
      const int64_t i = f * channels_ + c;
      if (is_double_) {
        std::memcpy(start + 2 * i, &value, sizeof(double));
      } else {
        start[i] = static_cast<float>(value);
      }
    }
  }

  const void* vector(int vector) const { return values_ + vector * stride_; }

  double round(double value) const { return is_double_ ? value : static_cast<float>(value); }

 private:
  static constexpr int kVectors = 5;
  bool is_double_;
  int64_t channels_, fold_, stride_;
  std::unique_ptr<float[]> storage_;
  float* values_;
};

enum { kCenter, kScale, kShift, kGradSlope, kGradShift };

struct Channels {
  std::vector<double> mean, var, weight, bias;
  double eps;

  double invstd(int64_t c) const { return 1.0 / std::sqrt(var[c] + eps); }

  void set_forward(int64_t c, Constants& constants) const {
    const double center = constants.round(mean[c]);
    const double scale = weight[c] * invstd(c);
    constants.set(kCenter, c, center);
    constants.set(kScale, c, scale);
    constants.set(kShift, c, bias[c] + (center - mean[c]) * scale);
  }

  void set_forward(Constants& constants) const {
    const auto count = static_cast<int64_t>(mean.size());
    parallel_ranges(count, count * 8, [&](int64_t c0, int64_t c1) {
      for (int64_t c = c0; c < c1; ++c) {
        set_forward(c, constants);
      }
    });
  }

  // From the sums about the center to the gradients: {bias's, weight's}.
  GradientSums set_backward(int64_t c, GradientSums sums, double count, bool training,
                            Constants& constants) const {
    const double off = constants.round(mean[c]) - mean[c];
    const double inv = invstd(c), scale = weight[c] * inv, share = training ? 1.0 / count : 0.0;
    sums.gx = (sums.gx + off * sums.g) * inv;
    const double slope = training ? -scale * inv * sums.gx * share : 0.0;
    constants.set(kGradSlope, c, slope);
    constants.set(kGradShift, c, training ? slope * off - scale * sums.g * share : 0.0);
    return sums;
  }
};

// Partial moments brought together about the first one's mean: no division a part, and an error
// of a few roundings in double of the result.
class Merged {
 public:
  void add(const Moments& part) {
    if (count_ == 0.0) {
      origin_ = part.mean;
    }
    const double move = part.mean - origin_;
    count_ += part.count;
    sum_ += part.count * move;
    m2_ += part.m2 + part.count * move * move;
  }
  double mean() const { return origin_ + sum_ / count_; }
  double var() const {
    const double var = (m2_ - sum_ * sum_ / count_) / count_;
    return var < 0.0 ? 0.0 : var;
  }

 private:
  double count_ = 0.0, origin_ = 0.0, sum_ = 0.0, m2_ = 0.0;
};

// ---- Plans: what the tasks are -----------------------------------------------------------------

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

struct ColumnPlan {
  int64_t fold, rows, rest;  // rows of fold * channels columns; rest rows of channels columns
  int64_t chunk, chunks;     // rows of a task

  explicit ColumnPlan(const Layout& x) : fold(1) {
    // Whole bytes of `positive` a row: a multiple of 8.
    while (fold * x.channels < 512 || fold * x.channels % 8 != 0) {
      ++fold;
    }
    rows = x.outer / fold;
    rest = x.outer % fold;
    chunk = std::max<int64_t>(rows >= 1024 ? 128 : 64, (rows + 31) / 32);
    chunk = (chunk + 7) / 8 * 8;
    chunks = (rows + chunk - 1) / chunk;
  }

  // Rows of a chunk; the one after the last is the remainder.
  double rows_of(int64_t i) const {
    return i == chunks ? 1.0 : static_cast<double>(std::min((i + 1) * chunk, rows) - i * chunk);
  }

  BatchNormArgs main(BatchNormArgs args) const {
    args.outer = rows;
    args.channels *= fold;
    return args;
  }

  // The rest as one row; `size` is that of an element of x.
  BatchNormArgs remainder(BatchNormArgs args, int64_t size) const {
    const int64_t at = rows * fold * args.channels;
    const auto advance = [&](auto*& p) {
      using Byte = std::conditional_t<std::is_same_v<decltype(p), const void*&>, const char, char>;
      p = p == nullptr ? nullptr : static_cast<Byte*>(p) + at * size;
    };
    advance(args.x);
    advance(args.residual);
    advance(args.grad_y);
    advance(args.out);
    advance(args.grad_residual);
    args.positive = args.positive == nullptr ? nullptr : args.positive + at / 8;
    args.outer = 1;
    args.channels *= rest;
    return args;
  }
};

// Two sums for every column of every chunk and of the remainder. Element i belongs to channel
// i modulo channels.
struct ColumnParts {
  int64_t width, size;
  std::unique_ptr<double[]> values;

  ColumnParts(const ColumnPlan& plan, const Layout& x)
      : width(plan.fold * x.channels),
        size(plan.chunks * width + plan.rest * x.channels),
        values(new double[static_cast<size_t>(2 * size)]) {}
  double* first(int64_t chunk) const { return values.get() + chunk * width; }
  double* second(int64_t chunk) const { return values.get() + size + chunk * width; }
};

// ---- Forward -----------------------------------------------------------------------------------

// A batch whose sums overflowed float, or with NaN or infinity: again, in double throughout.
void settle(const BatchNormArgs& args, DataType type, int64_t c, const Merged& merged,
            Channels& channels) {
  channels.mean[c] = merged.mean();
  channels.var[c] = merged.var();
  if (!std::isfinite(channels.mean[c]) || !std::isfinite(channels.var[c])) {
    Moments exact;
    batch_norm_kernels().exact_statistics[type](args, c, &exact);
    channels.mean[c] = exact.mean;
    channels.var[c] = exact.m2 / exact.count;
  }
}

void forward_rows(const BatchNormArgs& args, const Layout& x, DataType type, bool training,
                  Channels& channels, Constants& constants) {
  const auto& kernels = batch_norm_kernels();
  const RowPlan plan(x);
  const int64_t elements = x.outer * x.channels * x.inner;
  const auto statistics = [&](int64_t t, int64_t g, Moments* result) {
    const int64_t c0 = t * plan.tile;
    kernels.row_statistics[type](args, c0, std::min(c0 + plan.tile, x.channels), g * kGroupBlocks,
                                 std::min((g + 1) * kGroupBlocks, plan.blocks.count), result);
  };
  // result is (groups, tile).
  const auto settle_tile = [&](int64_t t, const Moments* result) {
    const int64_t c0 = t * plan.tile;
    for (int64_t c = c0; c < std::min(c0 + plan.tile, x.channels); ++c) {
      Merged merged;
      for (int64_t g = 0; g < plan.groups; ++g) {
        merged.add(result[g * plan.tile + c - c0]);
      }
      settle(args, type, c, merged, channels);
      channels.set_forward(c, constants);
    }
  };
  if (training && plan.one_task_a_tile()) {
    parallel_tasks(plan.tiles, elements, [&](int64_t t) {
      std::vector<Moments> parts(static_cast<size_t>(plan.groups * plan.tile));
      for (int64_t g = 0; g < plan.groups; ++g) {
        statistics(t, g, parts.data() + g * plan.tile);
      }
      settle_tile(t, parts.data());
      const int64_t c0 = t * plan.tile;
      kernels.row_normalize[type](args, 0, x.outer, c0, std::min(c0 + plan.tile, x.channels), 0,
                                  x.inner);
    });
    return;
  }
  if (training) {
    const int64_t size = plan.groups * plan.tile;
    std::vector<Moments> parts(static_cast<size_t>(plan.tiles * size));
    parallel_tasks(plan.tiles * plan.groups, elements, [&](int64_t i) {
      const int64_t t = i / plan.groups, g = i % plan.groups;
      statistics(t, g, parts.data() + t * size + g * plan.tile);
    });
    for (int64_t t = 0; t < plan.tiles; ++t) {
      settle_tile(t, parts.data() + t * size);
    }
  } else {
    channels.set_forward(constants);
  }
  plan.for_pieces(x, [&](int64_t o0, int64_t o1, int64_t c0, int64_t c1, int64_t i0, int64_t i1) {
    kernels.row_normalize[type](args, o0, o1, c0, c1, i0, i1);
  });
}

void forward_columns(const BatchNormArgs& args, const Layout& x, DataType type, int64_t size,
                     bool training, Channels& channels, Constants& constants) {
  const auto& kernels = batch_norm_kernels();
  const ColumnPlan plan(x);
  const BatchNormArgs main = plan.main(args), rest = plan.remainder(args, size);
  const int64_t elements = x.outer * x.channels;
  if (training) {
    const ColumnParts parts(plan, x);
    if (plan.rest > 0) {
      kernels.column_statistics[type](rest, 0, 1, parts.first(plan.chunks),
                                      parts.second(plan.chunks));
    }
    parallel_ranges(plan.chunks, elements, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        kernels.column_statistics[type](main, i * plan.chunk,
                                        std::min((i + 1) * plan.chunk, plan.rows), parts.first(i),
                                        parts.second(i));
      }
    });
    parallel_ranges(x.channels, parts.size, [&](int64_t c0, int64_t c1) {
      for (int64_t c = c0; c < c1; ++c) {
        Merged merged;
        for (int64_t i = c; i < parts.size; i += x.channels) {
          merged.add({plan.rows_of(i / parts.width), parts.first(0)[i], parts.second(0)[i]});
        }
        settle(args, type, c, merged, channels);
        channels.set_forward(c, constants);
      }
    });
  } else {
    channels.set_forward(constants);
  }
  if (plan.rest > 0) {
    kernels.column_normalize[type](rest, 0, 1);
  }
  parallel_ranges(plan.chunks, elements, [&](int64_t begin, int64_t end) {
    kernels.column_normalize[type](main, begin * plan.chunk, std::min(end * plan.chunk, plan.rows));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_cpu(
    const Tensor& input, std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
    std::optional<Tensor> weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
    bool training, double eps, double slope) {
  STD_TORCH_CHECK(input.dim() >= 2, "batch_norm: x must be (N, C, ...), got ", input.dim(),
                  " dimension(s)");
  const DataType type = data_type_of(input);
  STD_TORCH_CHECK(training || (running_mean.has_value() && running_var.has_value()),
                  "batch_norm: evaluation needs running_mean and running_var");
  const Tensor x = layout_of(input).is_dense ? input : in_layout_of(input, empty_like(input));
  const Layout layout = layout_of(x);
  Channels channels;
  channels.eps = eps;
  channels.weight = to_doubles(weight, layout.channels, 1.0, "weight");
  channels.bias = to_doubles(bias, layout.channels, 0.0, "bias");
  channels.mean =
      to_doubles(training ? std::nullopt : running_mean, layout.channels, 0.0, "running_mean");
  channels.var =
      to_doubles(training ? std::nullopt : running_var, layout.channels, 0.0, "running_var");

  Tensor y = new_like(x);
  BatchNormArgs args{};
  args.outer = layout.outer;
  args.channels = layout.channels;
  args.inner = layout.inner;
  args.x = x.data_ptr();
  args.out = y.data_ptr();
  args.stream = bytes_of(x) >= stream_threshold();
  args.slope = slope;
  Tensor positive = new_nothing(x, ScalarType::Byte);
  std::optional<Tensor> added;
  if (residual.has_value()) {
    added = in_layout_of(*residual, x);
    args.residual = added->data_ptr();
    if (slope != 1.0) {
      const int64_t bytes = (x.numel() + 7) / 8 + x.size(0) * x.size(1);
      const int64_t used = layout.inner == 1
                               ? (x.numel() + 7) / 8
                               : layout.outer * layout.channels * ((layout.inner + 7) / 8);
      STD_TORCH_CHECK(used <= bytes,
                      "batch_norm: a residual needs x to be contiguous or channels_last");
      positive = torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
      args.positive = static_cast<uint8_t*>(positive.data_ptr());
      std::memset(args.positive + used, 0, static_cast<size_t>(bytes - used));
    }
  }
  if (x.numel() > 0) {
    const ColumnPlan plan(layout);
    Constants constants(type, layout.channels, layout.inner == 1 ? plan.fold : 1);
    args.center = constants.vector(kCenter);
    args.scale = constants.vector(kScale);
    args.shift = constants.vector(kShift);
    if (layout.inner == 1) {
      forward_columns(args, layout, type, x.element_size(), training, channels, constants);
    } else {
      forward_rows(args, layout, type, training, channels, constants);
    }
  }
  return {y, new_vector(x, channels.mean, ScalarType::Double),
          new_vector(x, channels.var, ScalarType::Double), positive};
}

// ---- Backward ----------------------------------------------------------------------------------

void backward_rows(const BatchNormArgs& args, const Layout& x, DataType type, bool want_sums,
                   bool want_x, const Channels& channels, Constants& constants,
                   std::vector<GradientSums>& sums) {
  const auto& kernels = batch_norm_kernels();
  const RowPlan plan(x);
  const int64_t elements = x.outer * x.channels * x.inner;
  const double count = static_cast<double>(x.outer * x.inner);
  const auto sum = [&](int64_t t, int64_t g, GradientSums* result) {
    const int64_t c0 = t * plan.tile;
    kernels.row_gradient_sums[type](args, c0, std::min(c0 + plan.tile, x.channels),
                                    g * kGroupBlocks,
                                    std::min((g + 1) * kGroupBlocks, plan.blocks.count), result);
  };
  const auto settle_tile = [&](int64_t t, const GradientSums* result) {
    const int64_t c0 = t * plan.tile;
    for (int64_t c = c0; c < std::min(c0 + plan.tile, x.channels); ++c) {
      GradientSums total{0.0, 0.0};
      for (int64_t g = 0; want_sums && g < plan.groups; ++g) {
        total.g += result[g * plan.tile + c - c0].g;
        total.gx += result[g * plan.tile + c - c0].gx;
      }
      sums[c] = channels.set_backward(c, total, count, args.training, constants);
    }
  };
  if (want_sums && plan.one_task_a_tile()) {
    parallel_tasks(plan.tiles, elements, [&](int64_t t) {
      std::vector<GradientSums> parts(static_cast<size_t>(plan.groups * plan.tile));
      for (int64_t g = 0; g < plan.groups; ++g) {
        sum(t, g, parts.data() + g * plan.tile);
      }
      settle_tile(t, parts.data());
      if (want_x) {
        const int64_t c0 = t * plan.tile;
        kernels.row_gradients[type](args, 0, x.outer, c0, std::min(c0 + plan.tile, x.channels), 0,
                                    x.inner);
      }
    });
    return;
  }
  const int64_t size = plan.groups * plan.tile;
  std::vector<GradientSums> parts(static_cast<size_t>(want_sums ? plan.tiles * size : 0));
  if (want_sums) {
    parallel_tasks(plan.tiles * plan.groups, elements, [&](int64_t i) {
      const int64_t t = i / plan.groups, g = i % plan.groups;
      sum(t, g, parts.data() + t * size + g * plan.tile);
    });
  }
  for (int64_t t = 0; t < plan.tiles; ++t) {
    settle_tile(t, parts.data() + (want_sums ? t * size : 0));
  }
  if (want_x) {
    plan.for_pieces(x, [&](int64_t o0, int64_t o1, int64_t c0, int64_t c1, int64_t i0, int64_t i1) {
      kernels.row_gradients[type](args, o0, o1, c0, c1, i0, i1);
    });
  }
}

void backward_columns(const BatchNormArgs& args, const Layout& x, DataType type, int64_t size,
                      bool want_sums, bool want_x, const Channels& channels, Constants& constants,
                      std::vector<GradientSums>& sums) {
  const auto& kernels = batch_norm_kernels();
  const ColumnPlan plan(x);
  const BatchNormArgs main = plan.main(args), rest = plan.remainder(args, size);
  const int64_t elements = x.outer * x.channels;
  const ColumnParts parts(plan, x);
  if (want_sums) {
    if (plan.rest > 0) {
      kernels.column_gradient_sums[type](rest, 0, 1, parts.first(plan.chunks),
                                         parts.second(plan.chunks));
    }
    parallel_ranges(plan.chunks, elements, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        kernels.column_gradient_sums[type](main, i * plan.chunk,
                                           std::min((i + 1) * plan.chunk, plan.rows),
                                           parts.first(i), parts.second(i));
      }
    });
  }
  parallel_ranges(x.channels, want_sums ? parts.size : 0, [&](int64_t c0, int64_t c1) {
    for (int64_t c = c0; c < c1; ++c) {
      GradientSums total{0.0, 0.0};
      for (int64_t i = c; want_sums && i < parts.size; i += x.channels) {
        total.g += parts.first(0)[i];
        total.gx += parts.second(0)[i];
      }
      sums[c] =
          channels.set_backward(c, total, static_cast<double>(x.outer), args.training, constants);
    }
  });
  if (!want_x) {
    return;
  }
  if (plan.rest > 0) {
    kernels.column_gradients[type](rest, 0, 1);
  }
  parallel_ranges(plan.chunks, elements, [&](int64_t begin, int64_t end) {
    kernels.column_gradients[type](main, begin * plan.chunk, std::min(end * plan.chunk, plan.rows));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward_cpu(
    const Tensor& grad, const Tensor& input, const Tensor& mean, const Tensor& var,
    std::optional<Tensor> weight, std::optional<Tensor> bias, const Tensor& positive, bool training,
    double eps, double slope, bool need_x, bool need_vectors, bool need_residual) {
  const DataType type = data_type_of(input);
  const Tensor x = layout_of(input).is_dense ? input : in_layout_of(input, empty_like(input));
  const Tensor grad_y = in_layout_of(grad, x);
  const Layout layout = layout_of(x);
  Channels channels;
  channels.eps = eps;
  channels.weight = to_doubles(weight, layout.channels, 1.0, "weight");
  channels.bias = to_doubles(bias, layout.channels, 0.0, "bias");
  channels.mean = to_doubles(mean, layout.channels, 0.0, "mean");
  channels.var = to_doubles(var, layout.channels, 0.0, "var");

  const bool want_x = need_x || need_residual;
  const bool want_sums = need_vectors || (training && need_x);
  Tensor grad_x = want_x ? new_like(x) : new_nothing(x, x.scalar_type());
  Tensor grad_residual = need_residual ? new_like(x) : new_nothing(x, x.scalar_type());
  BatchNormArgs args{};
  args.outer = layout.outer;
  args.channels = layout.channels;
  args.inner = layout.inner;
  args.x = x.data_ptr();
  args.grad_y = grad_y.data_ptr();
  args.out = want_x ? grad_x.data_ptr() : nullptr;
  args.grad_residual = need_residual ? grad_residual.data_ptr() : nullptr;
  args.positive = positive.numel() > 0 ? static_cast<uint8_t*>(positive.data_ptr()) : nullptr;
  args.training = training;
  args.stream = bytes_of(x) >= stream_threshold();
  args.slope = slope;
  std::vector<GradientSums> sums(static_cast<size_t>(layout.channels), GradientSums{0.0, 0.0});
  if (x.numel() > 0) {
    const ColumnPlan plan(layout);
    Constants constants(type, layout.channels, layout.inner == 1 ? plan.fold : 1);
    args.center = constants.vector(kCenter);
    args.scale = constants.vector(kScale);
    args.shift = constants.vector(kShift);
    args.grad_slope = constants.vector(kGradSlope);
    args.grad_shift = constants.vector(kGradShift);
    channels.set_forward(constants);
    if (layout.inner == 1) {
      backward_columns(args, layout, type, x.element_size(), want_sums, want_x, channels, constants,
                       sums);
    } else {
      backward_rows(args, layout, type, want_sums, want_x, channels, constants, sums);
    }
  }
  std::vector<double> grad_weight(need_vectors ? sums.size() : 0);
  std::vector<double> grad_bias(grad_weight.size());
  for (size_t c = 0; c < grad_weight.size(); ++c) {
    grad_weight[c] = sums[c].gx;
    grad_bias[c] = sums[c].g;
  }
  const ScalarType plain = type == kFloat64 ? ScalarType::Double : ScalarType::Float;
  return {grad_x, new_vector(x, grad_weight, weight.has_value() ? weight->scalar_type() : plain),
          new_vector(x, grad_bias, bias.has_value() ? bias->scalar_type() : plain), grad_residual};
}

// ---- Running statistics ------------------------------------------------------------------------

enum Nonfinite { kPropagate, kSkip, kRaise };

void batch_norm_update_cpu(Tensor running_mean, Tensor running_var, const Tensor& mean,
                           const Tensor& var, int64_t count, double momentum, int64_t nonfinite) {
  const int64_t channels = mean.numel();
  const std::vector<double> batch_mean = to_doubles(mean, channels, 0.0, "mean");
  const std::vector<double> batch_var = to_doubles(var, channels, 0.0, "var");
  if (count == 0) {
    return;
  }
  if (nonfinite != kPropagate) {
    for (int64_t c = 0; c < channels; ++c) {
      if (!std::isfinite(batch_mean[c]) || !std::isfinite(batch_var[c])) {
        STD_TORCH_CHECK(nonfinite != kRaise, "batch_norm: channel ", c,
                        " of the input holds NaN or infinity");
        return;
      }
    }
  }
  std::vector<double> r_mean = to_doubles(running_mean, channels, 0.0, "running_mean");
  std::vector<double> r_var = to_doubles(running_var, channels, 0.0, "running_var");
  const double unbias =
      static_cast<double>(count) / static_cast<double>(std::max<int64_t>(count - 1, 1));
  for (int64_t c = 0; c < channels; ++c) {
    r_mean[c] = (1.0 - momentum) * r_mean[c] + momentum * batch_mean[c];
    r_var[c] = (1.0 - momentum) * r_var[c] + momentum * (batch_var[c] * unbias);
  }
  const auto write = [&](Tensor& running, const std::vector<double>& values) {
    if (running.scalar_type() == ScalarType::Float && running.is_contiguous()) {
      std::copy(values.begin(), values.end(), static_cast<float*>(running.data_ptr()));
    } else {
      torch::stable::copy_(running, new_vector(mean, values, ScalarType::Double));
    }
  };
  write(running_mean, r_mean);
  write(running_var, r_var);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(normdrop, CPU, m) {
  m.impl("batch_norm", TORCH_BOX(&batch_norm_cpu));
  m.impl("batch_norm_backward", TORCH_BOX(&batch_norm_backward_cpu));
  m.impl("batch_norm_update", TORCH_BOX(&batch_norm_update_cpu));
}

}  // namespace normdrop
