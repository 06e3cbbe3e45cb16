// Small vectors of one element a channel, whatever their type.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "base/tensors.h"

namespace normdrop {

inline void check_vector(const Tensor& vector, int64_t count, const char* name) {
  STD_TORCH_CHECK(vector.numel() == count, "batch_norm: ", name, " must have ", count,
                  " elements, got ", vector.numel());
  STD_TORCH_CHECK(vector.is_cpu(), "batch_norm: ", name, " must be on the CPU, where x is");
}

// Calls use(pointer) with the elements of a small floating-point vector, float or double.
template <class Use>
void with_elements(const Tensor& vector, const Use& use) {
  Tensor source = vector.is_contiguous() ? vector : torch::stable::contiguous(vector);
  const ScalarType type = source.scalar_type();
  if (type == ScalarType::Float) {
    use(static_cast<const float*>(source.data_ptr()));
    return;
  }
  if (type != ScalarType::Double) {
    source = torch::stable::to(source, ScalarType::Double);
  }
  use(static_cast<const double*>(source.data_ptr()));
}

inline void copy_to(double* result, const Tensor& vector, int64_t count, const char* name) {
  check_vector(vector, count, name);
  with_elements(vector, [&](const auto* p) { std::copy(p, p + count, result); });
}

inline Tensor vector_of(const double* values, int64_t count, ScalarType type) {
  Tensor result = new_vector(count, type == ScalarType::Float ? type : ScalarType::Double);
  if (type == ScalarType::Float) {
    std::copy(values, values + count, static_cast<float*>(result.data_ptr()));
    return result;
  }
  std::copy(values, values + count, static_cast<double*>(result.data_ptr()));
  return type == ScalarType::Double ? result : torch::stable::to(result, type);
}

}  // namespace normdrop
