// The input gradient of a 3x3 or 5x5 window with stride 2, for NCHW. Even and odd rows and columns of the gradient are
// four sums with few taps each (1, 2, 2 and 4 of the 9 for 3x3); the sums of even and odd columns are interleaved in
// registers, so that rows are written once, in order, a vector at a time.
#pragma once

#include "depthwise/cpu_row_kernels.h"

namespace fastconv {
namespace {

/// Tap (r, s) of phase (a, b) at grid position (row, column) is at
/// rows[(row + first_row[a] + r) * pitch + column_offsets[b][s] + column].
template <class Acc>
struct WovenWindow {
  const Acc* rows;
  int64_t pitch;
  int64_t first_row[2];
  const int64_t* column_offsets[2];
  const Acc* weights[2][2];
};

/// `y_rows` rows of the gradient, `width` columns.
template <class T>
using WeaveKernel = void (*)(const WovenWindow<acc_t<T>>&, const RowOutput<T>&, int64_t y_rows, int64_t width);

template <class Acc, int kTapRows, int kTapColumns>
FASTCONV_INLINE simd::Vec<Acc> phase_sum(const Acc* const (&sources)[kTapColumns], int64_t offset, int64_t pitch,
                                         const simd::Vec<Acc> (&weights)[kTapRows][kTapColumns]) {
  simd::Vec<Acc> sum{};
#pragma GCC unroll 4
  for (int r = 0; r < kTapRows; ++r)
#pragma GCC unroll 4
    for (int s = 0; s < kTapColumns; ++s)
      sum = simd::fma<Acc>(simd::load(sources[s] + r * pitch + offset), weights[r][s], sum);
  return sum;
}

template <class Acc, int kTapRows, int kTapColumns>
FASTCONV_INLINE void broadcast_weights(const Acc* weights, simd::Vec<Acc> (&result)[kTapRows][kTapColumns]) {
#pragma GCC unroll 4
  for (int r = 0; r < kTapRows; ++r)
#pragma GCC unroll 4
    for (int s = 0; s < kTapColumns; ++s) result[r][s] = simd::broadcast(weights[r * kTapColumns + s]);
}

/// Rows a, a + 2, ... are written by the caller's loop over rows: this is one row of phase a.
template <class T, int kTapRows, int kEvenTaps, int kOddTaps>
FASTCONV_INLINE void weave_row_of_phase(const WovenWindow<acc_t<T>>& window, int a, int64_t grid_row,
                                        const RowOutput<T>& out, T* y, int64_t width) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  simd::Vec<Acc> even_weights[kTapRows][kEvenTaps], odd_weights[kTapRows][kOddTaps];
  broadcast_weights(window.weights[a][0], even_weights);
  broadcast_weights(window.weights[a][1], odd_weights);
  const Acc* row = window.rows + (grid_row + window.first_row[a]) * window.pitch;
  const Acc *even_sources[kEvenTaps], *odd_sources[kOddTaps];
  for (int s = 0; s < kEvenTaps; ++s) even_sources[s] = row + window.column_offsets[0][s];
  for (int s = 0; s < kOddTaps; ++s) odd_sources[s] = row + window.column_offsets[1][s];
  for (int64_t column = 0; 2 * column < width; column += kLane) {
    const auto even = phase_sum<Acc, kTapRows, kEvenTaps>(even_sources, column, window.pitch, even_weights);
    const auto odd = phase_sum<Acc, kTapRows, kOddTaps>(odd_sources, column, window.pitch, odd_weights);
    const auto low = interleave_low<Acc>(even, odd), high = interleave_high<Acc>(even, odd);
    T* target = y + 2 * column;
    const int64_t live = width - 2 * column;
    // What spills over the end of the row is repaired by the row after it.
    if (live >= 2 * kLane || target + 2 * kLane <= out.limit) {
      simd::store<T>(target, low);
      simd::store<T>(target + kLane, high);
    } else if (live >= kLane) {
      simd::store<T>(target, low);
      simd::store_first<T>(target + kLane, high, live - kLane);
    } else {
      simd::store_first<T>(target, low, live);
    }
  }
}

template <class T, int kEvenRows, int kOddRows, int kEvenColumns, int kOddColumns>
void weave_rows(const WovenWindow<acc_t<T>>& window, const RowOutput<T>& output, int64_t y_rows, int64_t width) {
  const RowOutput<T> out = output;
  for (int64_t row = 0; row < y_rows; row += 2) {
    weave_row_of_phase<T, kEvenRows, kEvenColumns, kOddColumns>(window, 0, row / 2, out, out.y + row * width, width);
    if (row + 1 < y_rows)
      weave_row_of_phase<T, kOddRows, kEvenColumns, kOddColumns>(window, 1, row / 2, out, out.y + (row + 1) * width,
                                                                 width);
  }
}

/// For kSmall and kSmall + 1 taps per phase, in either order; null for anything else.
template <class T, int kSmall>
WeaveKernel<T> weave_kernel_of(const AxisTaps* rows, const AxisTaps* columns) {
  constexpr int kLarge = kSmall + 1;
  const AxisTaps* const axes[] = {rows, columns};
  for (const AxisTaps* axis : axes) {
    const int64_t small = min_of(axis[0].count, axis[1].count), large = max_of(axis[0].count, axis[1].count);
    if (small != kSmall || large != kLarge) return nullptr;
  }
  if (rows[0].count == kSmall && columns[0].count == kSmall) return &weave_rows<T, kSmall, kLarge, kSmall, kLarge>;
  if (rows[0].count == kSmall) return &weave_rows<T, kSmall, kLarge, kLarge, kSmall>;
  if (columns[0].count == kSmall) return &weave_rows<T, kLarge, kSmall, kSmall, kLarge>;
  return &weave_rows<T, kLarge, kSmall, kLarge, kSmall>;
}

/// Null unless the pass is such a gradient.
template <class T>
WeaveKernel<T> weave_kernel(const DepthwisePass& pass) {
  if (!pass.gradient || pass.phases.h != 2 || pass.phases.w != 2 || pass.x_planes != 1) return nullptr;
  for (int phase = 0; phase < 2; ++phase)
    if (pass.row_taps[phase].spacing != 1 || pass.column_taps[phase].spacing != 1) return nullptr;
  if (pass.kernel.h == 3 && pass.kernel.w == 3) return weave_kernel_of<T, 1>(pass.row_taps, pass.column_taps);
  if (pass.kernel.h == 5 && pass.kernel.w == 5) return weave_kernel_of<T, 2>(pass.row_taps, pass.column_taps);
  return nullptr;
}

}  // namespace
}  // namespace fastconv
