// Batch normalization: the two operators. What is prepared for both is in work.h; the
// loops and their algebra are in rows_kernels.cpp and columns_kernels.cpp.
//
// Statistics come from partial sums over blocks that depend on the shape alone, merged in a fixed
// order in double. So the result has the same bits for any number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "batch_norm/work.h"

namespace normdrop {
namespace {

using torch::stable::empty_like;

// ---- Forward -----------------------------------------------------------------------------------

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
