// The pooling launchers: plain C++ functions without torch. Tensors are dense in the problem's layout; every element of
// a result is written; sums are kept in float32; nothing is allocated and nothing waits.
#pragma once

#include "cuda_support/cuda.h"
#include "pool/pool.h"

namespace fastconv::cuda {

/// `offsets` may be null: then only the maxima are written. Else one byte an output, or four: offsets_fit_byte().
void launch_max_pool2d(const PoolProblem& p, const void* x, void* y, void* offsets, cudaStream_t stream);
/// Which kernel max_pool2d (`wide` x, `narrow` y) or its gradient (`wide` grad_input, `narrow` grad) takes, and why:
/// text of at most `bytes`, its closing zero included.
void explain_max_pool2d(const PoolProblem& p, const void* wide, const void* narrow, const void* offsets, void* text,
                        int64_t bytes);
void launch_max_pool2d_indices(const PoolProblem& p, const void* offsets, void* indices, cudaStream_t stream);
void launch_max_pool2d_gather(const PoolProblem& p, const void* x, const void* offsets, void* y, cudaStream_t stream);
void launch_max_pool2d_backward(const PoolProblem& p, const void* grad, const void* offsets, void* grad_input,
                                cudaStream_t stream);

/// `divisor_override` 0: none. Windows have no dilation.
void launch_avg_pool2d(const PoolProblem& p, bool count_include_pad, double divisor_override, const void* x, void* y,
                       cudaStream_t stream);
void launch_avg_pool2d_backward(const PoolProblem& p, bool count_include_pad, double divisor_override, const void* grad,
                                void* grad_input, cudaStream_t stream);

/// As explain_max_pool2d; `wide` is x or grad_input, `narrow` y or grad.
void explain_avg_pool2d(const PoolProblem& p, double divisor_override, const void* wide, const void* narrow, void* text,
                        int64_t bytes);

/// Of the problem only n, c, h, w, layout and dtype count; the result has `rows` x `columns` outputs.
void launch_adaptive_avg_pool2d(const PoolProblem& p, int64_t rows, int64_t columns, const void* x, void* y,
                                cudaStream_t stream);
void launch_adaptive_avg_pool2d_backward(const PoolProblem& p, int64_t rows, int64_t columns, const void* grad,
                                         void* grad_input, cudaStream_t stream);

/// One output for a plane. Of the problem only n, c, h, w, layout and dtype count; a plane has at least one element.
void launch_global_avg_pool2d(const PoolProblem& p, const void* x, void* y, cudaStream_t stream);
void launch_global_avg_pool2d_backward(const PoolProblem& p, const void* grad, void* grad_input, cudaStream_t stream);

}  // namespace fastconv::cuda
