// The kernels of this family for one instruction set. Include after a common/simd/target_*.h.
#pragma once

#include "pool/cpu_average.h"
#include "pool/cpu_global.h"
#include "pool/cpu_max.h"
#include "pool/cpu_max_backward.h"

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

/// Calls body(offsets) with the pointer in the type that the problem's offsets have.
template <class Body>
FASTCONV_INLINE void for_offsets(const PoolProblem& p, const void* offsets, const Body& body) {
  if (offsets_fit_byte(p)) body(static_cast<const uint8_t*>(offsets));
  else body(static_cast<const int32_t*>(offsets));
}

inline constexpr PoolKernels kPoolKernels = {
    .max_pool =
        [](const PoolProblem& p, const void* x, void* y, void* offsets) {
          for_dtype(p.dtype, [&](auto type) {
            using T = decltype(type);
            max_pool<T>(p, static_cast<const T*>(x), static_cast<T*>(y), offsets);
          });
        },
    .max_indices =
        [](const PoolProblem& p, const void* offsets, int64_t* indices) {
          for_offsets(p, offsets, [&](auto* typed) { max_indices(p, typed, indices); });
        },
    .max_gather =
        [](const PoolProblem& p, const void* x, const void* offsets, void* y) {
          for_dtype(p.dtype, [&](auto type) {
            using T = decltype(type);
            for_offsets(p, offsets,
                        [&](auto* typed) { max_gather<T>(p, static_cast<const T*>(x), typed, static_cast<T*>(y)); });
          });
        },
    .max_backward =
        [](const PoolProblem& p, const void* grad, const void* offsets, void* grad_input) {
          for_dtype(p.dtype, [&](auto type) {
            using T = decltype(type);
            for_offsets(p, offsets, [&](auto* typed) {
              max_backward<T>(p, static_cast<const T*>(grad), typed, static_cast<T*>(grad_input));
            });
          });
        },
    .average =
        [](const AverageProblem& p, const void* x, void* y) {
          for_dtype(p.dtype, [&](auto type) {
            using T = decltype(type);
            average<T>(p, static_cast<const T*>(x), static_cast<T*>(y));
          });
        },
    .average_backward =
        [](const AverageProblem& p, const void* grad, void* grad_input) {
          for_dtype(p.dtype, [&](auto type) {
            using T = decltype(type);
            average_backward<T>(p, static_cast<const T*>(grad), static_cast<T*>(grad_input));
          });
        },
    .global_average =
        [](int64_t n, int64_t c, int64_t plane, Layout layout, DType dtype, const void* x, void* y) {
          for_dtype(dtype, [&](auto type) {
            using T = decltype(type);
            global_average<T>(n, c, plane, layout, static_cast<const T*>(x), static_cast<T*>(y));
          });
        },
    .global_average_backward =
        [](int64_t n, int64_t c, int64_t plane, Layout layout, DType dtype, const void* grad, void* grad_input) {
          for_dtype(dtype, [&](auto type) {
            using T = decltype(type);
            global_average_backward<T>(n, c, plane, layout, static_cast<const T*>(grad), static_cast<T*>(grad_input));
          });
        },
};

}  // namespace
}  // namespace fastconv
