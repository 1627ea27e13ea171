// The launchers of local response normalisation: plain C++ functions without torch. Tensors are dense in the problem's
// layout; every element of a result is written; sums are kept in float32; nothing is allocated and nothing waits.
#pragma once

#include "cuda_support/cuda.h"
#include "norm/norm.h"

namespace fastconv::cuda {

void launch_local_response_norm(const NormProblem& p, const void* x, void* y, cudaStream_t stream);
void launch_local_response_norm_jvp(const NormProblem& p, const void* x, const void* tangent, void* y_tangent,
                                    cudaStream_t stream);
void launch_local_response_norm_backward(const NormProblem& p, const void* grad, const void* x, void* grad_input,
                                         cudaStream_t stream);

/// Which kernel the op takes with these operands (null: there is none), and why: text of at most `bytes`, its closing
/// zero included.
void explain_local_response_norm(const NormProblem& p, const void* x, const void* other, const void* result, void* text,
                                 int64_t bytes);

}  // namespace fastconv::cuda
