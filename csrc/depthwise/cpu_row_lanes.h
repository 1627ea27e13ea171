// The forward pass and the input gradient for NCHW: a task stages the rows that a strip of one plane needs, runs a row
// kernel over them and, for the gradient of a strided convolution, weaves the phases of a row together.
#pragma once

#include "depthwise/cpu_weave_kernels.h"

namespace fastconv {
namespace {

template <class T>
struct RowLanesPlan {
  StageShape shape;
  int64_t strip_rows, strips;  // of the grid
  int64_t staged_rows, plane_pitch;
  int64_t phase_pitch;            // between the rows of a phase before they are woven together
  const int64_t* column_offsets;  // of each phase, kernel.w of them
  WeaveKernel<T> weave;           // null if there is none for this pass

  /// `columns`: at least how many positions of a row kernels read.
  RowLanesPlan(const DepthwisePass& pass, int64_t columns, int64_t* offsets)
      : shape(pass.step.w, pass.column_reach, columns, simd::kLanes<acc_t<T>>),
        column_offsets(offsets),
        weave(weave_kernel<T>(pass)) {
    constexpr int64_t kStripBytes = 16 * 1024;  // half of a 32 KiB L1
    const int64_t step = pass.step.h, extent = pass.row_reach.last - pass.row_reach.first + 1;
    const int64_t fitting = kStripBytes / (shape.pitch * static_cast<int64_t>(sizeof(acc_t<T>)) * pass.x_planes);
    // A strip stages `extent - step` rows more than its own: at least as many rows of its own keep that in bounds.
    const int64_t least = max_of(4, round_up(extent / step, 4));
    strips = ceil_div(pass.grid.h, max_of(least, (fitting - extent) / step + 1));
    strip_rows = round_up(ceil_div(pass.grid.h, strips), 4);
    strips = ceil_div(pass.grid.h, strip_rows);
    staged_rows = (min_of(strip_rows, pass.grid.h) - 1) * step + extent;
    plane_pitch = staged_rows * shape.pitch;
    phase_pitch = round_up(pass.grid.w, simd::kLanes<acc_t<T>>);
    for (int64_t b = 0; b < pass.phases.w; ++b) {
      const AxisTaps& taps = pass.column_taps[b];
      for (int64_t s = 0; s < taps.count; ++s)
        offsets[b * pass.kernel.w + s] = shape.column(taps.offset + s * taps.spacing);
    }
  }
};

/// Memory of one thread.
template <class T>
struct RowLanesScratch {
  acc_t<T>* staged;
  acc_t<T>* weights;
  acc_t<T>* phase_rows;
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
  const RowLanesPlan<T>& plan;
  const RowLanesScratch<T>& scratch;
  int64_t begin, end;
  const T* weight;   // of the first plane of x that this plane of y reads
  RowOutput<T> out;  // y and residual at the plane's start

  /// The weights of phase (a, b) in the order of its taps, written to `packed` unless they lie that way already.
  FASTCONV_INLINE const Acc* phase_weights(int64_t a, int64_t b, Acc* packed) const {
    const AxisTaps &rows = pass.row_taps[a], &columns = pass.column_taps[b];
    const T* source = weight + rows.tap * pass.kernel.w + columns.tap;
    if (sizeof(T) == sizeof(Acc) && !pass.gradient) return reinterpret_cast<const Acc*>(source);
    const Acc* result = packed;
    for (int64_t plane = 0; plane < pass.x_planes; ++plane, source += pass.kernel.h * pass.kernel.w)
      for (int64_t r = 0; r < rows.count; ++r)
        for (int64_t s = 0; s < columns.count; ++s)
          *packed++ = simd::widen(source[r * rows.tap_step * pass.kernel.w + s * columns.tap_step]);
    return result;
  }

  /// What row kernels see of phase (a, b).
  FASTCONV_INLINE StagedWindow<Acc> window(int64_t a, int64_t b) const {
    const AxisTaps &rows = pass.row_taps[a], &columns = pass.column_taps[b];
    const int64_t first_row = rows.count > 0 ? rows.offset - pass.row_reach.first : 0;
    return {scratch.staged + first_row * plan.shape.pitch,
            plan.shape.pitch,
            plan.plane_pitch,
            pass.x_planes,
            pass.step.h,
            rows.spacing,
            rows.count,
            columns.count,
            plan.column_offsets + b * pass.kernel.w,
            phase_weights(a, b, scratch.weights)};
  }

  FASTCONV_INLINE void weave(WeaveKernel<T> kernel) const {
    WovenWindow<Acc> window{scratch.staged, plan.shape.pitch, {}, {}, {}};
    Acc* packed = scratch.weights;
    for (int a = 0; a < 2; ++a) {
      window.first_row[a] = pass.row_taps[a].offset - pass.row_reach.first;
      window.column_offsets[a] = plan.column_offsets + a * pass.kernel.w;
      for (int b = 0; b < 2; ++b) {
        window.weights[a][b] = phase_weights(a, b, packed);
        packed += pass.row_taps[a].count * pass.column_taps[b].count;
      }
    }
    RowOutput<T> rows = out;
    rows.y += 2 * begin * pass.y_size.w;
    kernel(window, rows, min_of(2 * end, pass.y_size.h) - 2 * begin, pass.y_size.w);
  }

