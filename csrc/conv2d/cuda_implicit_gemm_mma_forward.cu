// implicit_gemm_mma, forward. See cuda_implicit_gemm_mma.cuh.
//
//   NHWC        16-byte copies of 8 channels of a pixel's tap, and of a filter's
//   NCHW, 1x1   16-byte copies of 8 neighbouring pixels of a channel, turned by ldmatrix.trans
//   NCHW        pixels under a window gathered number by number; filters are runs of (channel, tap)
//
// Where numbers of channels, or addresses, do not allow 16-byte copies, the same slices are put together from numbers.
#include "conv2d/cuda_implicit_gemm_mma_modes.cuh"
#include "conv2d/cuda_implicit_gemm_mma_shares.cuh"
#include "cuda_support/launchers.h"

namespace fastconv::cuda {
namespace {

void launch_product(const ConvProblem& p, const MmaProduct& product, const MmaTensors& tensors, cudaStream_t stream) {
  if (p.layout == Layout::nhwc) {
    if (all_vectors(p, p.c_per_group(), tensors.read, tensors.weight))
      launch_mma<NhwcForward<true>>(p, product, tensors, stream);
    else launch_mma<NhwcForward<false>>(p, product, tensors, stream);
    return;
  }
  const bool filters = all_vectors(p, p.c_per_group() * p.r * p.s, tensors.weight);
  if (filters && is_pointwise(p) && all_vectors(p, p.h * p.w, tensors.read))
    launch_mma<NchwPointwise>(p, product, tensors, stream);
  else if (filters) launch_mma<NchwForward<true>>(p, product, tensors, stream);
  else launch_mma<NchwForward<false>>(p, product, tensors, stream);
}

}  // namespace

/// y = epilogue(x * weight); all tensors dense in the problem's layout. `workspace` holds
/// implicit_gemm_mma_workspace(p) float32 numbers.
void launch_implicit_gemm_mma_forward(const ConvProblem& p, const void* x, const void* weight, void* y,
                                      const CudaEpilogue& epilogue, float* workspace, cudaStream_t stream) {
  require_mma_serves(p, refuse_implicit_gemm_mma_cuda(p, ConvPass::forward));
  MmaProduct product(p, false);
  product.shares = static_cast<int>(mma_shares(p, product));
  product.stores_vectors =
      all_vectors(p, p.layout == Layout::nhwc ? p.k_per_group() : p.p() * p.q(), y, epilogue.residual);
  const MmaTensors tensors{x, weight, y, epilogue, workspace};
  launch_product(p, product, tensors, stream);
  if (product.shares > 1) launch_add_mma_shares(p, product, tensors, stream);
}

int64_t implicit_gemm_mma_workspace(const ConvProblem& p) { return mma_workspace(p, false); }

FASTCONV_LAUNCHER("conv2d", "implicit_gemm_mma", launch_implicit_gemm_mma_forward);
FASTCONV_LAUNCHER("conv2d_workspace", "implicit_gemm_mma", implicit_gemm_mma_workspace);

}  // namespace fastconv::cuda
