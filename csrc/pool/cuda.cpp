// The pooling ops on CUDA tensors; cuda_select.h chooses among the kernels of an op.
#include "common/registry.h"
#include "cuda_support/host.h"
#include "pool/cuda_pool.h"
#include "pool/host.h"

namespace fastconv::cuda {
namespace {

struct CudaPool {
  static void max_pool(const PoolProblem& p, const Tensor& x, Tensor& y, Tensor* offsets) {
    const OnDevice device(x);
    launch_max_pool2d(p, x.const_data_ptr(), y.mutable_data_ptr(), offsets ? offsets->mutable_data_ptr() : nullptr,
                      device.stream());
    count_call(offsets ? CudaKernel::max_pool2d_with_offsets : CudaKernel::max_pool2d);
  }
  static void max_indices(const PoolProblem& p, const Tensor& offsets, Tensor& indices) {
    const OnDevice device(offsets);
    launch_max_pool2d_indices(p, offsets.const_data_ptr(), indices.mutable_data_ptr(), device.stream());
    count_call(CudaKernel::max_pool2d_indices);
  }
  static void max_gather(const PoolProblem& p, const Tensor& x, const Tensor& offsets, Tensor& y) {
    const OnDevice device(x);
    launch_max_pool2d_gather(p, x.const_data_ptr(), offsets.const_data_ptr(), y.mutable_data_ptr(), device.stream());
    count_call(CudaKernel::max_pool2d_gather);
  }
  static void max_backward(const PoolProblem& p, const Tensor& grad, const Tensor& offsets, Tensor& grad_input) {
    const OnDevice device(grad);
    launch_max_pool2d_backward(p, grad.const_data_ptr(), offsets.const_data_ptr(), grad_input.mutable_data_ptr(),
                               device.stream());
    count_call(CudaKernel::max_pool2d_backward);
  }

  static void average(const PoolProblem& p, bool count_include_pad, double divisor_override, const Tensor& x,
                      Tensor& y) {
    const OnDevice device(x);
    launch_avg_pool2d(p, count_include_pad, divisor_override, x.const_data_ptr(), y.mutable_data_ptr(),
                      device.stream());
    count_call(CudaKernel::avg_pool2d);
  }
  static void average_backward(const PoolProblem& p, bool count_include_pad, double divisor_override,
                               const Tensor& grad, Tensor& grad_input) {
    const OnDevice device(grad);
    launch_avg_pool2d_backward(p, count_include_pad, divisor_override, grad.const_data_ptr(),
                               grad_input.mutable_data_ptr(), device.stream());
    count_call(CudaKernel::avg_pool2d_backward);
  }

  static void adaptive(const PoolProblem& p, Size2 output, const Tensor& x, Tensor& y) {
    const OnDevice device(x);
    launch_adaptive_avg_pool2d(p, output.h, output.w, x.const_data_ptr(), y.mutable_data_ptr(), device.stream());
    count_call(CudaKernel::adaptive_avg_pool2d);
  }
  static void adaptive_backward(const PoolProblem& p, Size2 output, const Tensor& grad, Tensor& grad_input) {
    const OnDevice device(grad);
    launch_adaptive_avg_pool2d_backward(p, output.h, output.w, grad.const_data_ptr(), grad_input.mutable_data_ptr(),
                                        device.stream());
    count_call(CudaKernel::adaptive_avg_pool2d_backward);
  }

  static void global_average(const PoolProblem& p, const Tensor& x, Tensor& y) {
    if (p.h * p.w == 0) {  // the mean of no elements
      torch::stable::fill_(y, std::numeric_limits<double>::quiet_NaN());
      return;
    }
    const OnDevice device(x);
    launch_global_avg_pool2d(p, x.const_data_ptr(), y.mutable_data_ptr(), device.stream());
    count_call(CudaKernel::global_avg_pool2d);
  }
  static void global_average_backward(const PoolProblem& p, const Tensor& grad, Tensor& grad_input) {
    const OnDevice device(grad);
    launch_global_avg_pool2d_backward(p, grad.const_data_ptr(), grad_input.mutable_data_ptr(), device.stream());
    count_call(CudaKernel::global_avg_pool2d_backward);
  }
};

}  // namespace
}  // namespace fastconv::cuda

FASTCONV_CUDA_LIBRARY(m) { fastconv::PoolOps<fastconv::cuda::CudaPool>::add_to(m); }
