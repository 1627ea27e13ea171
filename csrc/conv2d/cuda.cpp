// The convolution ops on CUDA tensors: kernels chosen by cuda_select.h.
#include "conv2d/cuda_launch.h"
#include "conv2d/cuda_select.h"
#include "conv2d/host.h"
#include "cuda_support/host.h"
#include "depthwise/cuda_launch.h"

namespace fastconv::cuda {
namespace {

/// Per-channel numbers as the kernels read them; holds the tensor that they are in.
class ChannelOperand {
 public:
  ChannelOperand(const char* op, const std::optional<Tensor>& values) {
    if (!values) return;
    const bool has_gaps = values->numel() > 1 && values->stride(0) != 1;
    tensor_ = has_gaps ? torch::stable::contiguous(*values) : *values;
    numbers_ = {tensor_->const_data_ptr(), dtype_of(op, *values)};
  }
  const ChannelNumbers& numbers() const { return numbers_; }

 private:
  std::optional<Tensor> tensor_;
  ChannelNumbers numbers_;
};

/// launch(arguments..., workspace, stream), the workspace of so many float32 numbers and on the device of `like`.
template <typename Launch, typename... Arguments>
void launch_with_workspace(const OnDevice& device, const Tensor& like, int64_t floats, Launch launch,
                           const Arguments&... arguments) {
  Workspace workspace(like, floats);
  launch(arguments..., workspace.floats(), device.stream());
}

[[noreturn]] void no_launcher() { throw std::logic_error("the chosen kernel has no launcher for this pass"); }

struct CudaConv2d {
  static constexpr bool kPacks = false;

  static CudaKernel select(const ConvProblem& p, ConvPass pass, std::string_view algo) {
    return select_cuda_conv2d(p, pass, algo);
  }

  static void forward(CudaKernel kernel, const ConvProblem& p, const Tensor& x, const Tensor& weight,
                      const FusedOperands& fused, Tensor& y) {
    const OnDevice device(x);
    const ChannelOperand scale("conv2d", fused.scale), shift("conv2d", fused.shift);
    const CudaEpilogue epilogue{scale.numbers(), shift.numbers(),
                                fused.residual ? fused.residual->const_data_ptr() : nullptr, fused.activation};
    const void *from_x = x.const_data_ptr(), *from_weight = weight.const_data_ptr();
    void* to = y.mutable_data_ptr();
    const auto run = [&](auto launch) { launch(p, from_x, from_weight, to, epilogue, device.stream()); };
    const auto run_with = [&](auto launch, int64_t floats) {
      launch_with_workspace(device, x, floats, launch, p, from_x, from_weight, to, epilogue);
    };
    switch (kernel) {
      case CudaKernel::stem_mma:
        run(launch_stem_mma_forward);
        break;
      case CudaKernel::stem:
        run(launch_stem_forward);
        break;
      case CudaKernel::depthwise:
        run(launch_depthwise_forward);
        break;
      case CudaKernel::implicit_gemm_mma:
        run_with(launch_implicit_gemm_mma_forward, implicit_gemm_mma_workspace(p));
        break;
      case CudaKernel::implicit_gemm_tf32:
        run(launch_implicit_gemm_tf32_forward);
        break;
      case CudaKernel::implicit_gemm_3xtf32:
        run(launch_implicit_gemm_3xtf32_forward);
        break;
      case CudaKernel::implicit_gemm_fp32:
        run_with(launch_implicit_gemm_fp32_forward, implicit_gemm_fp32_forward_workspace(p));
        break;
      case CudaKernel::conv2d_direct:
        run(launch_direct_forward);
        break;
      default:
        no_launcher();
    }
    count_call(kernel);
  }

