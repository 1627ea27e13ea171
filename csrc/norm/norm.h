// What the normalisation kernels of one instruction set offer. No torch here.
#pragma once

#include "common/problem.h"

namespace fastconv {

/// Local response normalisation of (n, c, plane): y = x * d^-beta with d = k + scale * (sum of x^2 over the window).
/// The window of channel i is [i - before, i + after], clipped to the channels there are.
struct NormProblem {
  int64_t n, c, plane;
  int64_t size;           // channels in the window
  double scale, beta, k;  // scale = alpha / size
  Layout layout = Layout::nchw;
  DType dtype = DType::f32;

  // As torch pads: an even window reaches one channel further back than ahead.
  FASTCONV_INLINE constexpr int64_t before() const { return size / 2; }
  FASTCONV_INLINE constexpr int64_t after() const { return (size - 1) / 2; }
};

/// Tensors are dense in the problem's layout; sums are kept in acc_t of the dtype. Every element of a result is
/// written.
struct NormKernels {
  void (*forward)(const NormProblem&, const void* x, void* y);
  /// The derivative of y along `tangent`.
  void (*jvp)(const NormProblem&, const void* x, const void* tangent, void* y_tangent);
  void (*backward)(const NormProblem&, const void* grad, const void* x, void* grad_input);
};

const NormKernels* norm_kernels_generic();
const NormKernels* norm_kernels_neon();
const NormKernels* norm_kernels_avx2();
const NormKernels* norm_kernels_avx512();

}  // namespace fastconv
