// The forward pass and the input gradient for NCHW: a task stages the rows that a strip of one plane needs, runs a row
// kernel over them and, for the gradient of a strided convolution, weaves the phases of a row together.
#pragma once

#include "depthwise/cpu_row_kernels.h"

namespace fastconv {
namespace {

struct RowLanesPlan {
  Size2 grid;  // positions per phase, of the largest phase
  AxisReach row_reach, column_reach;
  StageShape shape;
  int64_t strip_rows, strips;  // of the grid
  int64_t staged_rows, plane_pitch;

  /// `columns`: at least how many positions of a row kernels read.
  RowLanesPlan(const DepthwisePass& pass, int64_t lanes, int64_t element_bytes, int64_t columns = 0)
      : grid{ceil_div(pass.y_size().h, pass.phases().h), ceil_div(pass.y_size().w, pass.phases().w)},
        row_reach(pass.row_reach()),
        column_reach(pass.column_reach()),
        shape(pass.step().w, column_reach, max_of(grid.w, columns), lanes) {
    constexpr int64_t kStripBytes = 16 * 1024;  // half of a 32 KiB L1
    const int64_t step = pass.step().h, extent = row_reach.last - row_reach.first + 1;
    const int64_t fitting = kStripBytes / (shape.pitch * element_bytes * pass.x_planes());
    // A strip stages `extent - step` rows more than its own: at least as many rows of its own keep that in bounds.
    const int64_t least = max_of(4, round_up(extent / step, 4));
    strips = ceil_div(grid.h, max_of(least, (fitting - extent) / step + 1));
    strip_rows = round_up(ceil_div(grid.h, strips), 4);
    strips = ceil_div(grid.h, strip_rows);
    staged_rows = (min_of(strip_rows, grid.h) - 1) * step + extent;
    plane_pitch = staged_rows * shape.pitch;
  }
};

/// Memory of one thread.
template <class T>
struct RowLanesScratch {
  acc_t<T>* staged;
  acc_t<T>* weights;
  acc_t<T>* phase_rows;
  int64_t* column_offsets;
};

/// Merges `phases` rows into one: y[j * phases + b] = rows[b * pitch + j].
template <class T>
void weave_row(const acc_t<T>* rows, int64_t pitch, int64_t phases, T* y, int64_t width) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  int64_t i = 0;
  if (phases == 2)
    for (; i + 2 * kLane <= width; i += 2 * kLane) {
      const auto even = simd::load(rows + i / 2), odd = simd::load(rows + pitch + i / 2);
      simd::store<T>(y + i, interleave_low<Acc>(even, odd));
      simd::store<T>(y + i + kLane, interleave_high<Acc>(even, odd));
    }
  for (; i < width; ++i) y[i] = simd::narrow<T>(rows[i % phases * pitch + i / phases]);
}

/// One strip of one plane of y. Grid rows [begin, end).
template <class T>
struct StripOfPlane {
  using Acc = acc_t<T>;
  const DepthwisePass& pass;
  const RowLanesPlan& plan;
  const RowLanesScratch<T>& scratch;
  int64_t begin, end;
  const T* weight;   // of the first plane of x that this plane of y reads
  RowOutput<T> out;  // y and residual at the plane's start

  /// Row kernels for phase (a, b) see the staged rows through this.
  StagedWindow<Acc> window(const AxisTaps& rows, const AxisTaps& columns) const {
    const ConvProblem& p = pass.problem;
    Acc* packed = scratch.weights;
    for (int64_t plane = 0; plane < pass.x_planes(); ++plane)
      for (int64_t r = 0; r < rows.count; ++r)
        for (int64_t s = 0; s < columns.count; ++s)
          *packed++ = simd::widen(
              weight[(plane * p.r + rows.tap + r * rows.tap_step) * p.s + columns.tap + s * columns.tap_step]);
    for (int64_t s = 0; s < columns.count; ++s)
      scratch.column_offsets[s] = plan.shape.column(columns.offset + s * columns.spacing);
    return {scratch.staged + (rows.count > 0 ? rows.offset - plan.row_reach.first : 0) * plan.shape.pitch,
            plan.shape.pitch,
            plan.plane_pitch,
            pass.x_planes(),
            pass.step().h,
            rows.spacing,
            rows.count,
            columns.count,
            scratch.column_offsets,
            scratch.weights};
  }

