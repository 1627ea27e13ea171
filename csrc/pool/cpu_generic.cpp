#include "common/simd/target_generic.h"
#include "pool/cpu_kernels.h"

namespace fastconv {

const PoolKernels* pool_kernels_generic() { return &kPoolKernels; }

}  // namespace fastconv
