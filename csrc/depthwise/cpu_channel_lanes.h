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
  const Size2 phases = pass.phases, size = pass.y_size, step = pass.step;
  const int64_t filters = pass.filters;
  ChannelTile<X, Y> tile{};
  tile.x = scratch.table;
  tile.step = step.w;
  tile.y_column = phases.w * filters;
  tile.channels = filters;
  tile.scale = static_cast<const Acc*>(pass.epilogue.scale);
  tile.shift = static_cast<const Acc*>(pass.epilogue.shift);
  tile.activation = pass.epilogue.activation;
  for (int64_t i = begin; i < end; ++i)
    for (int64_t a = 0; a < phases.h && a + i * phases.h < size.h; ++a)
      for (int64_t b = 0; b < min_of(phases.w, size.w); ++b) {
        const AxisTaps &rows = pass.row_taps[a], &columns = pass.column_taps[b];
        const int64_t count = ceil_div(size.w - b, phases.w);
        tile.spacing = columns.spacing;
        tile.tap_rows = columns.count > 0 ? rows.count : 0;
        tile.tap_columns = columns.count;
        tile.weights = weights + (rows.tap * pass.kernel.w + columns.tap) * filters;
        tile.weight_row = rows.tap_step * pass.kernel.w * filters;
        tile.weight_column = columns.tap_step * filters;
        tile.x_pitch = (kTileColumns - 1) * step.w + columns.spacing * (columns.count - 1) + 1;
        const auto kernel = channel_kernel<X, Y>(rows.count, columns.count, columns.spacing, step.w, filters);
        for (int64_t j = 0; j < count; j += kTileColumns) {
          const int64_t offset = ((a + i * phases.h) * size.w + b + j * phases.w) * filters;
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
  int64_t rows_per_task, row_tasks;  // of the grid
  int64_t table_elements;
  int64_t repeated_elements;  // of x or y, for a channel multiplier

  explicit ChannelLanesPlan(const DepthwisePass& pass) {
    const int64_t taps = pass.kernel.h * pass.kernel.w, row_work = pass.phases.h * pass.y_size.w * pass.filters * taps;
    rows_per_task = min_of(pass.grid.h, max_of(1, 262144 / row_work));
    row_tasks = ceil_div(pass.grid.h, rows_per_task);
    const AxisReach &rows = pass.row_reach, &columns = pass.column_reach;
    table_elements = pass.kernel.h * ((kTileColumns - 1) * pass.step.w + columns.last - columns.first + 1);
    const int64_t x_rows = (rows_per_task - 1) * pass.step.h + rows.last - rows.first + 1;
    const int64_t y_rows = rows_per_task * pass.phases.h;
    repeated_elements = pass.filters * (pass.gradient ? y_rows * pass.y_size.w : x_rows * pass.x_size.w);
    if (pass.filters == pass.channels) repeated_elements = 0;
  }
};

/// One task: rows of one image.
template <class T>
void run_channel_task(const DepthwisePass& pass, const ChannelLanesPlan& plan, const acc_t<T>* weights, int64_t task,
                      const void** table, const void* zeros, acc_t<T>* repeated) {
  using Acc = acc_t<T>;
  const Size2 x_size = pass.x_size, y_size = pass.y_size;
  const int64_t multiplier = pass.filters / pass.channels, n = task / plan.row_tasks;
  const int64_t begin = task % plan.row_tasks * plan.rows_per_task;
  const int64_t end = min_of(pass.grid.h, begin + plan.rows_per_task);
  const int64_t x_channels = pass.channels * pass.x_planes, y_channels = pass.channels * pass.y_planes;
  const int64_t y_start = n * y_size.h * y_size.w * y_channels, y_row = y_size.w * y_channels;
  const ChannelImage<T> image{static_cast<const T*>(pass.x) + n * x_size.h * x_size.w * x_channels, x_size, x_channels};
  T* y = static_cast<T*>(pass.y) + y_start;
  const ChannelScratch<T> scratch{reinterpret_cast<const T**>(table), static_cast<const T*>(zeros)};
  const T* residual = pass.epilogue.residual ? static_cast<const T*>(pass.epilogue.residual) + y_start : nullptr;
  if (multiplier == 1) {
    convolve_grid_rows<T, T>(pass, image, weights, y, residual, begin, end, scratch);
  } else if (!pass.gradient) {
    const int64_t first = min_of(max_of(0, begin * pass.step.h + pass.row_reach.first), x_size.h);
    const int64_t last = max_of(first, min_of(x_size.h, (end - 1) * pass.step.h + pass.row_reach.last + 1));
    repeat_channels(image, first, last, multiplier, repeated);
    const ChannelImage<Acc> wide{repeated - first * x_size.w * pass.filters, x_size, pass.filters};
    const ChannelScratch<Acc> wide_scratch{reinterpret_cast<const Acc**>(table), static_cast<const Acc*>(zeros)};
    convolve_grid_rows<Acc, T>(pass, wide, weights, y, residual, begin, end, wide_scratch);
  } else {
    const int64_t first = begin * pass.phases.h, last = min_of(y_size.h, end * pass.phases.h);
    Acc* wide = repeated - first * y_size.w * pass.filters;
    convolve_grid_rows<T, Acc>(pass, image, weights, wide, nullptr, begin, end, scratch);
    sum_repeated_channels<T>(repeated, (last - first) * y_row, multiplier, y + first * y_row);
  }
}

template <class T>
void convolve_channel_lanes(const DepthwisePass& pass) {
  using Acc = acc_t<T>;
  constexpr int64_t kBytes = sizeof(Acc), kPointerBytes = sizeof(void*);
  const ChannelLanesPlan plan(pass);
  const int64_t taps = pass.kernel.h * pass.kernel.w, filters = pass.filters;
  Scratch packed(taps * filters * kBytes);
  pack_tap_major(static_cast<const T*>(pass.weight), filters, taps, packed.as<Acc>());
  parallel_for(0, pass.n * plan.row_tasks, 1, [&](int64_t begin, int64_t end) {
    Scratch table(plan.table_elements * kPointerBytes), zeros(filters * kBytes);
    Scratch repeated(plan.repeated_elements * kBytes);
    std::memset(zeros.as<void>(), 0, static_cast<size_t>(filters * kBytes));
    for (int64_t task = begin; task < end; ++task)
      run_channel_task<T>(pass, plan, packed.as<Acc>(), task, table.as<const void*>(), zeros.as<void>(),
                          repeated.as<Acc>());
  });
}

}  // namespace
}  // namespace fastconv