  void run() {
    const Size2 phases = pass.phases(), size = pass.y_size();
    for (int64_t a = 0; a < phases.h; ++a) {
      const int64_t rows = min_of(end, ceil_div(size.h - a, phases.h)) - begin;
      if (rows <= 0) continue;
      const AxisTaps row_taps = pass.row_taps(a);
      const int64_t first = (a + begin * phases.h) * size.w;
      if (phases.w == 1) {
        RowOutput<T> direct = out;
        direct.y += first;
        if (direct.residual) direct.residual += first;
        direct.pitch = phases.h * size.w;
        // Rows of one phase are not neighbours, so nothing would repair what spills.
        if (phases.h > 1) direct.limit = direct.y;
        const auto staged = window(row_taps, pass.column_taps(0));
        (direct.plain() ? row_kernel<T, true>(staged) : row_kernel<T, false>(staged))(staged, direct, rows, size.w);
        continue;
      }
      const int64_t pitch = round_up(plan.grid.w, simd::kLanes<Acc>);
      for (int64_t b = 0; b < min_of(phases.w, size.w); ++b) {
        const auto staged = window(row_taps, pass.column_taps(b));
        RowOutput<Acc> row_output{};
        row_output.y = scratch.phase_rows + b * pitch;
        row_output.pitch = phases.w * pitch;
        row_output.limit = scratch.phase_rows + phases.w * pitch * plan.strip_rows;
        row_kernel<Acc, true>(staged)(staged, row_output, rows, ceil_div(size.w - b, phases.w));
      }
      for (int64_t row = 0; row < rows; ++row)
        weave_row<T>(scratch.phase_rows + row * phases.w * pitch, pitch, phases.w,
                     out.y + first + row * phases.h * size.w, size.w);
    }
  }
};

/// All planes of y that one strip of one image and input channel leads to.
template <class T>
void run_strip(const DepthwisePass& pass, const RowLanesPlan& plan, const RowLanesScratch<T>& scratch, int64_t task,
               const T* chunk_limit) {
  using Acc = acc_t<T>;
  const ConvProblem& p = pass.problem;
  const int64_t strip = task % plan.strips, plane = task / plan.strips;  // plane: image and input channel
  const Size2 x_size = pass.x_size(), y_size = pass.y_size();
  const int64_t begin = strip * plan.strip_rows, end = min_of(plan.grid.h, begin + plan.strip_rows);
  const int64_t first = begin * pass.step().h + plan.row_reach.first;
  const int64_t count = (end - 1 - begin) * pass.step().h + plan.row_reach.last - plan.row_reach.first + 1;
  for (int64_t i = 0; i < pass.x_planes(); ++i)
    stage_rows<T>(plan.shape, static_cast<const T*>(pass.x) + (plane * pass.x_planes() + i) * x_size.h * x_size.w,
                  x_size, first, count, scratch.staged + i * plan.plane_pitch);
  for (int64_t i = 0; i < pass.y_planes(); ++i) {
    const int64_t y_plane = plane * pass.y_planes() + i, y_channels = p.c * pass.y_planes();
    const int64_t channel = y_plane % y_channels, start = y_plane * y_size.h * y_size.w;
    const int64_t filter = channel * pass.x_planes();
    const Epilogue& e = pass.epilogue;
    RowOutput<T> out{};
    out.y = static_cast<T*>(pass.y) + start;
    out.limit = plan.strips == 1 || pass.y_planes() == 1 ? chunk_limit : out.y + end * y_size.w;
    out.residual = e.residual ? static_cast<const T*>(e.residual) + start : nullptr;
    out.scale = e.scale ? static_cast<const Acc*>(e.scale) + channel : nullptr;
    out.shift = e.shift ? static_cast<const Acc*>(e.shift) + channel : nullptr;
    out.activation = e.activation;
    StripOfPlane<T>{pass, plan, scratch, begin, end, static_cast<const T*>(pass.weight) + filter * p.r * p.s, out}
        .run();
  }
}

template <class T>
void convolve_row_lanes(const DepthwisePass& pass) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>, kBytes = sizeof(Acc), kOffsetBytes = sizeof(int64_t);
  const ConvProblem& p = pass.problem;
  const RowLanesPlan plan(pass, kLane, kBytes);
  const Size2 y_size = pass.y_size();
  const int64_t strip_elements = plan.strip_rows * pass.phases().h * y_size.w * pass.y_planes();
  const int64_t grain = ceil_div(8192, strip_elements);
  parallel_for(0, p.n * p.c * plan.strips, grain, [&](int64_t begin, int64_t end) {
    Scratch staged((pass.x_planes() * plan.plane_pitch + kLane) * kBytes),
        weights(pass.x_planes() * p.r * p.s * kBytes);
    Scratch phase_rows(plan.strip_rows * pass.phases().w * round_up(plan.grid.w, kLane) * kBytes);
    Scratch offsets(p.s * kOffsetBytes);
    const RowLanesScratch<T> scratch{staged.as<Acc>(), weights.as<Acc>(), phase_rows.as<Acc>(), offsets.as<int64_t>()};
    const int64_t plane_elements = pass.y_planes() * y_size.h * y_size.w;
    const int64_t rows_end = min_of(y_size.h, end % plan.strips * plan.strip_rows);
    const T* limit = static_cast<const T*>(pass.y) + end / plan.strips * plane_elements + rows_end * y_size.w;
    for (int64_t task = begin; task < end; ++task) run_strip<T>(pass, plan, scratch, task, limit);
  });
}

}  // namespace
}  // namespace fastconv
