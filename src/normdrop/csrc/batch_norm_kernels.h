// The loops of batch normalization, one table an instruction set. See batch_norm_kernels.cpp.

#pragma once

#include <stdint.h>

#include "dispatch.h"

namespace normdrop {

struct BatchNormKernels {
  int vector_bytes;
};

NORMDROP_KERNEL_TABLE(BatchNormKernels, batch_norm_kernels)

}  // namespace normdrop
