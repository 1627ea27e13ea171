// The forward pass and the input gradient for NHWC: a task owns a few rows of an image. With a channel multiplier,
// the forward pass first repeats each input channel, and the gradient last sums the lanes of each input channel; so the
// kernels always see as many lanes as there are filters.
#pragma once

#include "depthwise/cpu_channel_kernels.h"

namespace fastconv {
namespace {

/// Memory of one thread.
template <class X>
struct ChannelScratch {
  const X** table;
  const X* zeros;
};

/// Grid rows [begin, end) of one image, all phases. `y` and `residual` point at the image's row 0.
template <class X, class Y>
void convolve_grid_rows(const DepthwisePass& pass, const ChannelImage<X>& image, const acc_t<X>* weights, Y* y,
                        const Y* residual, int64_t begin, int64_t end, const ChannelScratch<X>& scratch) {
  using Acc = acc_t<X>;
  const ConvProblem& p = pass.problem;
  const Size2 phases = pass.phases(), size = pass.y_size(), step = pass.step();
  ChannelTile<X, Y> tile{};
  tile.x = scratch.table;
  tile.step = step.w;
  tile.y_column = phases.w * p.k;
  tile.channels = p.k;
  tile.scale = static_cast<const Acc*>(pass.epilogue.scale);
  tile.shift = static_cast<const Acc*>(pass.epilogue.shift);
  tile.activation = pass.epilogue.activation;
  for (int64_t i = begin; i < end; ++i)
    for (int64_t a = 0; a < phases.h && a + i * phases.h < size.h; ++a)
      for (int64_t b = 0; b < min_of(phases.w, size.w); ++b) {
        const AxisTaps rows = pass.row_taps(a), columns = pass.column_taps(b);
        const int64_t count = ceil_div(size.w - b, phases.w);
        tile.spacing = columns.spacing;
        tile.tap_rows = columns.count > 0 ? rows.count : 0;
        tile.tap_columns = columns.count;
        tile.weights = weights + (rows.tap * p.s + columns.tap) * p.k;
        tile.weight_row = rows.tap_step * p.s * p.k;
        tile.weight_column = columns.tap_step * p.k;
        tile.x_pitch = (kTileColumns - 1) * step.w + columns.spacing * (columns.count - 1) + 1;
        const auto kernel = channel_kernel<X, Y>(rows.count, columns.count, columns.spacing, step.w, p.k);
        for (int64_t j = 0; j < count; j += kTileColumns) {
          const int64_t offset = ((a + i * phases.h) * size.w + b + j * phases.w) * p.k;
          point_at_window(image, scratch.zeros, i * step.h + rows.offset, rows.spacing, tile.tap_rows,
                          j * step.w + columns.offset, tile.x_pitch, scratch.table);
          tile.y = y + offset;
          tile.residual = residual ? residual + offset : nullptr;
          tile.columns = min_of(kTileColumns, count - j);
          kernel(tile);
        }
      }
}

/// Sums groups of `times` neighbouring lanes: the input gradient of a channel multiplier.
template <class T>
void sum_repeated_channels(const acc_t<T>* source, int64_t count, int64_t times, T* target) {
  for (int64_t i = 0; i < count; ++i, source += times) {
    acc_t<T> total = source[0];
    for (int64_t j = 1; j < times; ++j) total += source[j];
    target[i] = simd::narrow<T>(total);
  }
}

struct ChannelLanesPlan {
  int64_t grid_rows, rows_per_task, row_tasks;
  AxisReach reach;
  int64_t table_elements, x_rows;

