// The weight gradient: grad_w[k, r, s] = sum over n, i, j of grad_y[n, k, i, j] * x[n, k / m, i * stride + r * dilation
// - pad, ...]
//
// Work is cut into shares of (image, row) ranges whose number depends on the problem alone, and shares are added in
// order: results do not change from run to run, nor with the number of threads.
#pragma once

#include "depthwise/cpu_channel_kernels.h"
#include "depthwise/cpu_row_lanes.h"

namespace fastconv {
namespace {

/// Adds `shares` partial results (share, k * taps) in order.
template <class T>
void add_shares(const acc_t<T>* partial, int64_t shares, int64_t elements, T* grad_weight) {
  for (int64_t i = 0; i < elements; ++i) {
    acc_t<T> total = partial[i];
    for (int64_t share = 1; share < shares; ++share) total += partial[share * elements + i];
    grad_weight[i] = simd::narrow<T>(total);
  }
}

// ---------------------------------------------------------------- NCHW: columns in lanes

/// Sums for kRows rows of grad_y against the staged rows of a dense window.
template <class T, int kTapRows, int kTapColumns, int kStep, int kRows>
FASTCONV_INLINE void add_rows(const StagedWindow<acc_t<T>>& window, const T* grad, int64_t row, int64_t columns,
                              simd::Vec<acc_t<T>> (&sums)[kTapRows][kTapColumns]) {
  using Acc = acc_t<T>;
  using V = simd::Vec<Acc>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  const Acc* sources[kTapColumns];
  for (int s = 0; s < kTapColumns; ++s)
    sources[s] = window.rows + row * kStep * window.pitch + window.column_offsets[s];
  grad += row * columns;
  for (int64_t column = 0; column < columns; column += kLane) {
    V factors[kRows];
#pragma GCC unroll 2
    for (int i = 0; i < kRows; ++i)
      factors[i] = column + kLane <= columns ? simd::load(grad + i * columns + column)
                                             : simd::load_first(grad + i * columns + column, columns - column);
#pragma GCC unroll 8
    for (int input_row = 0; input_row < (kRows - 1) * kStep + kTapRows; ++input_row)
#pragma GCC unroll 8
      for (int s = 0; s < kTapColumns; ++s) {
        const V value = simd::load(sources[s] + input_row * window.pitch + column);
#pragma GCC unroll 2
        for (int i = 0; i < kRows; ++i) {
          const int r = input_row - i * kStep;
          if (r >= 0 && r < kTapRows) sums[r][s] = simd::fma<Acc>(value, factors[i], sums[r][s]);
        }
      }
  }
}

template <class T, int kTapRows, int kTapColumns, int kStep>
void add_window(const StagedWindow<acc_t<T>>& window, const T* grad, int64_t rows, int64_t columns, acc_t<T>* sums) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  simd::Vec<Acc> kept[kTapRows][kTapColumns];
  for (int t = 0; t < kTapRows * kTapColumns; ++t)
    kept[t / kTapColumns][t % kTapColumns] = simd::load(sums + t * kLane);
  int64_t row = 0;
  for (; row + 2 <= rows; row += 2) add_rows<T, kTapRows, kTapColumns, kStep, 2>(window, grad, row, columns, kept);
  if (row < rows) add_rows<T, kTapRows, kTapColumns, kStep, 1>(window, grad, row, columns, kept);
  for (int t = 0; t < kTapRows * kTapColumns; ++t)
    simd::store<Acc>(sums + t * kLane, kept[t / kTapColumns][t % kTapColumns]);
}

template <class T>
void add_any_window(const StagedWindow<acc_t<T>>& window, const T* grad, int64_t rows, int64_t columns,
                    acc_t<T>* sums) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  for (int64_t r = 0; r < window.tap_rows; ++r)
    for (int64_t s = 0; s < window.tap_columns; ++s, sums += kLane) {
      auto total = simd::load(sums);
      for (int64_t row = 0; row < rows; ++row) {
        const Acc* source =
            window.rows + (row * window.step + r * window.row_spacing) * window.pitch + window.column_offsets[s];
        const T* factors = grad + row * columns;
        int64_t column = 0;
        for (; column + kLane <= columns; column += kLane)
          total = simd::fma<Acc>(simd::load(source + column), simd::load(factors + column), total);
        if (column < columns)
          total =
              simd::fma<Acc>(simd::load(source + column), simd::load_first(factors + column, columns - column), total);
      }
      simd::store<Acc>(sums, total);
    }
}

