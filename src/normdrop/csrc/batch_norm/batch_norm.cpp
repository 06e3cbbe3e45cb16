// Batch normalization: the two operators. What is prepared for both is in work.h and rows.h;
// the loops and their algebra are in rows_kernels.cpp and columns_kernels.cpp.
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

#include "batch_norm/rows.h"

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
  run_rows<Moments>(
      work, training ? kernels.statistics[work.type] : nullptr, kernels.normalize[work.type],
      [&](int64_t c, const Moments* parts, int64_t step, int64_t count) {
        Merged merged;
        for (int64_t g = 0; g < count; ++g) {
          merged.add(parts[g * step]);
        }
        work.channels.mean[c] = merged.mean();
        work.channels.var[c] = merged.var();
        settle(work, c);
      },
      [&](int64_t c0, int64_t c1) { work.set_forward(c0, c1); });
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
  run_rows<GradientSums>(
      work, want_sums ? kernels.gradient_sums[work.type] : nullptr,
      want_x ? kernels.gradients[work.type] : nullptr,
      [&](int64_t c, const GradientSums* parts, int64_t step, int64_t count) {
        for (int64_t g = 0; g < count; ++g) {
          work.first[c] += parts[g * step].g;
          work.second[c] += parts[g * step].gx;
        }
      },
      [&](int64_t c0, int64_t c1) { work.set_backward(c0, c1); });
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
