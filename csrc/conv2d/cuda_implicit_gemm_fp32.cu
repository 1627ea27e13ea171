// The forward pass as a product of pixels and filters, over channels and window: cuda_implicit_gemm_fp32.cuh.
#include "conv2d/cuda_implicit_gemm_fp32_launch.cuh"

namespace fastconv::cuda {

int64_t implicit_gemm_fp32_forward_workspace(const ConvProblem& p) { return workspace_elements(p, ConvPass::forward); }

/// y = epilogue(x * weight); all tensors dense in the problem's layout. Where the tiles do not fill the chip, blocks
/// share the depth, and a second pass adds their sums in order.
void launch_implicit_gemm_fp32_forward(const ConvProblem& p, const void* x, const void* weight, void* y,
                                       const CudaEpilogue& epilogue, float* workspace, cudaStream_t stream) {
  const GemmTiling tiling = implicit_gemm_fp32_tiling(p, ConvPass::forward);
  const SimtEpilogue finish(epilogue);
  if (tiling.splits == 1) {
    launch_product<ConvPass::forward>(p, tiling, x, nullptr, weight, static_cast<float*>(y), finish, stream);
  } else {
    launch_product<ConvPass::forward>(p, tiling, x, nullptr, weight, workspace, SimtEpilogue(), stream);
    launch_add_splits<true>(p, tiling, ConvPass::forward, workspace, y, finish, stream);
  }
}

int64_t tiling_of_forward(const ConvProblem& p) { return describe_tiling(p, ConvPass::forward); }

FASTCONV_LAUNCHER("conv2d", "implicit_gemm_fp32", launch_implicit_gemm_fp32_forward);
FASTCONV_LAUNCHER("conv2d_workspace", "implicit_gemm_fp32", implicit_gemm_fp32_forward_workspace);
FASTCONV_LAUNCHER("explain_conv2d", "implicit_gemm_fp32", tiling_of_forward);

}  // namespace fastconv::cuda
