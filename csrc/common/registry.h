// Every kernel of the package, once, by the device it runs on: its name is what stats(), explain() and algo= speak of.
#pragma once

#include <cstdint>

namespace fastconv {

// X(identifier, op, algo)
#define FASTCONV_CPU_KERNELS(X)                                           \
  X(conv2d_naive, "conv2d", "naive")                                      \
  X(conv2d_tiled, "conv2d", "tiled")                                      \
  X(conv2d_rows, "conv2d", "rows")                                        \
  X(conv2d_winograd, "conv2d", "winograd")                                \
  X(conv2d_pairs, "conv2d", "pairs")                                      \
  X(conv2d_input_grad_naive, "conv2d_input_grad", "naive")                \
  X(conv2d_input_grad_tiled, "conv2d_input_grad", "tiled")                \
  X(conv2d_input_grad_rows, "conv2d_input_grad", "rows")                  \
  X(conv2d_input_grad_winograd, "conv2d_input_grad", "winograd")          \
  X(conv2d_input_grad_pairs, "conv2d_input_grad", "pairs")                \
  X(conv2d_weight_grad_naive, "conv2d_weight_grad", "naive")              \
  X(conv2d_weight_grad_tiled, "conv2d_weight_grad", "tiled")              \
  X(conv2d_weight_grad_pairs, "conv2d_weight_grad", "pairs")              \
  X(conv2d_bias_grad, "conv2d_bias_grad", "rows")                         \
  X(depthwise, "conv2d", "depthwise")                                     \
  X(depthwise_input_grad, "conv2d_input_grad", "depthwise")               \
  X(depthwise_weight_grad, "conv2d_weight_grad", "depthwise")             \
  X(max_pool2d, "max_pool2d", "rows")                                     \
  X(max_pool2d_with_offsets, "max_pool2d_with_offsets", "rows")           \
  X(max_pool2d_indices, "max_pool2d_indices", "rows")                     \
  X(max_pool2d_gather, "max_pool2d_gather", "rows")                       \
  X(max_pool2d_backward, "max_pool2d_backward", "rows")                   \
  X(avg_pool2d, "avg_pool2d", "rows")                                     \
  X(avg_pool2d_backward, "avg_pool2d_backward", "rows")                   \
  X(adaptive_avg_pool2d, "adaptive_avg_pool2d", "rows")                   \
  X(adaptive_avg_pool2d_backward, "adaptive_avg_pool2d_backward", "rows") \
  X(global_avg_pool2d, "adaptive_avg_pool2d", "global")                   \
  X(global_avg_pool2d_backward, "adaptive_avg_pool2d_backward", "global") \
  X(local_response_norm, "local_response_norm", "rows")                   \
  X(local_response_norm_jvp, "local_response_norm_jvp", "rows")           \
  X(local_response_norm_backward, "local_response_norm_backward", "rows")

#define FASTCONV_CUDA_KERNELS(X)                                                    \
  X(conv2d_direct, "conv2d", "direct")                                              \
  X(conv2d_input_grad_direct, "conv2d_input_grad", "direct")                        \
  X(conv2d_weight_grad_direct, "conv2d_weight_grad", "direct")                      \
  X(conv2d_bias_grad, "conv2d_bias_grad", "rows")                                   \
  X(stem, "conv2d", "stem")                                                         \
  X(stem_mma, "conv2d", "stem_mma")                                                 \
  X(stem_input_grad, "conv2d_input_grad", "stem")                                   \
  X(stem_weight_grad, "conv2d_weight_grad", "stem")                                 \
  X(implicit_gemm_mma, "conv2d", "implicit_gemm_mma")                               \
  X(implicit_gemm_mma_input_grad, "conv2d_input_grad", "implicit_gemm_mma")         \
  X(implicit_gemm_mma_weight_grad, "conv2d_weight_grad", "implicit_gemm_mma")       \
  X(implicit_gemm_tf32, "conv2d", "implicit_gemm_tf32")                             \
  X(implicit_gemm_tf32_input_grad, "conv2d_input_grad", "implicit_gemm_tf32")       \
  X(implicit_gemm_tf32_weight_grad, "conv2d_weight_grad", "implicit_gemm_tf32")     \
  X(implicit_gemm_3xtf32, "conv2d", "implicit_gemm_3xtf32")                         \
  X(implicit_gemm_3xtf32_input_grad, "conv2d_input_grad", "implicit_gemm_3xtf32")   \
  X(implicit_gemm_3xtf32_weight_grad, "conv2d_weight_grad", "implicit_gemm_3xtf32") \
  X(implicit_gemm_fp32, "conv2d", "implicit_gemm_fp32")                             \
  X(implicit_gemm_fp32_input_grad, "conv2d_input_grad", "implicit_gemm_fp32")       \
  X(implicit_gemm_fp32_weight_grad, "conv2d_weight_grad", "implicit_gemm_fp32")     \
  X(depthwise, "conv2d", "depthwise")                                               \
  X(depthwise_input_grad, "conv2d_input_grad", "depthwise")                         \
  X(depthwise_weight_grad, "conv2d_weight_grad", "depthwise")                       \
  X(max_pool2d, "max_pool2d", "windows")                                            \
  X(max_pool2d_with_offsets, "max_pool2d_with_offsets", "windows")                  \
  X(max_pool2d_indices, "max_pool2d_indices", "windows")                            \
  X(max_pool2d_gather, "max_pool2d_gather", "windows")                              \
  X(max_pool2d_backward, "max_pool2d_backward", "windows")                          \
  X(avg_pool2d, "avg_pool2d", "windows")                                            \
  X(avg_pool2d_backward, "avg_pool2d_backward", "windows")                          \
  X(adaptive_avg_pool2d, "adaptive_avg_pool2d", "windows")                          \
  X(adaptive_avg_pool2d_backward, "adaptive_avg_pool2d_backward", "windows")        \
  X(global_avg_pool2d, "adaptive_avg_pool2d", "global")                             \
  X(global_avg_pool2d_backward, "adaptive_avg_pool2d_backward", "global")           \
  X(local_response_norm, "local_response_norm", "channels")                         \
  X(local_response_norm_jvp, "local_response_norm_jvp", "channels")                 \
  X(local_response_norm_backward, "local_response_norm_backward", "channels")

struct KernelName {
  const char* op;
  const char* algo;
};

#define FASTCONV_IDENTIFIER(identifier, op, algo) identifier,
#define FASTCONV_NAME(identifier, op, algo) {op, algo},

enum class Kernel : int32_t { FASTCONV_CPU_KERNELS(FASTCONV_IDENTIFIER) count_ };
enum class CudaKernel : int32_t { FASTCONV_CUDA_KERNELS(FASTCONV_IDENTIFIER) count_ };

inline constexpr KernelName kKernelNames[] = {FASTCONV_CPU_KERNELS(FASTCONV_NAME)};
inline constexpr KernelName kCudaKernelNames[] = {FASTCONV_CUDA_KERNELS(FASTCONV_NAME)};

#undef FASTCONV_IDENTIFIER
#undef FASTCONV_NAME

/// Adds one to the kernel's call counter (thread-safe). Host functions call it next to the launch, nowhere else.
void count_call(Kernel kernel);
void count_call(CudaKernel kernel);  // in _C_cuda and in the library of emulated kernels

}  // namespace fastconv
