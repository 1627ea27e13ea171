// The kernels of average pooling over a grid of windows, regular or adaptive, and of its adjoint.
#pragma once

#include "pool/cuda_shape.cuh"

namespace fastconv::cuda {
namespace {

/// One axis of an averaging grid: what pool.h's AverageAxis holds in tables, computed.
struct AverageLine {
  FastDivide step, input;  // stride, or for adaptive windows the number of outputs; the input's size
  int size, positions, window, stride, pad;
  bool adaptive, include_pad;

  static AverageLine regular(int64_t size, int64_t positions, int64_t window, int64_t stride, int64_t pad,
                             bool include_pad) {
    return AverageLine(stride, size, positions, window, stride, pad, false, include_pad);
  }
  static AverageLine adapting(int64_t size, int64_t positions) {
    if ((size + 1) * (positions + 1) > 0x7fffffff)
      throw std::runtime_error("adaptive_avg_pool2d: " + std::to_string(size) + " elements to " +
                               std::to_string(positions) + " outputs along an axis, expected a product below 2^31");
    return AverageLine(positions, size, positions, 0, 0, 0, true, false);
  }

  /// Output i averages input [begin, end); what it counts for in the divisor.
  __device__ __forceinline__ int window_of(int i, int& begin, int& end) const {
    if (adaptive) {
      begin = step.divide(i * size);
      end = step.divide((i + 1) * size + positions - 1);
      return end - begin;
    }
    const int start = i * stride - pad, padded_end = min(start + window, size + pad);
    end = min(padded_end, size);
    begin = min(max(start, 0), end);
    // With ceil_mode a window may lie in the padding altogether; its sum is zero whatever divides it.
    return max(1, include_pad ? padded_end - start : end - begin);
  }
  __device__ __forceinline__ int count_of(int i) const {
    int begin, end;
    return window_of(i, begin, end);
  }
  /// Input position j is covered by the outputs [first, last).
  __device__ __forceinline__ void covering(int j, int& first, int& last) const {
    if (adaptive) {
      first = input.divide(j * positions);
      last = input.divide((j + 1) * positions + size - 1);
      return;
    }
    const int earliest = j + pad - window + 1;
    first = earliest <= 0 ? 0 : step.divide(earliest + stride - 1);
    last = min(positions, static_cast<int>(step.divide(j + pad)) + 1);
  }

 private:
  AverageLine(int64_t step_, int64_t size_, int64_t positions_, int64_t window_, int64_t stride_, int64_t pad_,
              bool adaptive_, bool include_pad_)
      : step(step_),
        input(size_),
        size(pool_size(size_)),
        positions(pool_size(positions_)),
        window(pool_size(window_)),
        stride(pool_size(stride_)),
        pad(pool_size(pad_)),
        adaptive(adaptive_),
        include_pad(include_pad_) {}
};

/// Where elements are, and how to divide. `divisor` 0: by the two counts' product.
struct AverageGrid {
  AverageLine rows, columns;
  int pixel;
  int64_t input_row, output_row, input_outer, output_outer;
  float divisor;

