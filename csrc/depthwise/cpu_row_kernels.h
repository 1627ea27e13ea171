// Kernels on staged rows (NCHW): output columns in lanes, a few output rows at a time, so that a loaded input vector
// serves every window it belongs to. A 3x3 window over 4 rows of output costs 18 loads for 36 fused multiply-adds, and
// its 9 weights, 4 sums and the input vector are 14 of AVX2's 16 registers.
#pragma once

#include "depthwise/cpu_stage.h"

namespace fastconv {
namespace {

/// What a kernel reads: tap (r, s) of output (row, column) is at
/// rows[plane * plane_pitch + (row * step + r * row_spacing) * pitch + column_offsets[s] + column].
template <class Acc>
struct StagedWindow {
  const Acc* rows;
  int64_t pitch, plane_pitch, planes;
  int64_t step, row_spacing, tap_rows, tap_columns;
  const int64_t* column_offsets;
  const Acc* weights;  // (planes, tap_rows, tap_columns)
};

/// Where the results go, and what is done to them on the way.
template <class T>
struct RowOutput {
  T* y;
  int64_t pitch;
  const T* limit;     // vector stores may spill over the end of a row, but not beyond here
  const T* residual;  // laid out as y
  const acc_t<T>* scale;
  const acc_t<T>* shift;
  Activation activation;

  FASTCONV_INLINE bool plain() const {
    return residual == nullptr && scale == nullptr && shift == nullptr && activation == Activation::none;
  }
};

/// Rows must be put in ascending order: a spilled vector is repaired by the row after it.
template <class T, bool kPlain>
FASTCONV_INLINE void put(const RowOutput<T>& out, int64_t offset, simd::Vec<acc_t<T>> value, int64_t live) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  if constexpr (!kPlain) {
    if (out.scale) value = value * simd::broadcast(*out.scale);
    if (out.shift) value = value + simd::broadcast(*out.shift);
    if (out.residual)
      value += live == kLane ? simd::load(out.residual + offset) : simd::load_first(out.residual + offset, live);
    value = simd::activate<Acc>(value, out.activation);
  }
  if (live == kLane || out.y + offset + kLane <= out.limit) simd::store<T>(out.y + offset, value);
  else simd::store_first<T>(out.y + offset, value, live);
}

template <class T>
using RowKernel = void (*)(const StagedWindow<acc_t<T>>&, const RowOutput<T>&, int64_t rows, int64_t columns);

/// Calls body(column) for vectors that cover `columns`; the last one reaches back over its neighbour.
template <int64_t kLane, class Body>
FASTCONV_INLINE void for_column_vectors(int64_t columns, const Body& body) {
  for (int64_t column = 0;;) {
    body(column);
    if (column + kLane >= columns) return;
    column = min_of(column + kLane, columns - kLane);
  }
}

/// A dense window of one plane, kRows output rows from `row` on.
template <class T, int kTapRows, int kTapColumns, int kStep, int kRows, bool kPlain>
FASTCONV_INLINE void window_block(const StagedWindow<acc_t<T>>& window,
                                  const simd::Vec<acc_t<T>> (&weights)[kTapRows][kTapColumns], const RowOutput<T>& out,
                                  int64_t row, int64_t columns) {
  using Acc = acc_t<T>;
  using V = simd::Vec<Acc>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  const int64_t live = min_of(columns, kLane), pitch = window.pitch;
  const Acc* sources[kTapColumns];
  for (int s = 0; s < kTapColumns; ++s) sources[s] = window.rows + row * kStep * pitch + window.column_offsets[s];
  for_column_vectors<kLane>(columns, [&](int64_t column) {
    V sums[kRows] = {};
#pragma GCC unroll 16
    for (int input_row = 0; input_row < (kRows - 1) * kStep + kTapRows; ++input_row)
#pragma GCC unroll 8
      for (int s = 0; s < kTapColumns; ++s) {
        const V value = simd::load(sources[s] + input_row * pitch + column);
#pragma GCC unroll 4
        for (int output_row = 0; output_row < kRows; ++output_row) {
          const int r = input_row - output_row * kStep;
          if (r >= 0 && r < kTapRows) sums[output_row] = simd::fma<Acc>(value, weights[r][s], sums[output_row]);
        }
      }
#pragma GCC unroll 4
    for (int output_row = 0; output_row < kRows; ++output_row)
      put<T, kPlain>(out, (row + output_row) * out.pitch + column, sums[output_row], live);
  });
}

template <class T, int kTapRows, int kTapColumns, int kStep, bool kPlain>
void window_rows(const StagedWindow<acc_t<T>>& window, const RowOutput<T>& output, int64_t rows, int64_t columns) {
  const RowOutput<T> out = output;  // or gcc reloads it after every store through out.y
  using Acc = acc_t<T>;
  simd::Vec<Acc> weights[kTapRows][kTapColumns];
#pragma GCC unroll 8
  for (int r = 0; r < kTapRows; ++r)
#pragma GCC unroll 8
    for (int s = 0; s < kTapColumns; ++s) weights[r][s] = simd::broadcast(window.weights[r * kTapColumns + s]);
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4)
    window_block<T, kTapRows, kTapColumns, kStep, 4, kPlain>(window, weights, out, row, columns);
  if (rows - row == 3) window_block<T, kTapRows, kTapColumns, kStep, 3, kPlain>(window, weights, out, row, columns);
  if (rows - row == 2) window_block<T, kTapRows, kTapColumns, kStep, 2, kPlain>(window, weights, out, row, columns);
  if (rows - row == 1) window_block<T, kTapRows, kTapColumns, kStep, 1, kPlain>(window, weights, out, row, columns);
}

