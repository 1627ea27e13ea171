// What a convolution kernel is told to do with its sums: scale, shift, residual, activation. Host side as well.
#pragma once

#include "common/problem.h"
#include "cuda_support/cuda.h"

namespace fastconv::cuda {

/// One number per output channel, in whatever type the user keeps it; null for none.
struct ChannelNumbers {
  const void* data = nullptr;
  DType dtype = DType::f32;

  __device__ float at(int64_t channel) const;
};

/// y = activation(scale * sum + shift + residual)
struct CudaEpilogue {
  ChannelNumbers scale, shift;
  const void* residual = nullptr;  // the output's type and layout, or null
  Activation activation = Activation::none;
};

}  // namespace fastconv::cuda