template <class T>
using AddWindow = void (*)(const StagedWindow<acc_t<T>>&, const T* grad, int64_t rows, int64_t columns, acc_t<T>* sums);

template <class T>
AddWindow<T> add_window_kernel(const ConvProblem& p) {
  if (p.r == 3 && p.s == 3 && p.dilation.h == 1) {
    if (p.stride.h == 1) return &add_window<T, 3, 3, 1>;
    if (p.stride.h == 2) return &add_window<T, 3, 3, 2>;
  }
  return &add_any_window<T>;
}

template <class T>
void weight_grad_row_lanes(const ConvProblem& p, const T* grad_y, const T* x, T* grad_weight) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>, kBytes = sizeof(Acc), kChannelTasks = 32;
  Scratch axes(taps_bytes(p)), offsets(p.s * static_cast<int64_t>(sizeof(int64_t)));
  const DepthwisePass pass = describe_pass(p, false, x, nullptr, nullptr, {}, axes.as<AxisTaps>());
  const RowLanesPlan<T> plan(pass, round_up(p.q(), kLane), offsets.as<int64_t>());
  const int64_t multiplier = p.k_per_group(), taps = p.r * p.s, pieces = p.n * plan.strips;
  const int64_t shares = min_of(pieces, ceil_div(kChannelTasks, p.c)), plane = p.p() * p.q();
  const int64_t share_work = ceil_div(pieces, shares) * plan.strip_rows * p.q() * multiplier;
  Scratch partial(shares * p.k * taps * kBytes);
  const AddWindow<T> add = add_window_kernel<T>(p);
  parallel_for(0, shares * p.c, ceil_div(8192, share_work), [&](int64_t begin, int64_t end) {
    Scratch staged(plan.plane_pitch * kBytes), sums(multiplier * taps * kLane * kBytes);
    zero_elements(staged.as<Acc>(), plan.plane_pitch);
    const StagedWindow<Acc> window{
        staged.as<Acc>(),    plan.shape.pitch, plan.plane_pitch, 1, p.stride.h, p.dilation.h, p.r, p.s,
        plan.column_offsets, nullptr};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t share = task / p.c, c = task % p.c;
      zero_elements(sums.as<Acc>(), multiplier * taps * kLane);
      for (int64_t piece = pieces * share / shares; piece < pieces * (share + 1) / shares; ++piece) {
        const int64_t n = piece / plan.strips, first = piece % plan.strips * plan.strip_rows;
        const int64_t rows = min_of(plan.strip_rows, p.p() - first);
        stage_rows<T>(plan.shape, x + (n * p.c + c) * p.h * p.w, {p.h, p.w}, first * p.stride.h - p.padding.top,
                      (rows - 1) * p.stride.h + pass.row_reach.last - pass.row_reach.first + 1, plan.strips == 1,
                      staged.as<Acc>());
        for (int64_t j = 0; j < multiplier; ++j)
          add(window, grad_y + (n * p.k + c * multiplier + j) * plane + first * p.q(), rows, p.q(),
              sums.as<Acc>() + j * taps * kLane);
      }
      Acc* result = partial.as<Acc>() + (share * p.k + c * multiplier) * taps;
      for (int64_t t = 0; t < multiplier * taps; ++t)
        result[t] = simd::sum<Acc>(simd::load(sums.as<Acc>() + t * kLane));
    }
  });
  add_shares<T>(partial.as<Acc>(), shares, p.k * taps, grad_weight);
}

}  // namespace
}  // namespace fastconv
