// The gradient of max pooling, gathered: every thread adds up, for the elements it owns, what the windows covering them
// say, in the order of the windows. No atomics, no zero-filling pass, the same bits at every run.
#pragma once

#include <numeric>

#include "pool/cuda_reduce.cuh"
#include "pool/cuda_shape.cuh"

namespace fastconv::cuda {
namespace {

/// Along one axis, which windows cover a position: tap `first_tap` of window `first`, then every `tap_step`-th tap
/// down, `window_step` windows up.
struct Covering {
  FastDivide stride, dilation;
  int window, positions, pad, tap_step, window_step;

  Covering(int64_t window_, int64_t positions_, int64_t pad_, int64_t stride_, int64_t dilation_)
      : stride(stride_),
        dilation(dilation_),
        window(static_cast<int>(window_)),
        positions(static_cast<int>(positions_)),
        pad(static_cast<int>(pad_)),
        tap_step(static_cast<int>(stride_ / std::gcd(stride_, dilation_))),
        window_step(static_cast<int>(dilation_ / std::gcd(stride_, dilation_))) {}

  /// The largest tap that can be at `position`, or a negative number; `first` is its window.
  __device__ __forceinline__ int first_tap(uint32_t position, int& first) const {
    const uint32_t padded = position + pad;
    int tap = min(window - 1, static_cast<int>(dilation.divide(padded)));
    for (; tap >= 0; --tap) {
      uint32_t rest = padded - tap * dilation.divisor;
      first = stride.divide_keep_rest(rest);
      if (rest == 0) break;
    }
    return tap;
  }
};

/// Any window.
template <class Offset, int N, class T>
__global__ __launch_bounds__(kUnitThreads) void max_backward_general_kernel(PoolShape g, Units units, Covering rows,
                                                                            Covering columns,
                                                                            const T* __restrict__ grad,
                                                                            const Offset* __restrict__ offsets,
                                                                            T* __restrict__ grad_input) {
  Unit unit;
  if (!units.find(unit)) return;
  int i = 0, first_j = 0;
  const int first_s = columns.first_tap(unit.column, first_j);
  float sum[N] = {};
  for (int r = rows.first_tap(unit.row, i); r >= 0 && i < rows.positions; r -= rows.tap_step, i += rows.window_step) {
    for (int s = first_s, j = first_j; s >= 0 && j < columns.positions;
         s -= columns.tap_step, j += columns.window_step) {
      const int64_t window = g.output_at(unit.outer, i, j) + unit.inner * N;
      int offset[N];
      load_offsets<N>(offsets + window, offset);
      const auto value = load_vector<N>(grad + window);
#pragma unroll
      for (int n = 0; n < N; ++n)
        if (offset[n] == r * columns.window + s) sum[n] += to_float(value[n]);
    }
  }
  store_vector(grad_input + g.input_at(unit.outer, unit.row, unit.column) + unit.inner * N, from_float<T, N>(sum));
}

/// Windows of stride 2 that reach a pair of rows (2a, 2a + 1): `kCount` of them from a + kFirst.
template <int kWindow, int kPad>
struct Reach {
  static constexpr int kFirst = kWindow == 3 && kPad == 0 ? -1 : 0;
  static constexpr int kCount = kWindow == 2 && kPad == 0 ? 1 : 2;
  /// The tap of window k that is row 2a + d, or a number outside [0, kWindow).
  static constexpr int tap(int k, int d) { return d + kPad - 2 * (kFirst + k); }
  static constexpr bool covers(int k, int d) { return tap(k, d) >= 0 && tap(k, d) < kWindow; }
};

/// Square windows of stride 2, unrolled. A thread owns 2 x 2 pixels by N channels (NHWC), or 4 x 2 elements of a plane
/// (NCHW, N = 1: two of them, because finding one's place costs more than the work), and loads each window that reaches
/// them once. `paired`: rows start on even elements, so two neighbours are stored as one.
constexpr int square_rows(int lanes) { return lanes == 1 ? 2 : 1; }

template <int N, int kWindow, int kPad, class T>
__global__ __launch_bounds__(kUnitThreads) void max_backward_square_kernel(PoolShape g, Units units, bool paired,
                                                                           const T* __restrict__ grad,
                                                                           const uint8_t* __restrict__ offsets,
                                                                           T* __restrict__ grad_input) {
  using Near = Reach<kWindow, kPad>;
  constexpr int kPairs = square_rows(N), kRows = Near::kCount + kPairs - 1;
  Unit unit;
  if (!units.find(unit)) return;
  const auto pixel = in_plane<N>(N == 1 ? 1 : g.pixel), output_row = in_plane<N>(g.output_row);
  const int64_t plane = unit.outer * g.output_outer + unit.inner * N;
  const T* from = grad + plane;
  const uint8_t* taps = offsets + plane;
  // All loads first, so that they are in flight together.
  Vector<T, N> value[kRows][Near::kCount];
  int offset[kRows][Near::kCount][N];
#pragma unroll
  for (int ki = 0; ki < kRows; ++ki)
#pragma unroll
    for (int kj = 0; kj < Near::kCount; ++kj) {
      const int i = static_cast<int>(unit.row) * kPairs + Near::kFirst + ki;
      const int j = static_cast<int>(unit.column) + Near::kFirst + kj;
      const bool exists = static_cast<unsigned>(i) < static_cast<unsigned>(g.p) &&
                          static_cast<unsigned>(j) < static_cast<unsigned>(g.q);
      // A window that does not exist has an offset that is nobody's.
      if constexpr (N == 1) {
        value[ki][kj] = {};
        offset[ki][kj][0] = -1;
        if (exists) {
          value[ki][kj] = load_units<Near::kCount == 1, 1>(from + (i * output_row + j));
          load_offsets<1>(taps + (i * output_row + j), offset[ki][kj]);
        }
      } else {
        // Vectors of it come from the nearest that does: conditional loads would be branches, one waiting for the
        // other.
        const auto window = min(max(i, 0), g.p - 1) * output_row + min(max(j, 0), g.q - 1) * pixel;
        value[ki][kj] = load_units<Near::kCount == 1, N>(from + window);
        load_offsets<N>(taps + window, offset[ki][kj]);
#pragma unroll
        for (int n = 0; n < N; ++n) offset[ki][kj][n] = exists ? offset[ki][kj][n] : -1;
      }
    }
  float sum[2 * kPairs][2][N] = {};
#pragma unroll
  for (int row = 0; row < 2 * kPairs; ++row)
#pragma unroll
    for (int dw = 0; dw < 2; ++dw)
#pragma unroll
      for (int ki = 0; ki < Near::kCount; ++ki)
#pragma unroll
        for (int kj = 0; kj < Near::kCount; ++kj) {
          if (!Near::covers(ki, row % 2) || !Near::covers(kj, dw)) continue;
          const int tap = Near::tap(ki, row % 2) * kWindow + Near::tap(kj, dw);
#pragma unroll
          for (int n = 0; n < N; ++n)
            if (offset[row / 2 + ki][kj][n] == tap) sum[row][dw][n] += to_float(value[row / 2 + ki][kj][n]);
        }
  const auto input_row = in_plane<N>(g.input_row);
  T* to = grad_input + unit.outer * g.input_outer + unit.inner * N;
#pragma unroll
  for (int row = 0; row < 2 * kPairs; ++row) {
    const int h = 2 * kPairs * unit.row + row, w = 2 * unit.column;
    if (h >= g.h) continue;
    T* line = to + h * input_row + w * pixel;
    if (N == 1 && paired) {
      const float both[2] = {sum[row][0][0], sum[row][1][0]};
      store_vector(line, from_float<T, 2>(both));
      continue;
    }
    store_vector(line, from_float<T, N>(sum[row][0]));
    if (w + 1 < g.w) store_vector(line + pixel, from_float<T, N>(sum[row][1]));
  }
}

/// NCHW, 2 x 2 without padding or 3 x 3 with padding 1, stride 2: a thread turns 8 bytes of gradients a row of windows,
/// with their offsets, into 16 bytes of each of two rows. 3 x 3 windows also reach the next row of windows and one
/// window to the right, which the neighbouring thread's load brings.
template <int kWindow, class T>
__global__ __launch_bounds__(kUnitThreads) void max_backward_rows_kernel(PoolShape g, Units units,
                                                                         const T* __restrict__ grad,
                                                                         const uint8_t* __restrict__ offsets,
                                                                         T* __restrict__ grad_input) {
  constexpr int kLanes = kVectorElements<T>, kIn = kLanes / 2, kPad = kWindow - 2;
  using Near = Reach<kWindow, kPad>;
  Unit unit;
  if (!units.find(unit)) return;
  const int left = unit.column * kIn;
  const int64_t plane = unit.outer * g.output_outer;
  float sum[2][kLanes] = {};
#pragma unroll
  for (int ki = 0; ki < Near::kCount; ++ki) {
    const int i = unit.row + ki;
    if (i >= g.p) continue;
    const int64_t line = plane + i * g.output_row + left;
    const auto values = load_vector<kIn>(grad + line);
    int tap[kIn + 1];
    load_offsets<kIn>(offsets + line, reinterpret_cast<int (&)[kIn]>(tap));
    float value[kIn + 1];
#pragma unroll
    for (int j = 0; j < kIn; ++j) value[j] = to_float(values[j]);
    value[kIn] = 0, tap[kIn] = 0;
    if (kPad == 1 && left + kIn < g.q) value[kIn] = to_float(grad[line + kIn]), tap[kIn] = offsets[line + kIn];
#pragma unroll
    for (int dh = 0; dh < 2; ++dh) {
      if (!Near::covers(ki, dh)) continue;
      // Element e of the row: windows e / 2 and, for the odd ones of 3 x 3, e / 2 + 1.
#pragma unroll
      for (int e = 0; e < kLanes; ++e)
#pragma unroll
        for (int kj = 0; kj < Near::kCount; ++kj)
          if (Near::covers(kj, e % 2) && tap[e / 2 + kj] == Near::tap(ki, dh) * kWindow + Near::tap(kj, e % 2))
            sum[dh][e] += value[e / 2 + kj];
    }
  }
  T* to = grad_input + unit.outer * g.input_outer + static_cast<int64_t>(unit.column) * kLanes;
#pragma unroll
  for (int dh = 0; dh < 2; ++dh) {
    const int h = 2 * unit.row + dh;
    if (h < g.h) store_vector(to + h * g.input_row, from_float<T, kLanes>(sum[dh]));
  }
}

}  // namespace
}  // namespace fastconv::cuda
