#include "batch_norm_kernels.h"

#include "simd.h"

namespace normdrop::NORMDROP_ISA {

extern const BatchNormKernels batch_norm_kernels = {kVectorBytes};

}  // namespace normdrop::NORMDROP_ISA
