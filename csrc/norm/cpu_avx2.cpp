#if defined(__x86_64__)

#include "common/simd/target_avx2.h"
#include "norm/cpu_kernels.h"

namespace fastconv {

const NormKernels* norm_kernels_avx2() { return &kNormKernels; }

}  // namespace fastconv

#endif
