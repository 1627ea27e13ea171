// The kernels of this family for one instruction set. Include after a common/simd/target_*.h.
#pragma once

#include "depthwise/cpu_channel_lanes.h"
#include "depthwise/cpu_channel_weight_grad.h"
#include "depthwise/cpu_row_lanes.h"
#include "depthwise/cpu_weight_grad.h"

namespace fastconv {
namespace {

/// Calls body(T{}) with the storage type; twin of checks.h's dispatch for units without torch.
template <class Body>
FASTCONV_INLINE void for_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32:
      return body(float{});
    case DType::f64:
      return body(double{});
    case DType::f16:
      return body(Half{});
    case DType::bf16:
      return body(BFloat16{});
  }
  __builtin_unreachable();
}

inline void run_pass(const ConvProblem& problem, bool gradient, const void* x, const void* weight, void* y,
                     const Epilogue& epilogue) {
  Scratch taps(taps_bytes(problem));
  const DepthwisePass pass = describe_pass(problem, gradient, x, weight, y, epilogue, taps.as<AxisTaps>());
  for_dtype(problem.dtype, [&](auto type) {
    if (problem.layout == Layout::nchw) convolve_row_lanes<decltype(type)>(pass);
    else convolve_channel_lanes<decltype(type)>(pass);
  });
}

inline constexpr DepthwiseKernels kDepthwiseKernels = {
    [](const ConvProblem& problem, const void* input, const void* weight, void* output, const Epilogue& epilogue) {
      run_pass(problem, false, input, weight, output, epilogue);
    },
    [](const ConvProblem& problem, const void* grad_output, const void* weight, void* grad_input) {
      run_pass(problem, true, grad_output, weight, grad_input, {});
    },
    [](const ConvProblem& problem, const void* grad_output, const void* input, void* grad_weight) {
      for_dtype(problem.dtype, [&](auto type) {
        using T = decltype(type);
        const auto grad = static_cast<const T*>(grad_output), x = static_cast<const T*>(input);
        if (problem.layout == Layout::nchw) weight_grad_row_lanes<T>(problem, grad, x, static_cast<T*>(grad_weight));
        else weight_grad_channel_lanes<T>(problem, grad, x, static_cast<T*>(grad_weight));
      });
    },
};

}  // namespace
}  // namespace fastconv
