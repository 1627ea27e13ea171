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
  int64_t first = INT64_MAX, last = INT64_MIN;

  FASTCONV_INLINE void include(const AxisTaps& axis) {
    if (axis.count == 0) return;
    first = min_of(first, axis.offset);
    last = max_of(last, axis.last_offset());
  }
};

/// Everything that does not change within a pass, worked out once: the inner loops of small maps cannot pay for
/// divisions.
struct DepthwisePass {
  int64_t n, channels, filters;
  Size2 kernel;
  // Per input channel of the convolution: planes of x read, planes of y written. One of the two is 1.
  int64_t x_planes, y_planes;
  Size2 x_size, y_size;
  Size2 step, phases;  // elements of x, and of y, per grid position
  Size2 grid;          // positions of the largest phase
  const AxisTaps* row_taps;
  const AxisTaps* column_taps;
  AxisReach row_reach, column_reach;
  const void* x;
  const void* weight;
  void* y;
  Epilogue epilogue;
  bool gradient;
};

/// Room for the AxisTaps of all phases.
FASTCONV_INLINE int64_t taps_bytes(const ConvProblem& p) {
  return (p.stride.h + p.stride.w) * static_cast<int64_t>(sizeof(AxisTaps));
}

inline DepthwisePass describe_pass(const ConvProblem& p, bool gradient, const void* x, const void* weight, void* y,
                                   const Epilogue& epilogue, AxisTaps* taps) {
  const Size2 input{p.h, p.w}, output{p.p(), p.q()};
  DepthwisePass pass{};
  pass.n = p.n, pass.channels = p.c, pass.filters = p.k, pass.kernel = {p.r, p.s};
  pass.x_planes = gradient ? p.k_per_group() : 1, pass.y_planes = gradient ? 1 : p.k_per_group();
  pass.x_size = gradient ? output : input, pass.y_size = gradient ? input : output;
  pass.step = gradient ? Size2{1, 1} : p.stride, pass.phases = gradient ? p.stride : Size2{1, 1};
  pass.grid = {ceil_div(pass.y_size.h, pass.phases.h), ceil_div(pass.y_size.w, pass.phases.w)};
  for (int64_t a = 0; a < pass.phases.h; ++a) {
    taps[a] = gradient ? gradient_axis(p.r, p.dilation.h, p.padding.top, p.stride.h, a)
                       : forward_axis(p.r, p.dilation.h, p.padding.top);
    pass.row_reach.include(taps[a]);
  }
  AxisTaps* columns = taps + pass.phases.h;
  for (int64_t b = 0; b < pass.phases.w; ++b) {
    columns[b] = gradient ? gradient_axis(p.s, p.dilation.w, p.padding.left, p.stride.w, b)
                          : forward_axis(p.s, p.dilation.w, p.padding.left);
    pass.column_reach.include(columns[b]);
  }
  pass.row_taps = taps, pass.column_taps = columns;
  pass.x = x, pass.weight = weight, pass.y = y, pass.epilogue = epilogue, pass.gradient = gradient;
  return pass;
}

}  // namespace
}  // namespace fastconv
