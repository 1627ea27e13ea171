// The kernels of max pooling forward. All are limited by memory: see README.md, "On a GPU".
#pragma once

#include "pool/cuda_reduce.cuh"
#include "pool/cuda_shape.cuh"

namespace fastconv::cuda {
namespace {

template <class Reduction, int N, class T>
__device__ __forceinline__ void store_result(const Reduction& result, int64_t index, T* y,
                                             typename Reduction::Offset* offsets) {
  store_vector(y + index, result.values());
  if constexpr (Reduction::kOffsets) store_offsets<typename Reduction::Offset, N>(offsets + index, result.offset);
}

/// Any window: the loops run over the taps inside the input.
template <class Reduction, int N, class T>
__global__ __launch_bounds__(kUnitThreads) void max_general_kernel(PoolShape g, Units units, const T* __restrict__ x,
                                                                   T* __restrict__ y,
                                                                   typename Reduction::Offset* __restrict__ offsets) {
  Unit unit;
  if (!units.find(unit)) return;
  const Taps rows(unit.row, g.stride_h, g.pad_h, g.h, g.r, g.dilation_h);
  const Taps columns(unit.column, g.stride_w, g.pad_w, g.w, g.s, g.dilation_w);
  const T* plane = x + unit.outer * g.input_outer + unit.inner * N;
  Reduction best;
  best.start_empty(rows.first(g.r) * g.s + columns.first(g.s));
  for (int r = rows.begin; r < rows.end; ++r) {
    const T* line = plane + (rows.start + r * g.dilation_h) * g.input_row;
    for (int s = columns.begin; s < columns.end; ++s)
      best.take(load_vector<N>(line + static_cast<int64_t>(columns.start + s * g.dilation_w) * g.pixel), r * g.s + s);
  }
  store_result<Reduction, N>(best, g.output_at(unit.outer, unit.row, unit.column) + unit.inner * N, y, offsets);
}

/// Outputs of one thread, one below the other: 3 x 3 windows of stride 2 share every second row, which is loaded once.
constexpr int output_rows(int window) { return window == 3 ? 2 : 1; }

/// Square windows of stride 2, unrolled, N channels (NHWC) or one column (NCHW, N = 1).
///
/// kInside: no window hangs over an edge. Else taps outside are moved to the nearest tap inside, number included: no
/// loop has a condition, all loads are in flight together, and taking a tap twice changes nothing.
template <class Reduction, int N, int kWindow, bool kInside, class T>
__global__ __launch_bounds__(kUnitThreads) void max_square_kernel(PoolShape g, Units units, const T* __restrict__ x,
                                                                  T* __restrict__ y,
                                                                  typename Reduction::Offset* __restrict__ offsets) {
  constexpr int kRows = output_rows(kWindow);
  Unit unit;
  if (!units.find(unit)) return;
  const int first = unit.row * kRows, top = first * 2 - (kInside ? 0 : g.pad_h);
  const int left = unit.column * 2 - (kInside ? 0 : g.pad_w);
  const auto pixel = in_plane<N>(N == 1 ? 1 : g.pixel), input_row = in_plane<N>(g.input_row);
  const T* plane = x + unit.outer * g.input_outer + unit.inner * N;
  int column[kWindow];
#pragma unroll
  for (int s = 0; s < kWindow; ++s) column[s] = kInside ? left + s : min(max(left + s, 0), g.w - 1);
  Reduction best[kRows];
#pragma unroll
  for (int row = 0; row < 2 * (kRows - 1) + kWindow; ++row) {
    // The second output's rows may lie below the input even so: then there is no second output.
    const int h = kInside ? min(top + row, g.h - 1) : min(max(top + row, 0), g.h - 1);
    const T* line = plane + h * input_row;
#pragma unroll
    for (int s = 0; s < kWindow; ++s) {
      // 2 x 2 windows do not overlap: each element is read once.
      const auto value =
          load_units<kWindow == 2, N>(kInside ? line + left * pixel + s * pixel : line + column[s] * pixel);
#pragma unroll
      for (int o = 0; o < kRows; ++o) {
        const int r = row - 2 * o;
        const int tap = kInside ? r * kWindow + s : (h - top - 2 * o) * kWindow + column[s] - left;
        if (r == 0 && s == 0) best[o].start(value, tap);
        else if (r >= 0 && r < kWindow) best[o].take(value, tap);
      }
    }
  }
#pragma unroll
  for (int o = 0; o < kRows; ++o)
    if (first + o < g.p)
      store_result<Reduction, N>(best[o], g.output_at(unit.outer, first + o, unit.column) + unit.inner * N, y, offsets);
}

/// NCHW, 2 x 2 without padding or 3 x 3 with padding 1, stride 2: a thread turns 16 bytes of each row into 8 bytes of
/// outputs. The third column of the leftmost window is one element more, which the neighbouring thread's load brought.
template <class Reduction, int kWindow, class T>
__global__ __launch_bounds__(kUnitThreads) void max_rows_kernel(PoolShape g, Units units, const T* __restrict__ x,
                                                                T* __restrict__ y,
                                                                typename Reduction::Offset* __restrict__ offsets) {
  constexpr int kLanes = kVectorElements<T>, kOut = kLanes / 2, kRows = output_rows(kWindow), kPad = kWindow - 2;
  Unit unit;
  if (!units.find(unit)) return;
  const int first = unit.row * kRows, top = first * 2 - kPad, left = unit.column * kLanes;
  const T* plane = x + unit.outer * g.input_outer;
  Reduction best[kRows];
#pragma unroll
  for (int row = 0; row < 2 * (kRows - 1) + kWindow; ++row) {
    const int h = min(max(top + row, 0), g.h - 1);
    const T* line = plane + h * g.input_row + left;
    const auto values = load_units<kWindow == 2, kLanes>(line);
    T before = values[0];
    if (kPad == 1 && left > 0) before = line[-1];
#pragma unroll
    for (int s = 0; s < kWindow; ++s) {
      Vector<T, kOut> taps;
#pragma unroll
      for (int j = 0; j < kOut; ++j) taps[j] = 2 * j + s < kPad ? before : values[2 * j + s - kPad];
#pragma unroll
      for (int o = 0; o < kRows; ++o) {
        const int r = row - 2 * o, tap = (h - top - 2 * o) * kWindow + s;
        if (r == 0 && s == 0) best[o].start(taps, tap);
        else if (r >= 0 && r < kWindow) best[o].take(taps, tap);
      }
    }
  }
#pragma unroll
  for (int o = 0; o < kRows; ++o) {
    if (first + o >= g.p) continue;
    if constexpr (Reduction::kOffsets && kPad == 1) {
      // At the left edge tap 0 of a row was tap 1 again.
      if (left == 0 && best[o].offset[0] % kWindow == 0) ++best[o].offset[0];
    }
    store_result<Reduction, kOut>(best[o], g.output_at(unit.outer, first + o, unit.column * kOut), y, offsets);
  }
}

}  // namespace
}  // namespace fastconv::cuda
