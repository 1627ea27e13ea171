#if defined(__aarch64__)

#include "common/simd/target_neon.h"
#include "conv2d/cpu_kernels.h"

namespace fastconv {

const Conv2dKernels* conv2d_kernels_neon() { return &kConv2dKernels; }

}  // namespace fastconv

#endif
