// implicit_gemm_mma, weight gradient in fp16 and bf16. See cuda_implicit_gemm_mma_weight_grad.cuh.
//
//   NHWC        16-byte copies of 8 filters of a pixel, and of 8 channels of what its tap sees; both turned by ldmatrix
//   NCHW, 1x1   16-byte copies of 8 neighbouring pixels of a channel, of either tensor
//   NCHW        images gathered along rows of pixels; gradients copied where planes are whole chunks, else gathered
#include "conv2d/cuda_implicit_gemm_mma_weight_grad.cuh"
#include "cuda_support/launchers.h"

namespace fastconv::cuda {
namespace {

template <bool kVector>
struct NhwcWeightGrad {
  static constexpr bool kHeld = !kVector, kNhwc = true;
  template <class T, int kRows, int kThreads>
  using Gradients = NhwcGradients<T, kRows, kThreads, kVector>;
  template <class T, int kRows, int kThreads>
  using Images = NhwcTaps<T, kRows, kThreads, kVector>;
};

template <bool kVector>
struct NchwWeightGrad {
  static constexpr bool kHeld = true, kNhwc = false;
  template <class T, int kRows, int kThreads>
  using Gradients =
      std::conditional_t<kVector, PlaneRows<T, kRows, kThreads, true>, GatheredPlanes<T, kRows, kThreads, true>>;
  template <class T, int kRows, int kThreads>
  using Images = GatheredPlanes<T, kRows, kThreads, false>;
};

}  // namespace

/// Float32 numbers, for the current device.
int64_t implicit_gemm_mma_weight_grad_workspace(const ConvProblem& p) {
  require_mma_serves(p, refuse_implicit_gemm_mma_cuda(p, ConvPass::weight_grad));
  return weight_grad_workspace(p);
}

void launch_implicit_gemm_mma_weight_grad(const ConvProblem& p, const void* grad_y, const void* x, void* grad_weight,
                                          float* workspace, cudaStream_t stream) {
  require_mma_serves(p, refuse_implicit_gemm_mma_cuda(p, ConvPass::weight_grad));
  for_weight_grad_mode<NhwcWeightGrad, NchwWeightGrad>(p, grad_y, x, [&](auto mode) {
    using Mode = decltype(mode);
    if (p.dtype == DType::f16) launch_weight_grad_math<HalfMath<half>, Mode>(p, grad_y, x, workspace, stream);
    else launch_weight_grad_math<HalfMath<bfloat16>, Mode>(p, grad_y, x, workspace, stream);
  });
  launch_add_weight_grads(p, workspace, grad_weight, stream);
}

FASTCONV_LAUNCHER("conv2d_weight_grad", "implicit_gemm_mma", launch_implicit_gemm_mma_weight_grad);
FASTCONV_LAUNCHER("conv2d_weight_grad_workspace", "implicit_gemm_mma", implicit_gemm_mma_weight_grad_workspace);

}  // namespace fastconv::cuda
