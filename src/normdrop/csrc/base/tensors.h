// New tensors for results.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "base/layout.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace normdrop {

// A new CPU tensor, without the dispatcher: 0.3 us instead of the 2 us that empty_like takes.
inline Tensor new_strided(int64_t dim, const int64_t* sizes, const int64_t* strides,
                          ScalarType type) {
  AtenTensorHandle handle = nullptr;
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, code,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor new_vector(int64_t count, ScalarType type) {
  const int64_t stride = 1;
  return new_strided(1, &count, &stride, type);
}

// Large new tensors ask for huge pages: where the allocator gives fresh memory, 25 MB in pages of
// 4 KiB took 18 ms to be mapped, in pages of 2 MiB 5 ms, and the kernel's work is 3 ms.
inline Tensor in_huge_pages(Tensor result) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t start = reinterpret_cast<uintptr_t>(result.data_ptr());
  const uintptr_t bytes = static_cast<uintptr_t>(result.numel()) * result.element_size();
  const uintptr_t first = (start + page - 1) / page * page, last = (start + bytes) / page * page;
  if (last > first + page) {
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: may fail
  }
#endif
  return result;
}

// A new tensor like x.
inline Tensor new_like(const Tensor& x) {
  const bool is_plain = x.is_cpu() && layout_of(x).is_dense;
  return in_huge_pages(
      is_plain ? new_strided(x.dim(), x.sizes().data(), x.strides().data(), x.scalar_type())
               : torch::stable::empty_like(x));
}

}  // namespace normdrop
