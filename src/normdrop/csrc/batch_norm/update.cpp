// The running statistics of batch normalization.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/vectors.h"

namespace normdrop {
namespace {

enum Nonfinite { kPropagate, kSkip, kRaise };

// r <- (1 - momentum) r + momentum * batch.
void move_running(Tensor& running, const double* batch, int64_t count, double momentum,
                  double factor) {
  const auto moved = [&](double old, int64_t c) {
    return (1.0 - momentum) * old + momentum * (batch[c] * factor);
  };
  if (running.scalar_type() == ScalarType::Float && running.is_contiguous()) {
    float* p = static_cast<float*>(running.data_ptr());
    for (int64_t c = 0; c < count; ++c) {
      p[c] = static_cast<float>(moved(p[c], c));
    }
    return;
  }
  Tensor result = new_vector(count, ScalarType::Double);
  double* p = static_cast<double*>(result.data_ptr());
  copy_to(p, running, count, "the running statistics");
  for (int64_t c = 0; c < count; ++c) {
    p[c] = moved(p[c], c);
  }
  torch::stable::copy_(running, result);
}

void batch_norm_update_cpu(Tensor running_mean, Tensor running_var, const Tensor& mean,
                           const Tensor& var, int64_t count, double momentum, int64_t nonfinite) {
  const int64_t channels = mean.numel();
  check_vector(var, channels, "var");
  check_vector(running_mean, channels, "running_mean");
  check_vector(running_var, channels, "running_var");
  if (count == 0) {
    return;
  }
  std::vector<double> batch(static_cast<size_t>(2 * channels));
  copy_to(batch.data(), mean, channels, "mean");
  copy_to(batch.data() + channels, var, channels, "var");
  if (nonfinite != kPropagate) {
    for (int64_t c = 0; c < channels; ++c) {
      if (!std::isfinite(batch[c]) || !std::isfinite(batch[channels + c])) {
        STD_TORCH_CHECK(nonfinite != kRaise, "batch_norm: channel ", c,
                        " of the input holds NaN or infinity");
        return;
      }
    }
  }
  const double unbias =
      static_cast<double>(count) / static_cast<double>(std::max<int64_t>(count - 1, 1));
  move_running(running_mean, batch.data(), channels, momentum, 1.0);
  move_running(running_var, batch.data() + channels, channels, momentum, unbias);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(normdrop, CPU, m) {
  m.impl("batch_norm_update", TORCH_BOX(&batch_norm_update_cpu));
}

}  // namespace normdrop
