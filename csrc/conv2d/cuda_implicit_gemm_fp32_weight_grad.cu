// The weight gradient as a product of filters and taps, over the pixels of all images. Weights are few and pixels many,
// so that blocks share the pixels; a second pass (cuda_slots.cuh) adds their sums in a fixed order.
// cuda_implicit_gemm_fp32.cuh has the kernel.
#include "conv2d/cuda_implicit_gemm_fp32_launch.cuh"
#include "conv2d/cuda_slots.cuh"

namespace fastconv::cuda {

int64_t implicit_gemm_fp32_weight_grad_workspace(const ConvProblem& p) {
  return workspace_elements(p, ConvPass::weight_grad);
}

void launch_implicit_gemm_fp32_weight_grad(const ConvProblem& p, const void* grad_y, const void* x, void* grad_weight,
                                           float* workspace, cudaStream_t stream) {
  const GemmTiling tiling = implicit_gemm_fp32_tiling(p, ConvPass::weight_grad);
  float* result = tiling.splits == 1 ? static_cast<float*>(grad_weight) : workspace;
  launch_product<ConvPass::weight_grad>(p, tiling, x, grad_y, nullptr, result, SimtEpilogue(), stream);
  if (tiling.splits > 1)
    launch_add_slots(p.dtype, workspace, grad_weight, static_cast<int>(tiling.splits),
                     result_elements(p, ConvPass::weight_grad), stream);
}

int64_t tiling_of_weight_grad(const ConvProblem& p) { return describe_tiling(p, ConvPass::weight_grad); }

FASTCONV_LAUNCHER("conv2d_weight_grad", "implicit_gemm_fp32", launch_implicit_gemm_fp32_weight_grad);
FASTCONV_LAUNCHER("conv2d_weight_grad_workspace", "implicit_gemm_fp32", implicit_gemm_fp32_weight_grad_workspace);
FASTCONV_LAUNCHER("explain_conv2d_weight_grad", "implicit_gemm_fp32", tiling_of_weight_grad);

}  // namespace fastconv::cuda