  FASTCONV_INLINE void run() const {
    const Size2 phases = pass.phases, size = pass.y_size;
    if (plan.weave != nullptr) return weave(plan.weave);
    for (int64_t a = 0; a < phases.h; ++a) {
      const int64_t rows = min_of(end, (size.h - a + phases.h - 1) / phases.h) - begin;
      if (rows <= 0) continue;
      if (phases.w > 1) {
        run_phases(a, rows);
        continue;
      }
      const int64_t first = (a + begin * phases.h) * size.w;
      RowOutput<T> direct = out;
      direct.y += first;
      if (direct.residual) direct.residual += first;
      direct.pitch = phases.h * size.w;
      // Rows of one phase are not neighbours, so nothing would repair what spills.
      if (phases.h > 1) direct.limit = direct.y;
      const auto staged = window(a, 0);
      (direct.plain() ? row_kernel<T, true>(staged) : row_kernel<T, false>(staged))(staged, direct, rows, size.w);
    }
  }

  void run_phases(int64_t a, int64_t rows) const {
    const Size2 phases = pass.phases, size = pass.y_size;
    const int64_t pitch = plan.phase_pitch;
    for (int64_t b = 0; b < min_of(phases.w, size.w); ++b) {
      const auto staged = window(a, b);
      RowOutput<Acc> row_output{};
      row_output.y = scratch.phase_rows + b * pitch;
      row_output.pitch = phases.w * pitch;
      row_output.limit = scratch.phase_rows + phases.w * pitch * plan.strip_rows;
      row_kernel<Acc, true>(staged)(staged, row_output, rows, ceil_div(size.w - b, phases.w));
    }
    T* y = out.y + (a + begin * phases.h) * size.w;
    for (int64_t row = 0; row < rows; ++row)
      weave_row<T>(scratch.phase_rows + row * phases.w * pitch, pitch, phases.w, y + row * phases.h * size.w, size.w);
  }
};

/// All planes of y that one strip of one image and input channel leads to. `plane`: image and input channel.
template <class T>
FASTCONV_INLINE void run_strip(const DepthwisePass& pass, const RowLanesPlan<T>& plan,
                               const RowLanesScratch<T>& scratch, int64_t plane, int64_t strip, const T* chunk_limit) {
  using Acc = acc_t<T>;
  const Size2 x_size = pass.x_size, y_size = pass.y_size;
  const int64_t begin = strip * plan.strip_rows, end = min_of(pass.grid.h, begin + plan.strip_rows);
  const int64_t first = begin * pass.step.h + pass.row_reach.first;
  const int64_t count = (end - 1 - begin) * pass.step.h + pass.row_reach.last - pass.row_reach.first + 1;
  const T* x = static_cast<const T*>(pass.x) + plane * pass.x_planes * x_size.h * x_size.w;
  for (int64_t i = 0; i < pass.x_planes; ++i)
    stage_rows<T>(plan.shape, x + i * x_size.h * x_size.w, x_size, first, count, plan.strips == 1,
                  scratch.staged + i * plan.plane_pitch);
  const int64_t first_filter = plane % pass.channels * (pass.filters / pass.channels);
  for (int64_t i = 0; i < pass.y_planes; ++i) {
    const int64_t start = (plane * pass.y_planes + i) * y_size.h * y_size.w, filter = first_filter + i;
    const Epilogue& e = pass.epilogue;
    RowOutput<T> out{};
    out.y = static_cast<T*>(pass.y) + start;
    out.limit = plan.strips == 1 || pass.y_planes == 1 ? chunk_limit : out.y + end * y_size.w;
    out.residual = e.residual ? static_cast<const T*>(e.residual) + start : nullptr;
    out.scale = e.scale ? static_cast<const Acc*>(e.scale) + filter : nullptr;
    out.shift = e.shift ? static_cast<const Acc*>(e.shift) + filter : nullptr;
    out.activation = e.activation;
    const T* weight = static_cast<const T*>(pass.weight) + filter * pass.kernel.h * pass.kernel.w;
    StripOfPlane<T>{pass, plan, scratch, begin, end, weight, out}.run();
  }
}

template <class T>
void convolve_row_lanes(const DepthwisePass& pass) {
  using Acc = acc_t<T>;
  constexpr int64_t kBytes = sizeof(Acc), kOffsetBytes = sizeof(int64_t);
  Scratch offsets(pass.phases.w * pass.kernel.w * kOffsetBytes);
  const RowLanesPlan<T> plan(pass, pass.grid.w, offsets.as<int64_t>());
  const Size2 y_size = pass.y_size;
  const int64_t strip_elements = plan.strip_rows * pass.phases.h * y_size.w * pass.y_planes;
  parallel_for(
      0, pass.n * pass.channels * plan.strips, ceil_div(8192, strip_elements), [&](int64_t begin, int64_t end) {
        Scratch staged(pass.x_planes * plan.plane_pitch * kBytes);
        zero_elements(staged.as<Acc>(), pass.x_planes * plan.plane_pitch);
        Scratch weights(pass.x_planes * pass.kernel.h * pass.kernel.w * kBytes);
        Scratch phase_rows(plan.strip_rows * pass.phases.w * plan.phase_pitch * kBytes);
        const RowLanesScratch<T> scratch{staged.as<Acc>(), weights.as<Acc>(), phase_rows.as<Acc>()};
        const int64_t plane_elements = pass.y_planes * y_size.h * y_size.w;
        const int64_t rows_end = min_of(y_size.h, end % plan.strips * plan.strip_rows * pass.phases.h);
        const T* limit = static_cast<const T*>(pass.y) + end / plan.strips * plane_elements + rows_end * y_size.w;
        int64_t plane = begin / plan.strips, strip = begin % plan.strips;
        for (int64_t task = begin; task < end; ++task) {
          run_strip<T>(pass, plan, scratch, plane, strip, limit);
          if (++strip == plan.strips) strip = 0, ++plane;
        }
      });
}

}  // namespace
}  // namespace fastconv
