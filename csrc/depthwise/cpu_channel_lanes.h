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

/// Columns of the pointer table: whole tiles, so the last ones may point right of the image, at zeros.
FASTCONV_INLINE int64_t table_width(const DepthwisePass& pass) {
  return (round_up(pass.grid.w, kTileColumns) - 1) * pass.step.w + pass.column_reach.last - pass.column_reach.first + 1;
}

/// Fetches what the next tile is the first to read: the last rows of its window, upwards from `table`. Within a tile,
/// pixels alternate every few instructions, and prefetchers of CPUs lose the thread where pixels are several cache
/// lines wide.
template <class X>
FASTCONV_INLINE void prefetch_tile(const X* const* table, int64_t width, int64_t rows, int64_t columns,
                                   int64_t channels, const X* zeros) {
  constexpr int64_t kLine = 64 / sizeof(X);
  for (int64_t r = 0; r < rows; ++r, table -= width)
    for (int64_t e = 0; e < columns; ++e) {
      if (table[e] == zeros) continue;
      for (int64_t c = 0; c < channels; c += kLine) __builtin_prefetch(table[e] + c);
    }
}

/// A part of one image: grid rows [begin, end), filters [c_begin, c_end), all phases.
struct ChannelPart {
  int64_t begin, end, c_begin, c_end;
};

