// The kernels of this family for one instruction set. Include after a common/simd/target_*.h.
#pragma once

#include "norm/cpu_response.h"

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

inline constexpr NormKernels kNormKernels = {
    .forward =
        [](const NormProblem& p, const void* x, void* y) {
          for_dtype(p.dtype, [&](auto type) {
            using T = decltype(type);
            response_forward<T>(p, static_cast<const T*>(x), static_cast<T*>(y));
          });
        },
    .jvp =
        [](const NormProblem& p, const void* x, const void* tangent, void* y_tangent) {
          for_dtype(p.dtype, [&](auto type) {
            using T = decltype(type);
            response_jvp<T>(p, static_cast<const T*>(x), static_cast<const T*>(tangent), static_cast<T*>(y_tangent));
          });
        },
    .backward =
        [](const NormProblem& p, const void* grad, const void* x, void* grad_input) {
          for_dtype(p.dtype, [&](auto type) {
            using T = decltype(type);
            response_backward<T>(p, static_cast<const T*>(grad), static_cast<const T*>(x), static_cast<T*>(grad_input));
          });
        },
};

}  // namespace
}  // namespace fastconv
