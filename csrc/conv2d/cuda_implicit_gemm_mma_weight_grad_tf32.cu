// implicit_gemm_tf32 and implicit_gemm_3xtf32, weight gradient. See cuda_implicit_gemm_mma_weight_grad.cuh, and
// cuda_implicit_gemm_mma_weight_floats.cuh for how slices are turned.
#include "conv2d/cuda_implicit_gemm_mma_weight_floats.cuh"
#include "conv2d/cuda_implicit_gemm_mma_weight_grad.cuh"
#include "cuda_support/launchers.h"

namespace fastconv::cuda {
namespace {

template <bool kVector>
struct NhwcFloatWeightGrad {
  static constexpr bool kHeld = true, kNhwc = true;
  template <class T, int kRows, int kThreads>
  using Gradients = NhwcFloats<T, kRows, kThreads, kVector, true>;
  template <class T, int kRows, int kThreads>
  using Images = NhwcFloats<T, kRows, kThreads, kVector, false>;
};

template <bool kVector>
struct NchwFloatWeightGrad {
  static constexpr bool kHeld = true, kNhwc = false;
  template <class T, int kRows, int kThreads>
  using Gradients =
      std::conditional_t<kVector, PlaneRows<T, kRows, kThreads, true>, NchwFloats<T, kRows, kThreads, true>>;
  template <class T, int kRows, int kThreads>
  using Images = NchwFloats<T, kRows, kThreads, false>;
};

template <class Math>
void launch_weight_grad(const ConvProblem& p, const void* grad_y, const void* x, void* grad_weight, float* workspace,
                        cudaStream_t stream) {
  require_mma_serves(p, refuse_implicit_gemm_tf32_cuda(p, ConvPass::weight_grad));
  for_weight_grad_mode<NhwcFloatWeightGrad, NchwFloatWeightGrad>(
      p, grad_y, x, [&](auto mode) { launch_weight_grad_math<Math, decltype(mode)>(p, grad_y, x, workspace, stream); });
  launch_add_weight_grads(p, workspace, grad_weight, stream);
}

}  // namespace

/// Of both.
int64_t implicit_gemm_tf32_weight_grad_workspace(const ConvProblem& p) {
  require_mma_serves(p, refuse_implicit_gemm_tf32_cuda(p, ConvPass::weight_grad));
  return weight_grad_workspace(p);
}

void launch_implicit_gemm_tf32_weight_grad(const ConvProblem& p, const void* grad_y, const void* x, void* grad_weight,
                                           float* workspace, cudaStream_t stream) {
  launch_weight_grad<Tf32Math>(p, grad_y, x, grad_weight, workspace, stream);
}
void launch_implicit_gemm_3xtf32_weight_grad(const ConvProblem& p, const void* grad_y, const void* x, void* grad_weight,
                                             float* workspace, cudaStream_t stream) {
  launch_weight_grad<SplitTf32Math>(p, grad_y, x, grad_weight, workspace, stream);
}

FASTCONV_LAUNCHER("conv2d_weight_grad", "implicit_gemm_tf32", launch_implicit_gemm_tf32_weight_grad);
FASTCONV_LAUNCHER("conv2d_weight_grad", "implicit_gemm_3xtf32", launch_implicit_gemm_3xtf32_weight_grad);
FASTCONV_LAUNCHER("conv2d_weight_grad_workspace", "implicit_gemm_tf32", implicit_gemm_tf32_weight_grad_workspace);
FASTCONV_LAUNCHER("conv2d_weight_grad_workspace", "implicit_gemm_3xtf32", implicit_gemm_tf32_weight_grad_workspace);

}  // namespace fastconv::cuda
