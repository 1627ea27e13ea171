#if defined(__aarch64__)

#include "common/simd/target_neon.h"
#include "depthwise/cpu_kernels.h"

namespace fastconv {

const DepthwiseKernels* depthwise_kernels_neon() { return &kDepthwiseKernels; }

}  // namespace fastconv

#endif
