// What a convolution kernel does with its sums before it stores them: scale, shift, residual, activation.
#pragma once

#include "conv2d/cuda_epilogue.h"
#include "cuda_support/dtype.h"

namespace fastconv::cuda {

__device__ __forceinline__ float ChannelNumbers::at(int64_t channel) const {
  // The branch is the same for all threads, and there are few channels: it costs nothing beside the convolution.
  switch (dtype) {
    case DType::f16:
      return to_float(static_cast<const half*>(data)[channel]);
    case DType::bf16:
      return to_float(static_cast<const bfloat16*>(data)[channel]);
    case DType::f64:
      return static_cast<float>(static_cast<const double*>(data)[channel]);
    default:
      return static_cast<const float*>(data)[channel];
  }
}

/// NaN stays NaN, as in torch: comparisons are written so that NaN takes the branch that keeps it.
__device__ __forceinline__ float activate(float value, Activation activation) {
  switch (activation) {
    case Activation::relu:
      return value < 0 ? 0 : value;
    case Activation::relu6:
      return value < 0 ? 0 : value > 6 ? 6 : value;
    case Activation::tanh:
      return tanhf(value);
    default:
      return value;
  }
}

/// The output element at `index` of channel `channel`, from its sum.
template <class T>
__device__ __forceinline__ T finish(const CudaEpilogue& epilogue, float sum, int64_t channel, int64_t index) {
  if (epilogue.scale.data != nullptr) sum *= epilogue.scale.at(channel);
  if (epilogue.shift.data != nullptr) sum += epilogue.shift.at(channel);
  if (epilogue.residual != nullptr) sum += to_float(static_cast<const T*>(epilogue.residual)[index]);
  return from_float<T>(activate(sum, epilogue.activation));
}

}  // namespace fastconv::cuda
