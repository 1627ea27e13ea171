#if defined(__aarch64__)

#include "common/simd/target_neon.h"
#include "pool/cpu_kernels.h"

namespace fastconv {

const PoolKernels* pool_kernels_neon() { return &kPoolKernels; }

}  // namespace fastconv

#endif
