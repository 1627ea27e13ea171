// The CUDA launchers of this folder: plain C++ functions without torch. Tensors are dense in the problem's layout;
// every element of a result is written; nothing is allocated and nothing waits.
#pragma once

#include "conv2d/cuda_epilogue.h"

namespace fastconv::cuda {

/// y = epilogue(x * weight)
void launch_direct_forward(const ConvProblem& p, const void* x, const void* weight, void* y,
                           const CudaEpilogue& epilogue, cudaStream_t stream);
void launch_direct_input_grad(const ConvProblem& p, const void* grad_y, const void* weight, void* grad_x,
                              cudaStream_t stream);
void launch_direct_weight_grad(const ConvProblem& p, const void* grad_y, const void* x, void* grad_weight,
                               cudaStream_t stream);

/// These throw where cuda_implicit_gemm_plan.h gives a reason. A workspace holds as many float32 numbers as the
/// function below says; with none it may be null.
void launch_implicit_gemm_fp32_forward(const ConvProblem& p, const void* x, const void* weight, void* y,
                                       const CudaEpilogue& epilogue, float* workspace, cudaStream_t stream);
void launch_implicit_gemm_fp32_input_grad(const ConvProblem& p, const void* grad_y, const void* weight, void* grad_x,
                                          float* workspace, cudaStream_t stream);
void launch_implicit_gemm_fp32_weight_grad(const ConvProblem& p, const void* grad_y, const void* x, void* grad_weight,
                                           float* workspace, cudaStream_t stream);
int64_t implicit_gemm_fp32_forward_workspace(const ConvProblem& p);
int64_t implicit_gemm_fp32_input_grad_workspace(const ConvProblem& p);
int64_t implicit_gemm_fp32_weight_grad_workspace(const ConvProblem& p);

/// These throw where cuda_stem_refuse.h gives a reason.
void launch_stem_forward(const ConvProblem& p, const void* x, const void* weight, void* y, const CudaEpilogue& epilogue,
                         cudaStream_t stream);
void launch_stem_mma_forward(const ConvProblem& p, const void* x, const void* weight, void* y,
                             const CudaEpilogue& epilogue, cudaStream_t stream);
void launch_stem_input_grad(const ConvProblem& p, const void* grad_y, const void* weight, void* grad_x,
                            cudaStream_t stream);
/// `workspace` holds stem_weight_grad_workspace(p) float32 numbers.
void launch_stem_weight_grad(const ConvProblem& p, const void* grad_y, const void* x, void* grad_weight,
                             float* workspace, cudaStream_t stream);
int64_t stem_weight_grad_workspace(const ConvProblem& p);

/// These throw where cuda_implicit_gemm_mma_select.h gives a reason.
/// `workspace` holds as many float32 numbers as the pass's own function says, which may be 0.
void launch_implicit_gemm_mma_forward(const ConvProblem& p, const void* x, const void* weight, void* y,
                                      const CudaEpilogue& epilogue, float* workspace, cudaStream_t stream);
int64_t implicit_gemm_mma_workspace(const ConvProblem& p);
void launch_implicit_gemm_mma_input_grad(const ConvProblem& p, const void* grad_y, const void* weight, void* grad_x,
                                         float* workspace, cudaStream_t stream);
int64_t implicit_gemm_mma_input_grad_workspace(const ConvProblem& p);
void launch_implicit_gemm_mma_weight_grad(const ConvProblem& p, const void* grad_y, const void* x, void* grad_weight,
                                          float* workspace, cudaStream_t stream);
int64_t implicit_gemm_mma_weight_grad_workspace(const ConvProblem& p);
void launch_implicit_gemm_tf32_forward(const ConvProblem& p, const void* x, const void* weight, void* y,
                                       const CudaEpilogue& epilogue, cudaStream_t stream);
void launch_implicit_gemm_tf32_input_grad(const ConvProblem& p, const void* grad_y, const void* weight, void* grad_x,
                                          cudaStream_t stream);
void launch_implicit_gemm_3xtf32_forward(const ConvProblem& p, const void* x, const void* weight, void* y,
                                         const CudaEpilogue& epilogue, cudaStream_t stream);
void launch_implicit_gemm_3xtf32_input_grad(const ConvProblem& p, const void* grad_y, const void* weight, void* grad_x,
                                            cudaStream_t stream);
void launch_implicit_gemm_tf32_weight_grad(const ConvProblem& p, const void* grad_y, const void* x, void* grad_weight,
                                           float* workspace, cudaStream_t stream);
void launch_implicit_gemm_3xtf32_weight_grad(const ConvProblem& p, const void* grad_y, const void* x, void* grad_weight,
                                             float* workspace, cudaStream_t stream);
int64_t implicit_gemm_tf32_weight_grad_workspace(const ConvProblem& p);  // of both

/// grad is (n, k, plane pixels); none of the three is 0. `workspace` holds bias_grad_workspace() float32 numbers.
void launch_bias_grad(const void* grad, void* grad_bias, float* workspace, int64_t n, int64_t k, int64_t plane,
                      Layout layout, DType dtype, cudaStream_t stream);
int64_t bias_grad_workspace(int64_t n, int64_t k, int64_t plane, Layout layout);

}  // namespace fastconv::cuda
