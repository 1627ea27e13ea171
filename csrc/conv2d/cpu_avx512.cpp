#if defined(__x86_64__)

#include "common/simd/target_avx512.h"
#include "conv2d/cpu_kernels.h"

namespace fastconv {

const Conv2dKernels* conv2d_kernels_avx512() { return &kConv2dKernels; }

}  // namespace fastconv

#endif
