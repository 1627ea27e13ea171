// The second pass of weight gradients: first passes write partial[slot][weight] in float32, this adds the slots.
#pragma once

#include "cuda_support/dtype.h"
#include "cuda_support/launch.h"

namespace fastconv::cuda {
namespace {

constexpr int kSlotColumns = 32, kSlotRows = 16;

/// Thread (i, j) adds every 16th slot from j on for one weight: hundreds of slots one after another would take longer
/// than many a first pass. Then thread (i, 0) adds the 16 sums. The order is always the same.
template <class T>
__global__ void __launch_bounds__(kSlotColumns* kSlotRows)
    add_slots(const float* partial, T* grad_weight, int slots, int64_t weights) {
  FASTCONV_SHARED(sums, float[kSlotRows][kSlotColumns]);
  const int64_t weight = int64_t{blockIdx.x} * kSlotColumns + threadIdx.x;
  float sum = 0;
  if (weight < weights) {
#pragma unroll 4
    for (int slot = threadIdx.y; slot < slots; slot += kSlotRows) sum += partial[slot * weights + weight];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || weight >= weights) return;
#pragma unroll
  for (int row = 1; row < kSlotRows; ++row) sum += sums[row][threadIdx.x];
  grad_weight[weight] = from_float<T>(sum);
}

// Not inline: it names a kernel that every file has for itself.
void launch_add_slots(DType dtype, const float* partial, void* grad_weight, int slots, int64_t weights,
                      cudaStream_t stream) {
  dispatch_element("weight gradient", dtype, [&](auto element) {
    using T = decltype(element);
    launch(FASTCONV_KERNEL(add_slots<T>), blocks_for(weights, kSlotColumns), dim3(kSlotColumns, kSlotRows), 0, stream,
           partial, static_cast<T*>(grad_weight), slots, weights);
  });
}

}  // namespace
}  // namespace fastconv::cuda