/// Any window over any number of planes: one row, kVectors vectors of columns at a time.
template <class T, int kVectors, bool kPlain>
FASTCONV_INLINE void any_window_block(const StagedWindow<acc_t<T>>& window, const RowOutput<T>& out, int64_t row,
                                      int64_t column, int64_t live) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  simd::Vec<Acc> sums[kVectors] = {};
  const Acc* weight = window.weights;
  for (int64_t plane = 0; plane < window.planes; ++plane)
    for (int64_t r = 0; r < window.tap_rows; ++r) {
      const Acc* source = window.rows + plane * window.plane_pitch +
                          (row * window.step + r * window.row_spacing) * window.pitch + column;
      for (int64_t s = 0; s < window.tap_columns; ++s) {
        const auto factor = simd::broadcast(*weight++);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
          sums[v] = simd::fma<Acc>(simd::load(source + window.column_offsets[s] + v * kLane), factor, sums[v]);
      }
    }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) put<T, kPlain>(out, row * out.pitch + column + v * kLane, sums[v], live);
}

template <class T, bool kPlain>
void any_window_rows(const StagedWindow<acc_t<T>>& window, const RowOutput<T>& output, int64_t rows, int64_t columns) {
  const RowOutput<T> out = output;  // or gcc reloads it after every store through out.y
  constexpr int64_t kLane = simd::kLanes<acc_t<T>>;
  const int64_t live = min_of(columns, kLane);
  for (int64_t row = 0; row < rows; ++row) {
    int64_t column = 0;
    for (; column + 4 * kLane <= columns; column += 4 * kLane)
      any_window_block<T, 4, kPlain>(window, out, row, column, live);
    for (; column < columns; column += kLane)
      any_window_block<T, 1, kPlain>(window, out, row, max_of(min_of(column, columns - kLane), 0), live);
  }
}

template <class T, bool kPlain>
RowKernel<T> row_kernel(const StagedWindow<acc_t<T>>& window) {
  if (window.planes == 1 && window.row_spacing == 1) {
    const bool square_3 = window.tap_rows == 3 && window.tap_columns == 3;
    const bool square_5 = window.tap_rows == 5 && window.tap_columns == 5;
    if (square_3 && window.step == 1) return &window_rows<T, 3, 3, 1, kPlain>;
    if (square_3 && window.step == 2) return &window_rows<T, 3, 3, 2, kPlain>;
    // One build of these serves with and without an epilogue, none 16-bit tensors: they are slow to compile.
    if constexpr (sizeof(T) == sizeof(acc_t<T>)) {
      if (square_5 && window.step == 1) return &window_rows<T, 5, 5, 1, false>;
      if (square_5 && window.step == 2) return &window_rows<T, 5, 5, 2, false>;
    }
  }
  return &any_window_rows<T, kPlain>;
}

}  // namespace
}  // namespace fastconv
