#include "common/simd/target_generic.h"
#include "norm/cpu_kernels.h"

namespace fastconv {

const NormKernels* norm_kernels_generic() { return &kNormKernels; }

}  // namespace fastconv
