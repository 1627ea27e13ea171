#if defined(__x86_64__)

#include "common/simd/target_avx512.h"
#include "depthwise/cpu_kernels.h"

namespace fastconv {

const DepthwiseKernels* depthwise_kernels_avx512() { return &kDepthwiseKernels; }

}  // namespace fastconv

#endif
