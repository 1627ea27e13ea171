#include "common/simd/target_generic.h"
#include "conv2d/cpu_kernels.h"

namespace fastconv {

const Conv2dKernels* conv2d_kernels_generic() { return &kConv2dKernels; }

}  // namespace fastconv
