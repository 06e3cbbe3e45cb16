// Batch normalization: checks, constants, and who computes what. The loops and their algebra are
// in batch_norm_rows_kernels.cpp and batch_norm_columns_kernels.cpp.
//
// Statistics come from partial sums over blocks that depend on the shape alone, merged in a fixed
// order in double. So the result has the same bits for any number of threads.
//
//   rows (inner > 1): a task is a few channels, both passes, the second from the last sample to
//     the first, so that it begins with what is still in the cache. Where there are fewer channels
//     than threads, the passes are separate tasks over blocks and rows, with the same sums.
//   columns (inner = 1): a task is a chunk of rows; all partial sums are merged between the passes.
//     Narrow matrices are folded: k rows of C channels are seen as one row of k*C, at least 512,
//     so that what a row costs by itself does not count. The partial sums of such a chunk are k,
//     of as many elements each; which ones is the kernel's choice.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <optional>
#include <tuple>
#include <vector>

#include "batch_norm_kernels.h"
#include "layout.h"
#include "mask.h"
#include "scratch.h"
#include "vectors.h"

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

int64_t bytes_of(const Tensor& x) { return x.numel() * static_cast<int64_t>(x.element_size()); }

// The last-level cache that a core reaches, 0 if unknown. sysconf is asked last: on AMD's servers
// it gives the sum over all of the processor, 320 MB where a core reaches 32.
int64_t last_level_cache() {
  std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");
  int64_t kilobytes = 0;
  if (file >> kilobytes && kilobytes > 0) {  // "32768K"
    return kilobytes << 10;
  }
#ifdef _SC_LEVEL3_CACHE_SIZE
  return sysconf(_SC_LEVEL3_CACHE_SIZE);
#else
  return 0;
#endif
}

// Bytes from which a result is written past the cache: a quarter of it. At that size, 8 MB of 32,
// BN+ReLU took 0.8 of the time, and the convolutions before and after it were not slower: what a
// step of training reads and writes in between has emptied the cache anyway.
int64_t stream_threshold() {
  static const int64_t bytes =
      std::min<int64_t>(std::max<int64_t>(last_level_cache() / 4, 8 << 20), 32 << 20);
  return bytes;
}

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

// The dropout mask that follows; without a seed there is none.
std::optional<Mask> mask_of(const Tensor& x, const std::optional<Tensor>& seed, int64_t threshold,
                            int64_t sample_offset) {
  if (!seed.has_value()) {
    return std::nullopt;
  }
  return Mask(x, *seed, threshold, sample_offset);
}

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
    while (fold * x.channels < 512 || fold * x.channels % kColumnMultiple != 0) {
      ++fold;
    }
    rows = x.outer / fold;
    rest = x.outer % fold;
    chunk = std::max<int64_t>(rows >= 1024 ? 128 : 64, (rows + 31) / 32);
    chunk = (chunk + 7) / 8 * 8;
    chunks = (rows + chunk - 1) / chunk;
  }

  // Parts of `channels` columns each: `fold` of a chunk, and `rest` of the remainder.
  int64_t parts() const { return chunks * fold + rest; }

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
    args.kept_first += at;
    args.outer = 1;
    args.channels *= rest;
    return args;
  }
};

// What both operators prepare: the loops' arguments, their constants, the vectors in double.
struct Work {
  Layout x;
  DataType type;
  int64_t element_size;
  ColumnPlan plan;
  std::optional<Mask> mask;
  Scratch scratch;
  BatchNormArgs args{};
  ChannelArgs channels{};
  ColumnParts parts{};                         // of columns
  double* counts = nullptr;                    // rows of every chunk; one of the remainder
  double *first = nullptr, *second = nullptr;  // of backward: the sums

