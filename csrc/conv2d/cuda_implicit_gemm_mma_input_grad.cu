// implicit_gemm_mma, input gradient. See cuda_implicit_gemm_mma.cuh.
//
// The loop of the forward pass over other operands: images are gradients, depth runs over filters, and taps go the
// other way. Strides make phases (cuda_implicit_gemm_mma_product.h): blocks along y of one launch. A phase that no tap
// reaches has no depth, and its elements become zeros.
//
//   NHWC        16-byte copies of 8 filters of a pixel's tap; weights have depth outside, 8 input channels a chunk
//   NCHW, 1x1   16-byte copies of 8 neighbouring pixels, and of weights as in NHWC
//   NCHW        pixels and weights gathered number by number
#include "conv2d/cuda_implicit_gemm_mma_modes.cuh"
#include "conv2d/cuda_implicit_gemm_mma_shares.cuh"
#include "cuda_support/launchers.h"

namespace fastconv::cuda {
namespace {

void launch_product(const ConvProblem& p, const MmaProduct& product, const MmaTensors& tensors, cudaStream_t stream) {
  const bool channels = all_vectors(p, p.c_per_group(), tensors.weight);
  if (p.layout == Layout::nhwc) {
    if (channels && all_vectors(p, p.k_per_group(), tensors.read))
      launch_mma<NhwcInputGrad<true>>(p, product, tensors, stream);
    else launch_mma<NhwcInputGrad<false>>(p, product, tensors, stream);
  } else if (channels && is_pointwise(p) && all_vectors(p, p.h * p.w, tensors.read)) {
    launch_mma<NchwPointwiseInputGrad>(p, product, tensors, stream);
  } else {
    launch_mma<NchwInputGrad>(p, product, tensors, stream);
  }
}

}  // namespace

/// `workspace` holds implicit_gemm_mma_input_grad_workspace(p) float32 numbers.
void launch_implicit_gemm_mma_input_grad(const ConvProblem& p, const void* grad_y, const void* weight, void* grad_x,
                                         float* workspace, cudaStream_t stream) {
  require_mma_serves(p, refuse_implicit_gemm_mma_cuda(p, ConvPass::input_grad));
  MmaProduct product(p, true);
  product.shares = static_cast<int>(mma_shares(p, product));
  // In NCHW pixels of a phase are a stride apart, but where there is one phase.
  product.stores_vectors = p.layout == Layout::nhwc ? all_vectors(p, p.c_per_group(), grad_x)
                                                    : product.phases() == 1 && all_vectors(p, p.h * p.w, grad_x);
  const MmaTensors tensors{grad_y, weight, grad_x, {}, workspace};
  launch_product(p, product, tensors, stream);
  if (product.shares > 1) launch_add_mma_shares(p, product, tensors, stream);
}

int64_t implicit_gemm_mma_input_grad_workspace(const ConvProblem& p) { return mma_workspace(p, true); }

FASTCONV_LAUNCHER("conv2d_input_grad", "implicit_gemm_mma", launch_implicit_gemm_mma_input_grad);
FASTCONV_LAUNCHER("conv2d_input_grad_workspace", "implicit_gemm_mma", implicit_gemm_mma_input_grad_workspace);

}  // namespace fastconv::cuda
