// Local response normalisation on CUDA tensors.
#include "common/registry.h"
#include "cuda_support/host.h"
#include "norm/cuda_norm.h"
#include "norm/host.h"

namespace fastconv::cuda {
namespace {

struct CudaNorm {
  static void forward(const NormProblem& p, const Tensor& x, Tensor& y) {
    const OnDevice device(x);
    launch_local_response_norm(p, x.const_data_ptr(), y.mutable_data_ptr(), device.stream());
    count_call(CudaKernel::local_response_norm);
  }
  static void jvp(const NormProblem& p, const Tensor& x, const Tensor& tangent, Tensor& y_tangent) {
    const OnDevice device(x);
    launch_local_response_norm_jvp(p, x.const_data_ptr(), tangent.const_data_ptr(), y_tangent.mutable_data_ptr(),
                                   device.stream());
    count_call(CudaKernel::local_response_norm_jvp);
  }
  static void backward(const NormProblem& p, const Tensor& grad, const Tensor& x, Tensor& grad_input) {
    const OnDevice device(x);
    launch_local_response_norm_backward(p, grad.const_data_ptr(), x.const_data_ptr(), grad_input.mutable_data_ptr(),
                                        device.stream());
    count_call(CudaKernel::local_response_norm_backward);
  }
};

}  // namespace
}  // namespace fastconv::cuda

FASTCONV_CUDA_LIBRARY(m) { fastconv::NormOps<fastconv::cuda::CudaNorm>::add_to(m); }
