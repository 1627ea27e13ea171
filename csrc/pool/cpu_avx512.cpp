#if defined(__x86_64__)

#include "common/simd/target_avx512.h"
#include "pool/cpu_kernels.h"

namespace fastconv {

const PoolKernels* pool_kernels_avx512() { return &kPoolKernels; }

}  // namespace fastconv

#endif
