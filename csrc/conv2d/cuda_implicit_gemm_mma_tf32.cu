// float32 on tensor cores: implicit_gemm_tf32 rounds its operands to TF32 (10 bits of mantissa), implicit_gemm_3xtf32
// takes each as the sum of two such numbers (SplitTf32Math says what that leaves out). See cuda_implicit_gemm_mma.cuh.
//
// ldmatrix turns blocks of 16-bit numbers alone, so both operands have depth inside: pixels in NCHW, and the weights of
// an input gradient, are gathered.
#include "conv2d/cuda_implicit_gemm_mma_modes.cuh"
#include "cuda_support/launchers.h"

namespace fastconv::cuda {
namespace {

template <class Math>
void launch_forward(const ConvProblem& p, const void* x, const void* weight, void* y, const CudaEpilogue& epilogue,
                    cudaStream_t stream) {
  require_mma_serves(p, refuse_implicit_gemm_tf32_cuda(p, ConvPass::forward));
  MmaProduct product(p, false);
  const MmaTensors tensors{x, weight, y, epilogue};
  const bool nhwc = p.layout == Layout::nhwc;
  product.stores_vectors = all_vectors(p, nhwc ? p.k_per_group() : p.p() * p.q(), y, epilogue.residual);
  if (nhwc) {
    if (all_vectors(p, p.c_per_group(), x, weight))
      launch_mma_math<Math, NhwcForward<true>>(p, product, tensors, stream);
    else launch_mma_math<Math, NhwcForward<false>>(p, product, tensors, stream);
  } else if (all_vectors(p, p.c_per_group() * p.r * p.s, weight)) {
    launch_mma_math<Math, NchwForward<true>>(p, product, tensors, stream);
  } else {
    launch_mma_math<Math, NchwForward<false>>(p, product, tensors, stream);
  }
}

template <class Math>
void launch_input_grad(const ConvProblem& p, const void* grad_y, const void* weight, void* grad_x,
                       cudaStream_t stream) {
  require_mma_serves(p, refuse_implicit_gemm_tf32_cuda(p, ConvPass::input_grad));
  MmaProduct product(p, true);
  const MmaTensors tensors{grad_y, weight, grad_x, {}};
  if (p.layout == Layout::nhwc) {
    product.stores_vectors = all_vectors(p, p.c_per_group(), grad_x);
    if (all_vectors(p, p.k_per_group(), grad_y))
      launch_mma_math<Math, NhwcGatheredInputGrad<true>>(p, product, tensors, stream);
    else launch_mma_math<Math, NhwcGatheredInputGrad<false>>(p, product, tensors, stream);
  } else {
    product.stores_vectors = product.phases() == 1 && all_vectors(p, p.h * p.w, grad_x);
    launch_mma_math<Math, NchwInputGrad>(p, product, tensors, stream);
  }
}

}  // namespace

void launch_implicit_gemm_tf32_forward(const ConvProblem& p, const void* x, const void* weight, void* y,
                                       const CudaEpilogue& epilogue, cudaStream_t stream) {
  launch_forward<Tf32Math>(p, x, weight, y, epilogue, stream);
}
void launch_implicit_gemm_tf32_input_grad(const ConvProblem& p, const void* grad_y, const void* weight, void* grad_x,
                                          cudaStream_t stream) {
  launch_input_grad<Tf32Math>(p, grad_y, weight, grad_x, stream);
}
void launch_implicit_gemm_3xtf32_forward(const ConvProblem& p, const void* x, const void* weight, void* y,
                                         const CudaEpilogue& epilogue, cudaStream_t stream) {
  launch_forward<SplitTf32Math>(p, x, weight, y, epilogue, stream);
}
void launch_implicit_gemm_3xtf32_input_grad(const ConvProblem& p, const void* grad_y, const void* weight, void* grad_x,
                                            cudaStream_t stream) {
  launch_input_grad<SplitTf32Math>(p, grad_y, weight, grad_x, stream);
}

FASTCONV_LAUNCHER("conv2d", "implicit_gemm_tf32", launch_implicit_gemm_tf32_forward);
FASTCONV_LAUNCHER("conv2d_input_grad", "implicit_gemm_tf32", launch_implicit_gemm_tf32_input_grad);
FASTCONV_LAUNCHER("conv2d", "implicit_gemm_3xtf32", launch_implicit_gemm_3xtf32_forward);
FASTCONV_LAUNCHER("conv2d_input_grad", "implicit_gemm_3xtf32", launch_implicit_gemm_3xtf32_input_grad);

}  // namespace fastconv::cuda
