// Which CUDA kernel serves a convolution, and why the others do not. Needs neither CUDA nor torch.
#pragma once

#include "common/registry.h"
#include "conv2d/candidates.h"
#include "conv2d/cuda_implicit_gemm_mma_select.h"
#include "conv2d/cuda_implicit_gemm_plan.h"
#include "conv2d/cuda_stem_refuse.h"
#include "depthwise/cuda_refuse.h"

namespace fastconv {

inline const char* refuse_direct_cuda(const ConvProblem& p, ConvPass) {
  return p.dtype == DType::f64 ? "it computes in float32 and would round float64; convert the tensors" : nullptr;
}

inline const char* refuse_stem_mma_cuda(const ConvProblem& p, ConvPass) { return refuse_stem_mma_cuda(p); }

inline const char* avoid_stem_mma_cuda(const ConvProblem&, ConvPass pass) {
  return pass == ConvPass::forward ? nullptr : "its gradients are those of stem";
}

inline constexpr ConvCandidate<CudaKernel> kCudaConvCandidates[] = {
    {"stem_mma", CudaKernel::stem_mma, CudaKernel::stem_input_grad, CudaKernel::stem_weight_grad, &refuse_stem_mma_cuda,
     &avoid_stem_mma_cuda},
    {"stem", CudaKernel::stem, CudaKernel::stem_input_grad, CudaKernel::stem_weight_grad,
     [](const ConvProblem& p, ConvPass) { return refuse_stem_cuda(p); }, &refuse_nothing},
    {"depthwise", CudaKernel::depthwise, CudaKernel::depthwise_input_grad, CudaKernel::depthwise_weight_grad,
     [](const ConvProblem& p, ConvPass) { return refuse_depthwise_cuda(p); }, &refuse_nothing},
    {"implicit_gemm_mma", CudaKernel::implicit_gemm_mma, CudaKernel::implicit_gemm_mma_input_grad,
     CudaKernel::implicit_gemm_mma_weight_grad, &refuse_implicit_gemm_mma_cuda, &avoid_implicit_gemm_mma_cuda},
    {"implicit_gemm_tf32", CudaKernel::implicit_gemm_tf32, CudaKernel::implicit_gemm_tf32_input_grad,
     CudaKernel::implicit_gemm_tf32_weight_grad, &refuse_implicit_gemm_tf32_cuda, &avoid_implicit_gemm_tf32_cuda},
    {"implicit_gemm_3xtf32", CudaKernel::implicit_gemm_3xtf32, CudaKernel::implicit_gemm_3xtf32_input_grad,
     CudaKernel::implicit_gemm_3xtf32_weight_grad, &refuse_implicit_gemm_tf32_cuda, &avoid_implicit_gemm_3xtf32_cuda},
    {"implicit_gemm_fp32", CudaKernel::implicit_gemm_fp32, CudaKernel::implicit_gemm_fp32_input_grad,
     CudaKernel::implicit_gemm_fp32_weight_grad, &refuse_implicit_gemm_fp32, &avoid_implicit_gemm_fp32},
    {"direct", CudaKernel::conv2d_direct, CudaKernel::conv2d_input_grad_direct, CudaKernel::conv2d_weight_grad_direct,
     &refuse_direct_cuda, &refuse_nothing},
};

inline CudaKernel select_cuda_conv2d(const ConvProblem& problem, ConvPass pass, std::string_view algo) {
  return select_conv2d(kCudaConvCandidates, problem, pass, algo);
}

}  // namespace fastconv
