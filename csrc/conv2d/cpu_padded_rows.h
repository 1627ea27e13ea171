// Input rows copied with their padding and split by stride phase: of a stride-2 problem the even and the odd columns
// lie apart, and so do the even and the odd rows. Whatever the stride, neighbouring outputs then read neighbouring
// elements, and a tap is a fixed distance. Every input element is copied once, where im2col copies it R * S / stride^2
// times.
#pragma once

#include "conv2d/cpu_lanes.h"
#include "conv2d/cpu_naive.h"
#include "conv2d/gemm_conv.h"

namespace fastconv {
namespace {

/// Where the copied rows of one strip lie: [channel][row phase][column phase][row][pitch].
struct PaddedRows {
  int64_t first_row, first_column;  // the first that output (0, 0) reads: minus the padding
  int64_t last_row, last_column;    // the last that output (0, 0) reads
  int64_t pitch;                    // elements of a row of one phase
  int64_t row_span;                 // rows of a phase beyond those of the outputs
  int64_t strip_rows;               // output rows
  int64_t phases_h, phases_w;

  /// `Problem`: GemmConv or GemmWeightGrad. Rows are long enough for whole tiles of `tile_columns`.
  template <class Problem>
  PaddedRows(const Problem& p, int64_t tile_columns)
      : first_row(0), first_column(0), last_row(0), last_column(0), strip_rows(0) {
    for (int64_t t = 0; t < p.tap_count; ++t) {
      first_row = t == 0 ? p.taps[t].dh : min_of(first_row, p.taps[t].dh);
      first_column = t == 0 ? p.taps[t].dw : min_of(first_column, p.taps[t].dw);
      last_row = t == 0 ? p.taps[t].dh : max_of(last_row, p.taps[t].dh);
      last_column = t == 0 ? p.taps[t].dw : max_of(last_column, p.taps[t].dw);
    }
    phases_h = min_of(p.step.h, last_row - first_row + 1);
    phases_w = min_of(p.step.w, last_column - first_column + 1);
    row_span = (last_row - first_row) / p.step.h;
    pitch = round_up(p.j, tile_columns) + (last_column - first_column) / p.step.w;
  }
  int64_t phase_elems() const { return (strip_rows + row_span) * pitch; }
  int64_t channel_elems() const { return phases_h * phases_w * phase_elems(); }
  template <class Problem>
  int64_t tap_offset(const Problem& p, const Tap& tap) const {
    const int64_t row = tap.dh - first_row, column = tap.dw - first_column;
    const int64_t phase = row % p.step.h * phases_w + column % p.step.w;
    return phase * phase_elems() + row / p.step.h * pitch + column / p.step.w;
  }
};

/// `count` elements of an input row of `width`, `step` apart from column `first` on; zeros outside the row.
template <class T>
void copy_phase_row(const T* row, int64_t width, int64_t first, int64_t step, int64_t count, acc_t<T>* target) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  const int64_t begin = min_of(count, first < 0 ? ceil_div(-first, step) : 0);
  const int64_t end = max_of(begin, min_of(count, first < width ? ceil_div(width - first, step) : 0));
  int64_t i = begin;
  for (int64_t zero = 0; zero < begin; ++zero) target[zero] = Acc(0);
  const T* source = row + first;
  if (step == 1)
    for (; i + kLane <= end; i += kLane) simd::store<Acc>(target + i, simd::load(source + i));
#if defined(FASTCONV_SIMD_AVX2)
  if constexpr (sizeof(T) == sizeof(Acc)) {
    // < end: the element after the last one taken may lie outside the row
    if (step == 2)
      for (; i + kLane < end; i += kLane)
        simd::store<Acc>(target + i, even_elements(simd::load(source + 2 * i), simd::load(source + 2 * i + kLane)));
  }
#endif
  for (; i < end; ++i) target[i] = simd::widen(source[i * step]);
  for (; i < count; ++i) target[i] = Acc(0);
}

/// Copies the rows that output rows [first, first + count) of an image need, channels [c_begin, c_end).
template <class T, class Problem>
void copy_padded_rows(const Problem& p, const PaddedRows& rows, const T* image, int64_t first, int64_t count,
                      int64_t c_begin, int64_t c_end, acc_t<T>* buffer) {
  for (int64_t c = c_begin; c < c_end; ++c, buffer += rows.channel_elems())
    for (int64_t phase = 0; phase < rows.phases_h * rows.phases_w; ++phase) {
      acc_t<T>* target = buffer + phase * rows.phase_elems();
      const int64_t column = rows.first_column + phase % rows.phases_w;
      for (int64_t a = 0; a < count + rows.row_span; ++a, target += rows.pitch) {
        const int64_t row = (first + a) * p.step.h + rows.first_row + phase / rows.phases_w;
        // A width of zero: all padding.
        copy_phase_row<T>(image + c * p.x_strides.c + row * p.x_strides.h, inside(row, p.h) ? p.w : 0, column, p.step.w,
                          rows.pitch, target);
      }
    }
}

}  // namespace
}  // namespace fastconv
