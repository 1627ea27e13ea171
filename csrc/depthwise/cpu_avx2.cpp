#if defined(__x86_64__)

#include "common/simd/target_avx2.h"
#include "depthwise/cpu_kernels.h"

namespace fastconv {

const DepthwiseKernels* depthwise_kernels_avx2() { return &kDepthwiseKernels; }

}  // namespace fastconv

#endif
