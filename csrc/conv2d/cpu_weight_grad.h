// The weight gradient as implicit GEMM: rows of a tile are output channels, columns are (input channel, tap) pairs, and
// the depth runs over pixels.
//
// A task owns a range of columns and one share of the (image, pixel) range, and keeps that part of the gradient in its
// own sums. Shares are added in order at the end, and their number depends on the problem alone: results do not change
// from run to run, nor with the number of threads.
#pragma once

#include "conv2d/cpu_pack.h"

namespace fastconv {
namespace {

struct WeightGradPlan {
  int64_t columns;  // c * taps
  int64_t panels, panels_per_task, panel_tasks;
  int64_t chunk, chunks_per_image, chunks;  // pixels reduced at a time, within one image
  int64_t shares;

  WeightGradPlan(const GemmWeightGrad& p, int64_t tile_columns) {
    constexpr int64_t kChunk = 256, kPanelsPerTask = 8, kTasks = 64;
    columns = p.c * p.tap_count;
    panels = ceil_div(columns, tile_columns);
    panels_per_task = min_of(panels, kPanelsPerTask);
    panel_tasks = ceil_div(panels, panels_per_task);
    chunks_per_image = ceil_div(p.i * p.j, kChunk);
    chunk = ceil_div(p.i * p.j, chunks_per_image);
    chunks = p.n * chunks_per_image;
    // A share is worth its own sums only if it has more products to add than sums to keep.
    const int64_t worthwhile = max_of(1, p.n * p.i * p.j / 512);
    shares = min_of(min_of(ceil_div(kTasks, p.groups * panel_tasks), chunks), worthwhile);
  }
};

/// One panel for pixels [begin, end) of an image: panel[pixel][lane] = x at (pixel, column first + lane).
template <class T>
void pack_columns(const GemmWeightGrad& p, const T* image, int64_t first, int64_t begin, int64_t end, acc_t<T>* panel) {
  using Acc = acc_t<T>;
  constexpr int64_t kColumns = kTileColumns<Acc>;
  const int64_t live = min_of(kColumns, p.c * p.tap_count - first);
  int64_t dh[kColumns], dw[kColumns], offset[kColumns];
  bool one_tap = p.layout == Layout::nhwc && live == kColumns && first / p.c == (first + live - 1) / p.c;
  for (int64_t lane = 0; lane < live; ++lane) {
    const int64_t column = first + lane;
    const int64_t c = p.layout == Layout::nchw ? column / p.tap_count : column % p.c;
    const Tap& tap = p.taps[p.layout == Layout::nchw ? column % p.tap_count : column / p.c];
    dh[lane] = tap.dh;
    dw[lane] = tap.dw;
    offset[lane] = c * p.x_strides.c + tap.dh * p.x_strides.h + tap.dw * p.x_strides.w;
  }
  for (int64_t pixel = begin; pixel < end; ++pixel, panel += kColumns) {
    const int64_t row = pixel / p.j * p.step.h, column = pixel % p.j * p.step.w;
    const T* x = image + row * p.x_strides.h + column * p.x_strides.w;
    if (one_tap) {
      const bool reads = inside(row + dh[0], p.h) && inside(column + dw[0], p.w);
      for (int64_t lane = 0; lane < kColumns; lane += simd::kLanes<Acc>)
        simd::store<Acc>(panel + lane, reads ? simd::load(x + offset[0] + lane) : simd::zero<Acc>());
      continue;
    }
    for (int64_t lane = 0; lane < live; ++lane)
      panel[lane] =
          inside(row + dh[lane], p.h) && inside(column + dw[lane], p.w) ? simd::widen(x[offset[lane]]) : Acc(0);
    for (int64_t lane = live; lane < kColumns; ++lane) panel[lane] = Acc(0);
  }
}

/// grad_y for pixels [begin, end) of an image as rows of channels: rows[m][pixel].
template <class T>
void pack_gradient_rows(const GemmWeightGrad& p, const T* grad, int64_t begin, int64_t end, acc_t<T>* rows) {
  const int64_t length = end - begin;
  for (int64_t m = 0; m < p.m; ++m)
    for (int64_t pixel = begin; pixel < end; ++pixel)
      rows[m * length + pixel - begin] = simd::widen(
          grad[m * p.grad_y_strides.c + pixel / p.j * p.grad_y_strides.h + pixel % p.j * p.grad_y_strides.w]);
}

/// Adds one chunk of pixels to the sums of panels [panel_begin, panel_end): sums[panel][m][kTileColumns].
template <class T>
void add_chunk(const GemmWeightGrad& p, const WeightGradPlan& plan, int64_t group, int64_t chunk, int64_t panel_begin,
               int64_t panel_end, acc_t<T>* packed_x, acc_t<T>* packed_grad, acc_t<T>* sums) {
  using Acc = acc_t<T>;
  constexpr int64_t kColumns = kTileColumns<Acc>;
  const int64_t n = chunk / plan.chunks_per_image, begin = chunk % plan.chunks_per_image * plan.chunk;
  const int64_t end = min_of(p.i * p.j, begin + plan.chunk), depth = end - begin;
  if (depth <= 0) return;
  const T* x = static_cast<const T*>(p.x) + n * p.x_strides.n + group * p.c * p.x_strides.c;
  const T* grad = static_cast<const T*>(p.grad_y) + n * p.grad_y_strides.n + group * p.m * p.grad_y_strides.c;
  // Gradients of accumulator type are read in place: NCHW has pixels side by side, NHWC has channels.
  const bool in_place = sizeof(T) == sizeof(Acc);
  const bool by_channel = in_place && p.layout == Layout::nhwc;
  if (!in_place) pack_gradient_rows<T>(p, grad, begin, end, packed_grad);
  const Acc* a = in_place ? reinterpret_cast<const Acc*>(grad) + begin * p.grad_y_strides.w : packed_grad;
  const int64_t a_stride = !in_place ? depth : by_channel ? p.grad_y_strides.w : p.grad_y_strides.c;
  for (int64_t panel = panel_begin; panel < panel_end; ++panel)
    pack_columns<T>(p, x, panel * kColumns, begin, end, packed_x + (panel - panel_begin) * depth * kColumns);
  for (int64_t m = 0; m < p.m; m += kTileRows) {
    const int64_t rows = min_of(kTileRows, p.m - m);
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const int64_t columns = min_of(kColumns, plan.columns - panel * kColumns);
      Acc* tile = sums + ((panel - panel_begin) * p.m + m) * kColumns;
      const Acc* b = packed_x + (panel - panel_begin) * depth * kColumns;
      if (by_channel) kTiles<Acc, Rows::row_contiguous>.at(rows, columns)(a + m, a_stride, b, depth, tile, tile);
      else kTiles<Acc, Rows::depth_contiguous>.at(rows, columns)(a + m * a_stride, a_stride, b, depth, tile, tile);
    }
  }
}

template <class T>
void weight_grad_tiled(const GemmWeightGrad& p) {
  using Acc = acc_t<T>;
  constexpr int64_t kColumns = kTileColumns<Acc>, kBytes = sizeof(Acc);
  const WeightGradPlan plan(p, kColumns);
  const int64_t group_sums = plan.panels * p.m * kColumns, share_sums = p.groups * group_sums;
  Scratch all_sums(plan.shares * share_sums * kBytes);

  parallel_for(0, plan.shares * p.groups * plan.panel_tasks, 1, [&](int64_t task_begin, int64_t task_end) {
    Scratch packed_x(plan.panels_per_task * plan.chunk * kColumns * kBytes);
    Scratch packed_grad(sizeof(T) == sizeof(Acc) ? 0 : p.m * plan.chunk * kBytes);
    for (int64_t task = task_begin; task < task_end; ++task) {
      const int64_t part = task % plan.panel_tasks, group = task / plan.panel_tasks % p.groups;
      const int64_t share = task / plan.panel_tasks / p.groups;
      const int64_t panel_begin = part * plan.panels_per_task;
      const int64_t panel_end = min_of(plan.panels, panel_begin + plan.panels_per_task);
      Acc* sums = all_sums.as<Acc>() + share * share_sums + group * group_sums + panel_begin * p.m * kColumns;
      std::memset(sums, 0, static_cast<size_t>((panel_end - panel_begin) * p.m * kColumns * kBytes));
      for (int64_t chunk = plan.chunks * share / plan.shares; chunk < plan.chunks * (share + 1) / plan.shares; ++chunk)
        add_chunk<T>(p, plan, group, chunk, panel_begin, panel_end, packed_x.as<Acc>(), packed_grad.as<Acc>(), sums);
    }
  });

  parallel_for(0, p.groups * p.m, ceil_div(16384, plan.columns * plan.shares), [&](int64_t begin, int64_t end) {
    for (int64_t channel = begin; channel < end; ++channel)
      for (int64_t column = 0; column < plan.columns; ++column) {
        const Acc* sums = all_sums.as<Acc>() + channel / p.m * group_sums +
                          (column / kColumns * p.m + channel % p.m) * kColumns + column % kColumns;
        Acc total = sums[0];
        for (int64_t share = 1; share < plan.shares; ++share) total += sums[share * share_sums];
        static_cast<T*>(p.grad_weight)[channel * plan.columns + column] = simd::narrow<T>(total);
      }
  });
}

}  // namespace
}  // namespace fastconv
