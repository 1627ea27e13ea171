#if defined(__x86_64__)

#include "common/simd/target_avx2.h"
#include "pool/cpu_kernels.h"

namespace fastconv {

const PoolKernels* pool_kernels_avx2() { return &kPoolKernels; }

}  // namespace fastconv

#endif
