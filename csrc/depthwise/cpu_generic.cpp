#include "common/simd/target_generic.h"
#include "depthwise/cpu_kernels.h"

namespace fastconv {

const DepthwiseKernels* depthwise_kernels_generic() { return &kDepthwiseKernels; }

}  // namespace fastconv
