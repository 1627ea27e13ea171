#if defined(__aarch64__)

#include "common/simd/target_neon.h"
#include "norm/cpu_kernels.h"

namespace fastconv {

const NormKernels* norm_kernels_neon() { return &kNormKernels; }

}  // namespace fastconv

#endif