  Work(const Tensor& tensor, const Layout& layout, DataType data_type,
       const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
       const std::optional<Mask>& drop_mask, double drop_scale)
      : x(layout),
        type(data_type),
        element_size(static_cast<int64_t>(tensor.element_size())),
        plan(layout),
        mask(drop_mask),
        scratch(bytes()) {
    args.outer = x.outer;
    args.channels = args.period = x.channels;
    args.inner = x.inner;
    args.x = tensor.data_ptr();
    args.stream = bytes_of(tensor) >= stream_threshold();
    channels.channels = x.channels;
    channels.fold = fold();
    channels.count = static_cast<double>(x.outer * x.inner);
    channels.weight = elements(weight, "weight");
    channels.bias = elements(bias, "bias");
    for (const void** constant :
         {&args.center, &args.scale, &args.shift, &args.grad_slope, &args.grad_shift}) {
      *constant = type == kFloat64 ? static_cast<const void*>(scratch.take<double>(length()))
                                   : scratch.take<float>(length());
    }
    if (x.inner == 1) {
      const int64_t count = plan.parts();
      parts = {x.channels, plan.fold, count, scratch.take<double>(count * x.channels),
               scratch.take<double>(count * x.channels)};
      counts = scratch.take<double>(plan.chunks + 1);
      for (int64_t i = 0; i < plan.chunks; ++i) {
        counts[i] = static_cast<double>(std::min((i + 1) * plan.chunk, plan.rows) - i * plan.chunk);
      }
      counts[plan.chunks] = 1.0;
    }
    first = scratch.take<double>(x.channels);
    second = scratch.take<double>(x.channels);
    if (mask.has_value()) {
      mask->set_memory(scratch.take<uint64_t>(mask->words()));
      args.kept = mask->bits();
      args.kept_first = mask->first_bit();
      args.drop_scale = drop_scale;
    }
  }

  int64_t fold() const { return x.inner == 1 ? plan.fold : 1; }
  int64_t length() const { return fold() * x.channels; }
  int64_t elements_of_x() const { return x.outer * x.channels * x.inner; }

  void set_forward(int64_t c0, int64_t c1) const {
    batch_norm_channels().set_forward[type](channels, args, c0, c1);
  }
  void set_backward(int64_t c0, int64_t c1) const {
    batch_norm_channels().set_backward[type](channels, args, c0, c1, first, second);
  }

  // Whether the tasks of the next pass draw the dropout mask, each what it needs of it; then one
  // thread draws while another waits for memory. They do where they `can`, and where all pieces of
  // `step` elements have bits of their own; else the mask is drawn here, if there is one.
  bool tasks_draw(bool can, int64_t step) const {
    if (!mask.has_value()) {
      return false;
    }
    if (can && mask->grain() != 0 && step % mask->grain() == 0) {
      return true;
    }
    mask->draw_all();
    return false;
  }
  bool tiles_draw(bool can, int64_t tile) const {
    return tasks_draw(can && x.channels * x.inner % 64 == 0, tile * x.inner);
  }
  bool chunks_draw(bool can) const { return tasks_draw(can && plan.rows > 0, 8 * length()); }
  void draw_tile(int64_t c0, int64_t c1) const {
    for (int64_t o = 0; o < x.outer; ++o) {
      mask->draw((o * x.channels + c0) * x.inner, (o * x.channels + c1) * x.inner);
    }
  }
  void draw_chunk(int64_t m0, int64_t m1) const {
    mask->draw(m0 * length(), m1 == plan.rows ? elements_of_x() : m1 * length());
  }

  // Calls run(args, m0, m1, first, second) for the chunks of rows, then for the remainder. The
  // thread that had a chunk before has it again, and finds in its cache what it left there.
  template <class Run>
  void for_chunks(bool draws, const Run& run) const {
    const int64_t width = length();
    const BatchNormArgs main = plan.main(args);
    parallel_ranges(plan.chunks, elements_of_x(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t m0 = i * plan.chunk, m1 = std::min(m0 + plan.chunk, plan.rows);
        if (draws) {
          draw_chunk(m0, m1);
        }
        run(main, m0, m1, parts.first + i * width, parts.second + i * width);
      }
    });
    if (plan.rest > 0) {
      const int64_t at = plan.chunks * width;
      run(plan.remainder(args, element_size), 0, 1, parts.first + at, parts.second + at);
    }
  }

  // Calls run(args, m0, m1) for the rows of each thread together, since it takes the last first.
  template <class Run>
  void for_ranges(const Run& run) const {
    const BatchNormArgs main = plan.main(args);
    parallel_ranges(plan.chunks, elements_of_x(), [&](int64_t begin, int64_t end) {
      run(main, begin * plan.chunk, std::min(end * plan.chunk, plan.rows));
    });
    if (plan.rest > 0) {
      run(plan.remainder(args, element_size), 0, 1);
    }
  }

 private:
  size_t bytes() const {
    size_t result = 5 * Scratch::bytes_of(length(), type == kFloat64 ? 8 : 4);
    result += 4 * Scratch::bytes_of(x.channels, 8);
    if (x.inner == 1) {
      result += 2 * Scratch::bytes_of(plan.parts() * x.channels, 8);
      result += Scratch::bytes_of(plan.chunks + 1, 8);
    }
    if (mask.has_value()) {
      result += Scratch::bytes_of(mask->words(), 8);
    }
    return result;
  }

  const double* elements(const std::optional<Tensor>& vector, const char* name) {
    double* result = scratch.take<double>(x.channels);
    if (!vector.has_value()) {
      return nullptr;
    }
    copy_to(result, *vector, x.channels, name);
    return result;
  }
};