/// `y` and `residual` point at the image's row 0. Rows are the outer loop: x and y are then read and written in the
/// order in which they lie, which is what prefetchers understand.
template <class X, class Y>
void convolve_part(const DepthwisePass& pass, const ChannelImage<X>& image, const acc_t<X>* weights, Y* y,
                   const Y* residual, const ChannelPart& part, const ChannelScratch<X>& scratch) {
  using Acc = acc_t<X>;
  const Size2 phases = pass.phases, size = pass.y_size, step = pass.step;
  const int64_t filters = pass.filters, first_row = part.begin * step.h + pass.row_reach.first;
  const int64_t first_column = pass.column_reach.first, width = table_width(pass);
  const int64_t x_rows = (part.end - 1 - part.begin) * step.h + pass.row_reach.last - pass.row_reach.first + 1;
  point_at_window(image, scratch.zeros, first_row, x_rows, first_column, width, scratch.table);
  const int64_t pixel_bytes = (part.c_end - part.c_begin) * static_cast<int64_t>(sizeof(X));
  const bool streams = pixel_bytes >= 256 && pixel_bytes * image.size.w * pass.kernel.h > 32 * 1024;
  ChannelTile<X, Y> tile{};
  tile.step = step.w;
  tile.y_column = phases.w * filters;
  tile.c_begin = part.c_begin, tile.c_end = part.c_end;
  tile.scale = static_cast<const Acc*>(pass.epilogue.scale);
  tile.shift = static_cast<const Acc*>(pass.epilogue.shift);
  tile.activation = pass.epilogue.activation;
  for (int64_t row = part.begin * phases.h; row < min_of(part.end * phases.h, size.h); ++row) {
    const AxisTaps& rows = pass.row_taps[row % phases.h];
    const X** x_row = scratch.table;
    if (rows.count > 0) x_row += (row / phases.h * step.h + rows.offset - first_row) * width;
    tile.tap_rows = rows.count;
    tile.x_pitch = rows.spacing * width;
    tile.weight_row = rows.tap_step * pass.kernel.w * filters;
    for (int64_t j = 0; j < pass.grid.w; j += kTileColumns) {
      const int64_t next = (j + kTileColumns) * step.w;
      if (streams && rows.count > 0 && row % phases.h == 0 && next < width)
        prefetch_tile<X>(x_row + (rows.count - 1) * tile.x_pitch + next, width, min_of(step.h, rows.count),
                         min_of(kTileColumns * step.w, width - next), part.c_end - part.c_begin, scratch.zeros);
      for (int64_t b = 0; b < phases.w && b + j * phases.w < size.w; ++b) {
        const AxisTaps& columns = pass.column_taps[b];
        const int64_t offset = (row * size.w + b + j * phases.w) * filters;
        tile.columns = min_of(kTileColumns, (size.w - b + phases.w - 1) / phases.w - j);
        tile.spacing = columns.spacing;
        tile.tap_columns = columns.count;
        tile.x = x_row + j * step.w + (columns.count > 0 ? columns.offset - first_column : 0);
        tile.weights = weights + (rows.tap * pass.kernel.w + columns.tap) * filters;
        tile.weight_column = columns.tap_step * filters;
        tile.y = y + offset;
        tile.residual = residual ? residual + offset : nullptr;
        channel_kernel<X, Y>(columns.count, columns.spacing, step.w, part.c_end - part.c_begin)(tile);
      }
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
  int64_t block, blocks;             // of filters
  int64_t rows_per_task, row_tasks;  // of the grid: at most that many rows, spread evenly
  int64_t table_elements;
  int64_t repeated_elements;  // of x or y, for a channel multiplier

  ChannelLanesPlan(const DepthwisePass& pass, int64_t lanes, int64_t element_bytes) {
    constexpr int64_t kTaskWork = 262144;
    const int64_t wanted = channels_per_block(pass.kernel.h * pass.x_size.w * element_bytes);
    // With a multiplier, channels are repeated for whole rows of x at once, so one block takes them all.
    blocks = pass.filters == pass.channels ? ceil_div(pass.filters, wanted) : 1;
    block = round_up(ceil_div(pass.filters, blocks), lanes);
    blocks = ceil_div(pass.filters, block);
    const int64_t row_work = pass.grid.w * pass.x_planes * pass.kernel.h * pass.kernel.w * block;
    row_tasks = ceil_div(pass.grid.h, max_of(1, kTaskWork / max_of(row_work, 1)));
    share_rows(pass.n, pass.grid.h, thread_count());
    rows_per_task = ceil_div(pass.grid.h, row_tasks);
    const AxisReach& rows = pass.row_reach;
    const int64_t x_rows = (rows_per_task - 1) * pass.step.h + rows.last - rows.first + 1;
    const int64_t y_rows = rows_per_task * pass.phases.h;
    table_elements = x_rows * table_width(pass);
    repeated_elements = pass.filters * (pass.gradient ? y_rows * pass.y_size.w : x_rows * pass.x_size.w);
    if (pass.filters == pass.channels) repeated_elements = 0;
  }

 private:
  /// Equal shares for the threads, as nearly as rows can be; of whole images or rows where these are enough, as the
  /// layers around have it: what a thread reads is then in its own cache, because it wrote it.
  void share_rows(int64_t images, int64_t rows, int64_t threads) {
    constexpr int64_t kFewestRows = 3;
    for (int64_t tasks = row_tasks; tasks <= rows / kFewestRows; ++tasks)
      if (images * tasks % threads == 0) {
        row_tasks = tasks;
        return;
      }
    const int64_t others = images * blocks;
    while (row_tasks < rows && others * row_tasks % threads != 0 && others * row_tasks < 16 * threads) ++row_tasks;
  }
};

/// One task. Blocks are numbered before row tasks, and these before images.
template <class T>
void run_channel_task(const DepthwisePass& pass, const ChannelLanesPlan& plan, const acc_t<T>* weights, int64_t task,
                      const void** table, const void* zeros, acc_t<T>* repeated) {
  using Acc = acc_t<T>;
  const Size2 x_size = pass.x_size, y_size = pass.y_size;
  const int64_t multiplier = pass.filters / pass.channels, n = task / plan.blocks / plan.row_tasks;
  const int64_t row_task = task / plan.blocks % plan.row_tasks;
  ChannelPart part{};
  part.begin = row_task * pass.grid.h / plan.row_tasks;
  part.end = (row_task + 1) * pass.grid.h / plan.row_tasks;
  part.c_begin = task % plan.blocks * plan.block;
  part.c_end = min_of(pass.filters, part.c_begin + plan.block);
  // A last block of less than a vector reaches back over its neighbour, if there is one.
  part.c_begin = max_of(0, min_of(part.c_begin, pass.filters - simd::kLanes<Acc>));
  const int64_t x_channels = pass.channels * pass.x_planes, y_channels = pass.channels * pass.y_planes;
  const int64_t y_start = n * y_size.h * y_size.w * y_channels, y_row = y_size.w * y_channels;
  const ChannelImage<T> image{static_cast<const T*>(pass.x) + n * x_size.h * x_size.w * x_channels, x_size, x_channels};
  T* y = static_cast<T*>(pass.y) + y_start;
  const ChannelScratch<T> scratch{reinterpret_cast<const T**>(table), static_cast<const T*>(zeros)};
  const T* residual = pass.epilogue.residual ? static_cast<const T*>(pass.epilogue.residual) + y_start : nullptr;
  if (multiplier == 1) {
    convolve_part<T, T>(pass, image, weights, y, residual, part, scratch);
  } else if (!pass.gradient) {
    const int64_t first = min_of(max_of(0, part.begin * pass.step.h + pass.row_reach.first), x_size.h);
    const int64_t last = max_of(first, min_of(x_size.h, (part.end - 1) * pass.step.h + pass.row_reach.last + 1));
    repeat_channels(image, first, last, multiplier, repeated);
    const ChannelImage<Acc> wide{repeated - first * x_size.w * pass.filters, x_size, pass.filters};
    const ChannelScratch<Acc> wide_scratch{reinterpret_cast<const Acc**>(table), static_cast<const Acc*>(zeros)};
    convolve_part<Acc, T>(pass, wide, weights, y, residual, part, wide_scratch);
  } else {
    const int64_t first = part.begin * pass.phases.h, last = min_of(y_size.h, part.end * pass.phases.h);
    Acc* wide = repeated - first * y_size.w * pass.filters;
    convolve_part<T, Acc>(pass, image, weights, wide, nullptr, part, scratch);
    sum_repeated_channels<T>(repeated, (last - first) * y_row, multiplier, y + first * y_row);
  }
}

template <class T>
void convolve_channel_lanes(const DepthwisePass& pass) {
  using Acc = acc_t<T>;
  constexpr int64_t kBytes = sizeof(Acc), kPointerBytes = sizeof(void*);
  const ChannelLanesPlan plan(pass, simd::kLanes<Acc>, sizeof(T));
  const int64_t taps = pass.kernel.h * pass.kernel.w, filters = pass.filters;
  Scratch packed(tap_major_rows<Acc>(taps) * filters * kBytes);
  pack_tap_major(static_cast<const T*>(pass.weight), filters, taps, packed.as<Acc>());
  parallel_for(0, pass.n * plan.blocks * plan.row_tasks, 1, [&](int64_t begin, int64_t end) {
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