  __device__ __forceinline__ float divide_by(int row_count, int column_count) const {
    return divisor != 0 ? divisor : static_cast<float>(row_count) * static_cast<float>(column_count);
  }
};

template <int N, class T>
__global__ __launch_bounds__(kUnitThreads) void average_general_kernel(AverageGrid g, Units units,
                                                                       const T* __restrict__ x, T* __restrict__ y) {
  Unit unit;
  if (!units.find(unit)) return;
  int h_begin, h_end, w_begin, w_end;
  const int row_count = g.rows.window_of(unit.row, h_begin, h_end);
  const int column_count = g.columns.window_of(unit.column, w_begin, w_end);
  const T* plane = x + unit.outer * g.input_outer + unit.inner * N;
  float sum[N] = {};
  for (int h = h_begin; h < h_end; ++h) {
    const T* line = plane + h * g.input_row;
    for (int w = w_begin; w < w_end; ++w) {
      const auto value = load_vector<N>(line + static_cast<int64_t>(w) * g.pixel);
#pragma unroll
      for (int n = 0; n < N; ++n) sum[n] += to_float(value[n]);
    }
  }
  const float divisor = g.divide_by(row_count, column_count);
#pragma unroll
  for (int n = 0; n < N; ++n) sum[n] /= divisor;
  const int64_t index =
      unit.outer * g.output_outer + unit.row * g.output_row + static_cast<int64_t>(unit.column) * g.pixel;
  store_vector(y + index + unit.inner * N, from_float<T, N>(sum));
}

/// Gathers: every input element adds the shares of the windows that cover it.
template <int N, class T>
__global__ __launch_bounds__(kUnitThreads) void average_backward_general_kernel(AverageGrid g, Units units,
                                                                                const T* __restrict__ grad,
                                                                                T* __restrict__ grad_input) {
  Unit unit;
  if (!units.find(unit)) return;
  int i_first, i_last, j_first, j_last;
  g.rows.covering(unit.row, i_first, i_last);
  g.columns.covering(unit.column, j_first, j_last);
  const T* plane = grad + unit.outer * g.output_outer + unit.inner * N;
  float sum[N] = {};
  for (int i = i_first; i < i_last; ++i) {
    const int row_count = g.rows.count_of(i);
    const T* line = plane + i * g.output_row;
    for (int j = j_first; j < j_last; ++j) {
      const auto value = load_vector<N>(line + static_cast<int64_t>(j) * g.pixel);
      const float divisor = g.divide_by(row_count, g.columns.count_of(j));
#pragma unroll
      for (int n = 0; n < N; ++n) sum[n] += to_float(value[n]) / divisor;
    }
  }
  const int64_t index =
      unit.outer * g.input_outer + unit.row * g.input_row + static_cast<int64_t>(unit.column) * g.pixel;
  store_vector(grad_input + index + unit.inner * N, from_float<T, N>(sum));
}

/// 2 x 2 windows of stride 2 without padding, all inside: each element is read once. The divisor is a power of two, so
/// that multiplying by its reciprocal, which `divisor` holds here, is exact.
template <int N, class T>
__global__ __launch_bounds__(kUnitThreads) void average_square_kernel(AverageGrid g, Units units,
                                                                      const T* __restrict__ x, T* __restrict__ y) {
  Unit unit;
  if (!units.find(unit)) return;
  const int pixel = N == 1 ? 1 : g.pixel;
  const T* from = x + unit.outer * g.input_outer + 2 * unit.row * g.input_row +
                  2 * static_cast<int64_t>(unit.column) * pixel + unit.inner * N;
  Vector<T, N> value[4];
#pragma unroll
  for (int tap = 0; tap < 4; ++tap) value[tap] = load_units<true, N>(from + tap / 2 * g.input_row + tap % 2 * pixel);
  float mean[N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    mean[n] =
        (to_float(value[0][n]) + to_float(value[1][n]) + to_float(value[2][n]) + to_float(value[3][n])) * g.divisor;
  }
  const int64_t index =
      unit.outer * g.output_outer + unit.row * g.output_row + static_cast<int64_t>(unit.column) * pixel;
  store_vector(y + index + unit.inner * N, from_float<T, N>(mean));
}

/// The same windows' adjoint: a thread owns 2 x 2 elements, those that no window covers included.
template <int N, class T>
__global__ __launch_bounds__(kUnitThreads) void average_backward_square_kernel(AverageGrid g, Units units,
                                                                               const T* __restrict__ grad,
                                                                               T* __restrict__ grad_input) {
  Unit unit;
  if (!units.find(unit)) return;
  const int pixel = N == 1 ? 1 : g.pixel, h = 2 * unit.row, w = 2 * unit.column;
  float share[N] = {};
  if (h / 2 < g.rows.positions && w / 2 < g.columns.positions) {
    const int64_t index =
        unit.outer * g.output_outer + unit.row * g.output_row + static_cast<int64_t>(unit.column) * pixel;
    const auto value = load_units<true, N>(grad + index + unit.inner * N);
#pragma unroll
    for (int n = 0; n < N; ++n) share[n] = to_float(value[n]) * g.divisor;
  }
  const auto rounded = from_float<T, N>(share);
  T* to = grad_input + unit.outer * g.input_outer + h * g.input_row + static_cast<int64_t>(w) * pixel + unit.inner * N;
#pragma unroll
  for (int tap = 0; tap < 4; ++tap)
    if (h + tap / 2 < g.rows.size && w + tap % 2 < g.columns.size)
      store_vector(to + tap / 2 * g.input_row + tap % 2 * pixel, rounded);
}

}  // namespace
}  // namespace fastconv::cuda
