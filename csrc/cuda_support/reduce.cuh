// Sums over a warp and over a block in a fixed order: the same bits at every run.
#pragma once

#include "cuda_support/cuda.h"

namespace fastconv::cuda {

/// The sum of all 32 lanes, in every lane. All lanes of the warp take part.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

/// The sum over all threads of a block (a multiple of 32, along x), valid in thread 0. Contains __syncthreads(), before
/// and after its use of shared memory, so it may be called in a loop.
template <int kThreads>
__device__ __forceinline__ float block_sum(float value) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024);
  constexpr int kWarps = kThreads / 32;
  FASTCONV_SHARED(partial, float[kWarps]);
  value = warp_sum(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0;
  if (threadIdx.x == 0) {
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += partial[warp];
  }
  return sum;
}

}  // namespace fastconv::cuda
