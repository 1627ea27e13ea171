#if defined(__x86_64__)

#include "common/simd/target_avx512.h"
#include "norm/cpu_kernels.h"

namespace fastconv {

const NormKernels* norm_kernels_avx512() { return &kNormKernels; }

}  // namespace fastconv

#endif
