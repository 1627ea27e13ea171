// What the pooling kernels of one instruction set offer, and the description of an averaging grid. No torch here.
#pragma once

#include "common/problem.h"

namespace fastconv {

/// Offsets number the taps of a window row by row; one byte each where every number fits, else four.
FASTCONV_INLINE constexpr bool offsets_fit_byte(const PoolProblem& p) { return p.r * p.s <= 255; }

/// One axis of an averaging grid. Output position i averages input [begin[i], end[i]) and contributes count[i] to the
/// divisor; input position j is covered by the output positions [first[j], last[j]).
struct AverageAxis {
  int64_t size, positions;
  const int64_t *begin, *end, *count;  // `positions` each
  const int64_t *first, *last;         // `size` each
};

/// Average pooling of every kind: the axes say where the windows are. `grid` describes them as a regular grid where
/// they are one; adaptive windows are irregular.
struct AverageProblem {
  int64_t n, c;
  AverageAxis rows, columns;
  double divisor_override = 0;  // 0: the product of the two counts
  bool regular = false;
  PoolProblem grid{};
  Layout layout = Layout::nchw;
  DType dtype = DType::f32;
};

/// Tensors are dense in the problem's layout; sums are kept in acc_t of the dtype. Every element of a result is
/// written.
struct PoolKernels {
  /// `offsets` may be null: then only the maxima are written.
  void (*max_pool)(const PoolProblem&, const void* x, void* y, void* offsets);
  void (*max_indices)(const PoolProblem&, const void* offsets, int64_t* indices);
  void (*max_gather)(const PoolProblem&, const void* x, const void* offsets, void* y);
  void (*max_backward)(const PoolProblem&, const void* grad, const void* offsets, void* grad_input);
  void (*average)(const AverageProblem&, const void* x, void* y);
  void (*average_backward)(const AverageProblem&, const void* grad, void* grad_input);
  /// The mean of each plane of `plane` elements, for n images of c channels; and its adjoint.
  void (*global_average)(int64_t n, int64_t c, int64_t plane, Layout, DType, const void* x, void* y);
  void (*global_average_backward)(int64_t n, int64_t c, int64_t plane, Layout, DType, const void* grad,
                                  void* grad_input);
};

const PoolKernels* pool_kernels_generic();
const PoolKernels* pool_kernels_neon();
const PoolKernels* pool_kernels_avx2();
const PoolKernels* pool_kernels_avx512();

}  // namespace fastconv
