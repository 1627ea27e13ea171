// The torch side of a CUDA op: where its tensors are, the stream, registration.
//
// The host functions of csrc/<family>/cuda.cpp are compiled twice. In _C_cuda they are the CUDA implementations of the
// ops of csrc/ops.cpp. In _C_emulated (with FASTCONV_EMULATOR) they are ops of the same names and schemas in the
// namespace fastconv_emulated, which take CPU tensors and run the same kernels in the emulator.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "common/checks.h"
#include "cuda_support/cuda.h"

#if defined(FASTCONV_EMULATOR)
/// FASTCONV_CUDA_LIBRARY(m) { m.impl("max_pool2d", TORCH_BOX(&max_pool2d)); }
#define FASTCONV_CUDA_NAMESPACE fastconv_emulated
#define FASTCONV_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(fastconv_emulated, CPU, m)
#else
#define FASTCONV_CUDA_NAMESPACE fastconv
#define FASTCONV_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(fastconv, CUDA, m)

// Every CUDA build of torch exports it; torch's own declaration stands behind USE_CUDA, which wants CUDA's headers.
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace fastconv::cuda {

/// Makes the tensor's device current for the life of the object, and knows its current stream.
class OnDevice {
 public:
#if defined(FASTCONV_EMULATOR)
  explicit OnDevice(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
#else
  explicit OnDevice(const Tensor& tensor) : device_(tensor.get_device()), guard_(tensor.get_device()) {}
  cudaStream_t stream() const {
    void* stream = nullptr;
    require(aoti_torch_get_current_cuda_stream(device_, &stream) == 0, "torch has no current CUDA stream on device ",
            device_);
    return static_cast<cudaStream_t>(stream);
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

/// float32 scratch memory from torch's allocator: in stream order, so a CUDA graph may capture it.
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t floats)
      : tensor_(torch::stable::new_empty(like, {&floats, 1}, torch::headeronly::ScalarType::Float)) {}
  float* floats() { return static_cast<float*>(tensor_.mutable_data_ptr()); }

 private:
  Tensor tensor_;
};

}  // namespace fastconv::cuda