// ---- Forward -----------------------------------------------------------------------------------

// A batch whose sums overflowed float, or with NaN or infinity: again, in double throughout.
void settle(const Work& work, int64_t c) {
  double &mean = work.channels.mean[c], &var = work.channels.var[c];
  if (!std::isfinite(mean) || !std::isfinite(var)) {
    Moments exact;
    batch_norm_channels().exact_statistics[work.type](work.args, c, &exact);
    mean = exact.mean;
    var = exact.m2 / exact.count;
  }
}

void forward_rows(const Work& work, bool training) {
  const auto& kernels = batch_norm_rows();
  const Layout& x = work.x;
  const BatchNormArgs& args = work.args;
  const DataType type = work.type;
  const RowPlan plan(x);
  const int64_t elements = work.elements_of_x();
  const auto statistics = [&](int64_t t, int64_t g, Moments* result) {
    const int64_t c0 = t * plan.tile;
    kernels.statistics[type](args, c0, std::min(c0 + plan.tile, x.channels), g * kGroupBlocks,
                             std::min((g + 1) * kGroupBlocks, plan.blocks.count), result);
  };
  // result is (groups, tile).
  const auto settle_tile = [&](int64_t t, const Moments* result) {
    const int64_t c0 = t * plan.tile, c1 = std::min(c0 + plan.tile, x.channels);
    for (int64_t c = c0; c < c1; ++c) {
      Merged merged;
      for (int64_t g = 0; g < plan.groups; ++g) {
        merged.add(result[g * plan.tile + c - c0]);
      }
      work.channels.mean[c] = merged.mean();
      work.channels.var[c] = merged.var();
      settle(work, c);
    }
    work.set_forward(c0, c1);
  };
  const bool is_whole = training && plan.one_task_a_tile();
  const bool draws = work.tiles_draw(is_whole, plan.tile);
  if (is_whole) {
    parallel_tasks(plan.tiles, elements, [&](int64_t t) {
      std::vector<Moments> parts(static_cast<size_t>(plan.groups * plan.tile));
      for (int64_t g = 0; g < plan.groups; ++g) {
        statistics(t, g, parts.data() + g * plan.tile);
      }
      settle_tile(t, parts.data());
      const int64_t c0 = t * plan.tile, c1 = std::min(c0 + plan.tile, x.channels);
      if (draws) {
        work.draw_tile(c0, c1);
      }
      kernels.normalize[type](args, 0, x.outer, c0, c1, 0, x.inner);
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
    work.set_forward(0, x.channels);
  }
  plan.for_pieces(x, [&](int64_t o0, int64_t o1, int64_t c0, int64_t c1, int64_t i0, int64_t i1) {
    kernels.normalize[type](args, o0, o1, c0, c1, i0, i1);
  });
}

void forward_columns(const Work& work, bool training) {
  const auto& kernels = batch_norm_columns();
  const bool draws = work.chunks_draw(training);
  if (training) {
    work.for_chunks(draws, kernels.statistics[work.type]);
    if (!batch_norm_channels().merge_columns(work.parts, work.counts, work.channels.mean,
                                             work.channels.var)) {
      for (int64_t c = 0; c < work.x.channels; ++c) {
        settle(work, c);
      }
    }
  }
  work.set_forward(0, work.x.channels);
  work.for_ranges(kernels.normalize[work.type]);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_cpu(
    const Tensor& input, std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
    std::optional<Tensor> weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
    bool training, double eps, double slope, std::optional<Tensor> seed, int64_t threshold,
    double drop_scale, int64_t sample_offset) {
  STD_TORCH_CHECK(input.dim() >= 2, "batch_norm: x must be (N, C, ...), got ", input.dim(),
                  " dimension(s)");
  const DataType type = data_type_of(input);
  STD_TORCH_CHECK(training || (running_mean.has_value() && running_var.has_value()),
                  "batch_norm: evaluation needs running_mean and running_var");
  const Tensor x = layout_of(input).is_dense ? input : in_layout_of(input, empty_like(input));
  const Layout layout = layout_of(x);
  Tensor mean = new_vector(layout.channels, ScalarType::Double);
  Tensor var = new_vector(layout.channels, ScalarType::Double);
  Tensor y = new_like(x);
  Work work(x, layout, type, weight, bias, mask_of(x, seed, threshold, sample_offset), drop_scale);
  work.channels.eps = eps;
  work.channels.mean = static_cast<double*>(mean.data_ptr());
  work.channels.var = static_cast<double*>(var.data_ptr());
  if (!training) {
    copy_to(work.channels.mean, *running_mean, layout.channels, "running_mean");
    copy_to(work.channels.var, *running_var, layout.channels, "running_var");
  } else if (x.numel() == 0) {
    std::fill_n(work.channels.mean, layout.channels, 0.0);
    std::fill_n(work.channels.var, layout.channels, 0.0);
  }
  BatchNormArgs& args = work.args;
  args.out = y.data_ptr();
  args.slope = slope;
  int64_t bytes = 0, used = 0;
  std::optional<Tensor> added;
  if (residual.has_value()) {
    added = in_layout_of(*residual, x);
    args.residual = added->data_ptr();
    if (slope != 1.0) {
      bytes = (x.numel() + 7) / 8 + x.size(0) * x.size(1);
      used = layout.inner == 1 ? (x.numel() + 7) / 8
                               : layout.outer * layout.channels * ((layout.inner + 7) / 8);
      STD_TORCH_CHECK(used <= bytes,
                      "batch_norm: a residual needs x to be contiguous or channels_last");
    }
  }
  Tensor positive = new_vector(bytes, ScalarType::Byte);
  if (bytes > 0) {
    args.positive = static_cast<uint8_t*>(positive.data_ptr());
    std::memset(args.positive + used, 0, static_cast<size_t>(bytes - used));
  }
  if (x.numel() > 0) {
    if (layout.inner == 1) {
      forward_columns(work, training);
    } else {
      forward_rows(work, training);
    }
  }
  return {y, mean, var, positive};
}

// ---- Backward ----------------------------------------------------------------------------------

void backward_rows(const Work& work, bool want_sums, bool want_x) {
  const auto& kernels = batch_norm_rows();
  const Layout& x = work.x;
  const BatchNormArgs& args = work.args;
  const DataType type = work.type;
  const RowPlan plan(x);
  const int64_t elements = work.elements_of_x();
  const auto sum = [&](int64_t t, int64_t g, GradientSums* result) {
    const int64_t c0 = t * plan.tile;
    kernels.gradient_sums[type](args, c0, std::min(c0 + plan.tile, x.channels), g * kGroupBlocks,
                                std::min((g + 1) * kGroupBlocks, plan.blocks.count), result);
  };
  const auto settle_tile = [&](int64_t t, const GradientSums* result) {
    const int64_t c0 = t * plan.tile, c1 = std::min(c0 + plan.tile, x.channels);
    for (int64_t c = c0; c < c1; ++c) {
      for (int64_t g = 0; g < plan.groups; ++g) {
        work.first[c] += result[g * plan.tile + c - c0].g;
        work.second[c] += result[g * plan.tile + c - c0].gx;
      }
    }
    work.set_backward(c0, c1);
  };
  const bool is_whole = want_sums && plan.one_task_a_tile();
  const bool draws = work.tiles_draw(is_whole, plan.tile);
  if (is_whole) {
    parallel_tasks(plan.tiles, elements, [&](int64_t t) {
      const int64_t c0 = t * plan.tile, c1 = std::min(c0 + plan.tile, x.channels);
      if (draws) {
        work.draw_tile(c0, c1);
      }
      std::vector<GradientSums> parts(static_cast<size_t>(plan.groups * plan.tile));
      for (int64_t g = 0; g < plan.groups; ++g) {
        sum(t, g, parts.data() + g * plan.tile);
      }
      settle_tile(t, parts.data());
      if (want_x) {
        kernels.gradients[type](args, 0, x.outer, c0, c1, 0, x.inner);
      }
    });
    return;
  }
  if (want_sums) {
    const int64_t size = plan.groups * plan.tile;
    std::vector<GradientSums> parts(static_cast<size_t>(plan.tiles * size));
    parallel_tasks(plan.tiles * plan.groups, elements, [&](int64_t i) {
      const int64_t t = i / plan.groups, g = i % plan.groups;
      sum(t, g, parts.data() + t * size + g * plan.tile);
    });
    for (int64_t t = 0; t < plan.tiles; ++t) {
      settle_tile(t, parts.data() + t * size);
    }
  } else {
    work.set_backward(0, x.channels);
  }
  if (want_x) {
    plan.for_pieces(x, [&](int64_t o0, int64_t o1, int64_t c0, int64_t c1, int64_t i0, int64_t i1) {
      kernels.gradients[type](args, o0, o1, c0, c1, i0, i1);
    });
  }
}

void backward_columns(const Work& work, bool want_sums, bool want_x) {
  const auto& kernels = batch_norm_columns();
  const bool draws = work.chunks_draw(want_sums);
  if (want_sums) {
    work.for_chunks(draws, kernels.gradient_sums[work.type]);
    batch_norm_channels().add_columns(work.parts, work.first, work.second);
  }
  work.set_backward(0, work.x.channels);
  if (want_x) {
    work.for_ranges(kernels.gradients[work.type]);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward_cpu(
    const Tensor& grad, const Tensor& input, const Tensor& mean, const Tensor& var,
    std::optional<Tensor> weight, std::optional<Tensor> bias, const Tensor& positive, bool training,
    double eps, double slope, bool need_x, bool need_vectors, bool need_residual,
    std::optional<Tensor> seed, int64_t threshold, double drop_scale, int64_t sample_offset) {
  const DataType type = data_type_of(input);
  const Tensor x = layout_of(input).is_dense ? input : in_layout_of(input, empty_like(input));
  const Tensor grad_y = in_layout_of(grad, x);
  const Layout layout = layout_of(x);
  const int64_t count = layout.channels;
  Work work(x, layout, type, weight, bias, mask_of(x, seed, threshold, sample_offset), drop_scale);
  work.channels.eps = eps;
  std::vector<double> copies;
  const auto doubles = [&](const Tensor& vector, int64_t at, const char* name) {
    check_vector(vector, count, name);
    if (vector.scalar_type() == ScalarType::Double && vector.is_contiguous()) {
      return static_cast<double*>(vector.data_ptr());
    }
    copies.resize(static_cast<size_t>(2 * count));
    copy_to(copies.data() + at, vector, count, name);
    return copies.data() + at;
  };
  work.channels.mean = doubles(mean, 0, "mean");
  work.channels.var = doubles(var, count, "var");

  const bool want_x = need_x || need_residual;
  const bool want_sums = need_vectors || (training && need_x);
  Tensor grad_x = want_x ? new_like(x) : new_vector(0, x.scalar_type());
  Tensor grad_residual = need_residual ? new_like(x) : new_vector(0, x.scalar_type());
  BatchNormArgs& args = work.args;
  args.grad_y = grad_y.data_ptr();
  args.out = want_x ? grad_x.data_ptr() : nullptr;
  args.grad_residual = need_residual ? grad_residual.data_ptr() : nullptr;
  args.positive = positive.numel() > 0 ? static_cast<uint8_t*>(positive.data_ptr()) : nullptr;
  args.training = training;
  args.slope = slope;
  std::fill_n(work.first, count, 0.0);
  std::fill_n(work.second, count, 0.0);
  if (x.numel() > 0) {
    work.set_forward(0, count);
    if (layout.inner == 1) {
      backward_columns(work, want_sums, want_x);
    } else {
      backward_rows(work, want_sums, want_x);
    }
  }
  const ScalarType plain = type == kFloat64 ? ScalarType::Double : ScalarType::Float;
  const int64_t size = need_vectors ? count : 0;
  return {grad_x, vector_of(work.second, size, weight.has_value() ? weight->scalar_type() : plain),
          vector_of(work.first, size, bias.has_value() ? bias->scalar_type() : plain),
          grad_residual};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(normdrop, CPU, m) {
  m.impl("batch_norm", TORCH_BOX(&batch_norm_cpu));
  m.impl("batch_norm_backward", TORCH_BOX(&batch_norm_backward_cpu));
}

}  // namespace normdrop
