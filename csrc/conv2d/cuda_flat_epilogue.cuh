// The end of an epilogue with few branches, for kernels that store often.
#pragma once

#include <cmath>

#include "conv2d/cuda_epilogue.cuh"

namespace fastconv::cuda {

/// What finish() of cuda_epilogue.cuh does after scale and shift. That function has 7 branches that are the same for
/// all outputs: they cost as much as half of a 3x3 window's multiply-adds, and the compiler copies a loop for every
/// combination of them (minutes of compilation). Here ReLU and ReLU6 are a clamp.
struct FlatEpilogue {
  const void* residual = nullptr;
  float lowest = -INFINITY, highest = INFINITY;
  bool is_tanh = false;

  FlatEpilogue() = default;
  explicit FlatEpilogue(const CudaEpilogue& epilogue)
      : residual(epilogue.residual), is_tanh(epilogue.activation == Activation::tanh) {
    if (epilogue.activation == Activation::relu || epilogue.activation == Activation::relu6) lowest = 0;
    if (epilogue.activation == Activation::relu6) highest = 6;
  }

  /// NaN stays NaN.
  __device__ __forceinline__ float clamp(float value) const {
    return value < lowest ? lowest : value > highest ? highest : value;
  }

  /// `value` is scaled and shifted.
  template <class T>
  __device__ __forceinline__ T finish(float value, int64_t index) const {
    if (residual != nullptr) value += to_float(static_cast<const T*>(residual)[index]);
    value = clamp(value);
    if (is_tanh) value = tanhf(value);
    return from_float<T>(value);
  }
};

}  // namespace fastconv::cuda