  static void input_grad(CudaKernel kernel, const ConvProblem& p, const Tensor& grad, const Tensor& weight,
                         Tensor& grad_input) {
    const OnDevice device(grad);
    const void *from_grad = grad.const_data_ptr(), *from_weight = weight.const_data_ptr();
    void* to = grad_input.mutable_data_ptr();
    const auto run = [&](auto launch) { launch(p, from_grad, from_weight, to, device.stream()); };
    const auto run_with = [&](auto launch, int64_t floats) {
      launch_with_workspace(device, grad, floats, launch, p, from_grad, from_weight, to);
    };
    switch (kernel) {
      case CudaKernel::stem_input_grad:
        run(launch_stem_input_grad);
        break;
      case CudaKernel::depthwise_input_grad:
        run(launch_depthwise_input_grad);
        break;
      case CudaKernel::implicit_gemm_mma_input_grad:
        run_with(launch_implicit_gemm_mma_input_grad, implicit_gemm_mma_input_grad_workspace(p));
        break;
      case CudaKernel::implicit_gemm_tf32_input_grad:
        run(launch_implicit_gemm_tf32_input_grad);
        break;
      case CudaKernel::implicit_gemm_3xtf32_input_grad:
        run(launch_implicit_gemm_3xtf32_input_grad);
        break;
      case CudaKernel::implicit_gemm_fp32_input_grad:
        run_with(launch_implicit_gemm_fp32_input_grad, implicit_gemm_fp32_input_grad_workspace(p));
        break;
      case CudaKernel::conv2d_input_grad_direct:
        run(launch_direct_input_grad);
        break;
      default:
        no_launcher();
    }
    count_call(kernel);
  }

  static void weight_grad(CudaKernel kernel, const ConvProblem& p, const Tensor& grad, const Tensor& x,
                          Tensor& grad_weight) {
    const OnDevice device(grad);
    const void *from_grad = grad.const_data_ptr(), *from_x = x.const_data_ptr();
    void* to = grad_weight.mutable_data_ptr();
    const auto run_with = [&](auto launch, int64_t floats) {
      launch_with_workspace(device, grad, floats, launch, p, from_grad, from_x, to);
    };
    switch (kernel) {
      case CudaKernel::stem_weight_grad:
        run_with(launch_stem_weight_grad, stem_weight_grad_workspace(p));
        break;
      case CudaKernel::depthwise_weight_grad:
        run_with(launch_depthwise_weight_grad, depthwise_weight_grad_workspace(p));
        break;
      case CudaKernel::implicit_gemm_mma_weight_grad:
        run_with(launch_implicit_gemm_mma_weight_grad, implicit_gemm_mma_weight_grad_workspace(p));
        break;
      case CudaKernel::implicit_gemm_tf32_weight_grad:
        run_with(launch_implicit_gemm_tf32_weight_grad, implicit_gemm_tf32_weight_grad_workspace(p));
        break;
      case CudaKernel::implicit_gemm_3xtf32_weight_grad:
        run_with(launch_implicit_gemm_3xtf32_weight_grad, implicit_gemm_tf32_weight_grad_workspace(p));
        break;
      case CudaKernel::implicit_gemm_fp32_weight_grad:
        run_with(launch_implicit_gemm_fp32_weight_grad, implicit_gemm_fp32_weight_grad_workspace(p));
        break;
      case CudaKernel::conv2d_weight_grad_direct:
        launch_direct_weight_grad(p, from_grad, from_x, to, device.stream());
        break;
      default:
        no_launcher();
    }
    count_call(kernel);
  }

  static void bias_grad(const Tensor& grad, int64_t n, int64_t k, int64_t plane, Layout layout, DType dtype,
                        Tensor& grad_bias) {
    const OnDevice device(grad);
    Workspace workspace(grad, bias_grad_workspace(n, k, plane, layout));
    launch_bias_grad(grad.const_data_ptr(), grad_bias.mutable_data_ptr(), workspace.floats(), n, k, plane, layout,
                     dtype, device.stream());
    count_call(CudaKernel::conv2d_bias_grad);
  }
};

}  // namespace
}  // namespace fastconv::cuda

FASTCONV_CUDA_LIBRARY(m) { fastconv::Conv2dOps<fastconv::cuda::CudaConv2d>::add_to(m); }
