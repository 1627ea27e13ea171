// The input gradient as products of pixels and channels, over filters and those taps that reach the pixels: one for
// each phase of the stride, all in one launch. cuda_implicit_gemm_fp32.cuh has the kernel.
#include "conv2d/cuda_implicit_gemm_fp32_launch.cuh"

namespace fastconv::cuda {

int64_t implicit_gemm_fp32_input_grad_workspace(const ConvProblem& p) {
  return workspace_elements(p, ConvPass::input_grad);
}

void launch_implicit_gemm_fp32_input_grad(const ConvProblem& p, const void* grad_y, const void* weight, void* grad_x,
                                          float* workspace, cudaStream_t stream) {
  const GemmTiling tiling = implicit_gemm_fp32_tiling(p, ConvPass::input_grad);
  float* result = tiling.splits == 1 ? static_cast<float*>(grad_x) : workspace;
  launch_product<ConvPass::input_grad>(p, tiling, grad_y, nullptr, weight, result, SimtEpilogue(), stream);
  if (tiling.splits > 1)
    launch_add_splits<false>(p, tiling, ConvPass::input_grad, workspace, grad_x, SimtEpilogue(), stream);
}

int64_t tiling_of_input_grad(const ConvProblem& p) { return describe_tiling(p, ConvPass::input_grad); }

FASTCONV_LAUNCHER("conv2d_input_grad", "implicit_gemm_fp32", launch_implicit_gemm_fp32_input_grad);
FASTCONV_LAUNCHER("conv2d_input_grad_workspace", "implicit_gemm_fp32", implicit_gemm_fp32_input_grad_workspace);
FASTCONV_LAUNCHER("explain_conv2d_input_grad", "implicit_gemm_fp32", tiling_of_input_grad);

}  // namespace fastconv::cuda