  explicit ChannelLanesPlan(const DepthwisePass& pass)
      : grid_rows(ceil_div(pass.y_size().h, pass.phases().h)), reach(pass.row_reach()) {
    const ConvProblem& p = pass.problem;
    const AxisReach columns = pass.column_reach();
    const int64_t per_row = pass.phases().h * pass.y_size().w * p.k * p.r * p.s;
    rows_per_task = min_of(grid_rows, max_of(1, 262144 / per_row));
    row_tasks = ceil_div(grid_rows, rows_per_task);
    table_elements = p.r * ((kTileColumns - 1) * pass.step().w + columns.last - columns.first + 1);
    x_rows = (rows_per_task - 1) * pass.step().h + reach.last - reach.first + 1;
  }
};

/// One task: rows of one image.
template <class T>
void run_channel_task(const DepthwisePass& pass, const ChannelLanesPlan& plan, const acc_t<T>* weights, int64_t task,
                      const void** table, const void* zeros, acc_t<T>* repeated) {
  using Acc = acc_t<T>;
  const ConvProblem& p = pass.problem;
  const Size2 x_size = pass.x_size(), y_size = pass.y_size();
  const int64_t multiplier = p.k_per_group(), n = task / plan.row_tasks;
  const int64_t begin = task % plan.row_tasks * plan.rows_per_task;
  const int64_t end = min_of(plan.grid_rows, begin + plan.rows_per_task);
  const int64_t x_channels = pass.gradient ? p.k : p.c, y_channels = pass.gradient ? p.c : p.k;
  const int64_t y_start = n * y_size.h * y_size.w * y_channels, y_row = y_size.w * y_channels;
  const ChannelImage<T> image{static_cast<const T*>(pass.x) + n * x_size.h * x_size.w * x_channels, x_size, x_channels};
  T* y = static_cast<T*>(pass.y) + y_start;
  const ChannelScratch<T> scratch{reinterpret_cast<const T**>(table), static_cast<const T*>(zeros)};
  const T* residual = pass.epilogue.residual ? static_cast<const T*>(pass.epilogue.residual) + y_start : nullptr;
  if (multiplier == 1) {
    convolve_grid_rows<T, T>(pass, image, weights, y, residual, begin, end, scratch);
  } else if (!pass.gradient) {
    const int64_t first = min_of(max_of(0, begin * pass.step().h + plan.reach.first), x_size.h);
    const int64_t last = max_of(first, min_of(x_size.h, (end - 1) * pass.step().h + plan.reach.last + 1));
    repeat_channels(image, first, last, multiplier, repeated);
    const ChannelImage<Acc> wide{repeated - first * x_size.w * p.k, x_size, p.k};
    const ChannelScratch<Acc> wide_scratch{reinterpret_cast<const Acc**>(table), static_cast<const Acc*>(zeros)};
    convolve_grid_rows<Acc, T>(pass, wide, weights, y, residual, begin, end, wide_scratch);
  } else {
    const int64_t first = begin * pass.phases().h, last = min_of(y_size.h, end * pass.phases().h);
    convolve_grid_rows<T, Acc>(pass, image, weights, repeated - first * y_size.w * p.k, nullptr, begin, end, scratch);
    sum_repeated_channels<T>(repeated, (last - first) * y_row, multiplier, y + first * y_row);
  }
}

template <class T>
void convolve_channel_lanes(const DepthwisePass& pass) {
  using Acc = acc_t<T>;
  constexpr int64_t kBytes = sizeof(Acc), kPointerBytes = sizeof(void*);
  const ConvProblem& p = pass.problem;
  const ChannelLanesPlan plan(pass);
  Scratch packed(p.r * p.s * p.k * kBytes);
  pack_tap_major(static_cast<const T*>(pass.weight), p.k, p.r * p.s, packed.as<Acc>());
  const int64_t y_rows = plan.rows_per_task * pass.phases().h;
  const int64_t repeated_elements = p.k_per_group() == 1 ? 0 : p.k * (pass.gradient ? y_rows * p.w : plan.x_rows * p.w);
  parallel_for(0, p.n * plan.row_tasks, 1, [&](int64_t begin, int64_t end) {
    Scratch table(plan.table_elements * kPointerBytes), zeros(p.k * kBytes), repeated(repeated_elements * kBytes);
    std::memset(zeros.as<void>(), 0, static_cast<size_t>(p.k * kBytes));
    for (int64_t task = begin; task < end; ++task)
      run_channel_task<T>(pass, plan, packed.as<Acc>(), task, table.as<const void*>(), zeros.as<void>(),
                          repeated.as<Acc>());
  });
}

}  // namespace
}  // namespace fastconv
