// A pass over x that writes y, as the kernels of both layouts see it: the forward pass, or the input gradient.
//
//   forward          y[n, k, i, j]              = epilogue(sum over r, s of w[k, r, s] * x[n, k / m, i * stride + r *
//   dilation - pad, ...]) input gradient   y[n, c, a + stride * i, b + stride * j] = sum over k of c's, and over the
//   taps (r, s) of phase (a, b), of
//                                                w[k, r, s] * x[n, k, i + (a + pad - r * dilation) / stride, ...]
//
// Only the taps for which that division is exact belong to phase (a, b). They are evenly spaced, so a window is a
// product of two arithmetic progressions, AxisTaps, and the gradient of stride 1 is a forward pass with flipped
// weights.
#pragma once

#include "common/parallel.h"
#include "common/simd/simd.h"
#include "depthwise/depthwise.h"

namespace fastconv {
namespace {

FASTCONV_INLINE bool inside(int64_t index, int64_t size) {
  return static_cast<uint64_t>(index) < static_cast<uint64_t>(size);
}

/// Taps of one axis: number t reads at offset + spacing * t from where the grid position puts the window, and has the
/// weight tap + tap_step * t.
struct AxisTaps {
  int64_t count, offset, spacing, tap, tap_step;

  FASTCONV_INLINE int64_t last_offset() const { return offset + spacing * (count - 1); }
};

FASTCONV_INLINE AxisTaps forward_axis(int64_t kernel, int64_t dilation, int64_t pad) {
  return {kernel, -pad, dilation, 0, 1};
}

FASTCONV_INLINE AxisTaps gradient_axis(int64_t kernel, int64_t dilation, int64_t pad, int64_t stride, int64_t phase) {
  int64_t step = 1;
  while (step * dilation % stride != 0) ++step;
  int64_t first = 0;
  while (first < min_of(kernel, step) && (phase + pad - first * dilation) % stride != 0) ++first;
  if (first >= min_of(kernel, step)) return {0, 0, 1, 0, 0};
  const int64_t count = (kernel - 1 - first) / step + 1, highest = first + step * (count - 1);
  return {count, (phase + pad - highest * dilation) / stride, step * dilation / stride, highest, -step};
}

/// Where a window may read relative to its position, over all phases of an axis.
struct AxisReach {
  int64_t first, last;
};

struct DepthwisePass {
  const ConvProblem& problem;
  bool gradient;
  const void* x;
  const void* weight;
  void* y;
  Epilogue epilogue;

  // Per input channel of the convolution: planes of x read, planes of y written. One of the two is 1.
  FASTCONV_INLINE int64_t x_planes() const { return gradient ? problem.k_per_group() : 1; }
  FASTCONV_INLINE int64_t y_planes() const { return gradient ? 1 : problem.k_per_group(); }
  FASTCONV_INLINE Size2 x_size() const {
    return gradient ? Size2{problem.p(), problem.q()} : Size2{problem.h, problem.w};
  }
  FASTCONV_INLINE Size2 y_size() const {
    return gradient ? Size2{problem.h, problem.w} : Size2{problem.p(), problem.q()};
  }
  /// Elements of x per grid position, and of y.
  FASTCONV_INLINE Size2 step() const { return gradient ? Size2{1, 1} : problem.stride; }
  FASTCONV_INLINE Size2 phases() const { return gradient ? problem.stride : Size2{1, 1}; }
  FASTCONV_INLINE AxisTaps row_taps(int64_t phase) const {
    const ConvProblem& p = problem;
    return gradient ? gradient_axis(p.r, p.dilation.h, p.padding.top, p.stride.h, phase)
                    : forward_axis(p.r, p.dilation.h, p.padding.top);
  }
  FASTCONV_INLINE AxisTaps column_taps(int64_t phase) const {
    const ConvProblem& p = problem;
    return gradient ? gradient_axis(p.s, p.dilation.w, p.padding.left, p.stride.w, phase)
                    : forward_axis(p.s, p.dilation.w, p.padding.left);
  }
  FASTCONV_INLINE AxisReach row_reach() const {
    return reach(phases().h, [&](int64_t phase) { return row_taps(phase); });
  }
  FASTCONV_INLINE AxisReach column_reach() const {
    return reach(phases().w, [&](int64_t phase) { return column_taps(phase); });
  }

 private:
  template <class Taps>
  FASTCONV_INLINE static AxisReach reach(int64_t phases, const Taps& taps) {
    AxisReach result{INT64_MAX, INT64_MIN};
    for (int64_t phase = 0; phase < phases; ++phase) {
      const AxisTaps axis = taps(phase);
      if (axis.count == 0) continue;
      result.first = min_of(result.first, axis.offset);
      result.last = max_of(result.last, axis.last_offset());
    }
    return result;
  }
};

}  // namespace
}  // namespace fastconv
