// Every kernel of the package, once: its name is what stats(), explain() and algo= speak of.
#pragma once

#include <cstdint>

namespace fastconv {

// X(identifier, op, algo)
#define FASTCONV_CPU_KERNELS(X)                                           \
  X(conv2d_naive, "conv2d", "naive")                                      \
  X(conv2d_tiled, "conv2d", "tiled")                                      \
  X(conv2d_rows, "conv2d", "rows")                                        \
  X(conv2d_input_grad_naive, "conv2d_input_grad", "naive")                \
  X(conv2d_input_grad_tiled, "conv2d_input_grad", "tiled")                \
  X(conv2d_input_grad_rows, "conv2d_input_grad", "rows")                  \
  X(conv2d_weight_grad_naive, "conv2d_weight_grad", "naive")              \
  X(conv2d_weight_grad_tiled, "conv2d_weight_grad", "tiled")              \
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

enum class Kernel : int32_t {
#define X(identifier, op, algo) identifier,
  FASTCONV_CPU_KERNELS(X)
#undef X
      count_
};

inline constexpr int32_t kKernelCount = static_cast<int32_t>(Kernel::count_);

struct KernelName {
  const char* op;
  const char* algo;
};

inline constexpr KernelName kKernelNames[] = {
#define X(identifier, op, algo) {op, algo},
    FASTCONV_CPU_KERNELS(X)
#undef X
};

/// Adds one to the kernel's call counter (thread-safe). Host functions call it next to the launch, nowhere else.
void count_call(Kernel kernel);

}  // namespace fastconv
