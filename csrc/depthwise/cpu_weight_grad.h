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

/// Tasks are groups of channels, and shares of the (image, strip) pairs where there are too few channels.
struct RowGradPlan {
  int64_t group, groups;  // of channels
  int64_t channel_sums;   // elements of one channel's sums: a vector for every tap of its filters
  int64_t pieces, shares;

  RowGradPlan(const ConvProblem& p, int64_t strips, int64_t lanes, int64_t element_bytes) {
    constexpr int64_t kTasks = 32, kSumsBytes = 8 * 1024;
    channel_sums = p.k_per_group() * p.r * p.s * lanes;
    // Several channels at a time make longer runs of small maps to read, image by image; their sums must stay in L1.
    group = max_of(1, min_of(p.c / kTasks, kSumsBytes / (channel_sums * element_bytes)));
    groups = ceil_div(p.c, group);
    pieces = p.n * strips;
    shares = min_of(pieces, ceil_div(kTasks, groups));
  }
};

/// Adds to the sums of channels [begin, end): their part of one strip of one image.
template <class T>
void add_piece(const ConvProblem& p, const DepthwisePass& pass, const RowLanesPlan<T>& plan,
               const StagedWindow<acc_t<T>>& window, int64_t piece, int64_t begin, int64_t end, const T* grad_y,
               acc_t<T>* staged, acc_t<T>* sums) {
  const AddWindow<T> add = add_window_kernel<T>(p);
  const int64_t n = piece / plan.strips, first = piece % plan.strips * plan.strip_rows, q = p.q(), plane = p.p() * q;
  const int64_t rows = min_of(plan.strip_rows, p.p() - first), multiplier = p.k_per_group();
  const int64_t x_first = first * p.stride.h + pass.row_reach.first;
  const int64_t x_rows = (rows - 1) * p.stride.h + pass.row_reach.last - pass.row_reach.first + 1;
  const T* x = static_cast<const T*>(pass.x) + (n * p.c + begin) * p.h * p.w;
  const T* grad = grad_y + (n * p.k + begin * multiplier) * plane + first * q;
  for (int64_t c = begin; c < end; ++c, x += p.h * p.w) {
    stage_rows<T>(plan.shape, x, {p.h, p.w}, x_first, x_rows, plan.strips == 1, staged);
    for (int64_t j = 0; j < multiplier; ++j, grad += plane, sums += p.r * p.s * simd::kLanes<acc_t<T>>)
      add(window, grad, rows, q, sums);
  }
}

template <class T>
void weight_grad_row_lanes(const ConvProblem& p, const T* grad_y, const T* x, T* grad_weight) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>, kBytes = sizeof(Acc);
  Scratch axes(taps_bytes(p)), offsets(p.s * static_cast<int64_t>(sizeof(int64_t)));
  const DepthwisePass pass = describe_pass(p, false, x, nullptr, nullptr, {}, axes.as<AxisTaps>());
  const RowLanesPlan<T> plan(pass, round_up(p.q(), kLane), offsets.as<int64_t>());
  const RowGradPlan work(p, plan.strips, kLane, kBytes);
  const int64_t taps_per_channel = work.channel_sums / kLane;
  const int64_t task_work = ceil_div(work.pieces, work.shares) * plan.strip_rows * p.q() * work.group * p.k_per_group();
  Scratch partial(work.shares * p.c * taps_per_channel * kBytes);
  parallel_for(0, work.shares * work.groups, ceil_div(8192, task_work), [&](int64_t task_begin, int64_t task_end) {
    Scratch staged(plan.plane_pitch * kBytes), sums(work.group * work.channel_sums * kBytes);
    zero_elements(staged.as<Acc>(), plan.plane_pitch);
    const StagedWindow<Acc> window{
        staged.as<Acc>(),    plan.shape.pitch, plan.plane_pitch, 1, p.stride.h, p.dilation.h, p.r, p.s,
        plan.column_offsets, nullptr};
    for (int64_t task = task_begin; task < task_end; ++task) {
      const int64_t share = task / work.groups, begin = task % work.groups * work.group;
      const int64_t end = min_of(p.c, begin + work.group);
      zero_elements(sums.as<Acc>(), (end - begin) * work.channel_sums);
      for (int64_t piece = work.pieces * share / work.shares; piece < work.pieces * (share + 1) / work.shares; ++piece)
        add_piece<T>(p, pass, plan, window, piece, begin, end, grad_y, staged.as<Acc>(), sums.as<Acc>());
      Acc* result = partial.as<Acc>() + (share * p.c + begin) * taps_per_channel;
      for (int64_t t = 0; t < (end - begin) * taps_per_channel; ++t)
        result[t] = simd::sum<Acc>(simd::load(sums.as<Acc>() + t * kLane));
    }
  });
  add_shares<T>(partial.as<Acc>(), work.shares, p.c * taps_per_channel, grad_weight);
}

}  // namespace
}  // namespace fastconv
