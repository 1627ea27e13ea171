// Packing: turns a window of the input into the panels that multiply_tile reads.
//
// A panel holds kTileColumns pixels side by side for every (channel, tap). For one tap the pixels of a panel lie in a
// few runs of consecutive elements (one per row of the map, cut where padding begins), so a tap is planned once and the
// plan is replayed for every channel: two masked vector loads and two stores per row of the panel in the common case.
#pragma once

#include "common/simd/simd.h"
#include "conv2d/cpu_naive.h"
#include "conv2d/cpu_tile.h"
#include "conv2d/gemm_conv.h"

namespace fastconv {
namespace {

/// The pixels of one panel: grid positions numbered n * I * J + i * J + j from `first`.
template <class Acc>
struct PanelPixels {
  int64_t count;                   // at most kTileColumns; the rest of the panel is zeros
  int64_t row[kTileColumns<Acc>];  // input row and column of tap (0, 0)
  int64_t column[kTileColumns<Acc>];
  int64_t x_offset[kTileColumns<Acc>];  // of that input element, if it were inside
  int64_t y_offset[kTileColumns<Acc>];
  bool y_contiguous;

  void locate(const GemmConv& p, int64_t first, int64_t total) {
    count = min_of(kTileColumns<Acc>, total - first);
    int64_t n = first / (p.i * p.j), i = first / p.j % p.i, j = first % p.j;
    y_contiguous = true;
    for (int64_t lane = 0; lane < count; ++lane) {
      row[lane] = i * p.step.h;
      column[lane] = j * p.step.w;
      x_offset[lane] = n * p.x_strides.n + row[lane] * p.x_strides.h + column[lane] * p.x_strides.w;
      y_offset[lane] = p.y_offset + n * p.y_strides.n + i * p.y_strides.h + j * p.y_strides.w;
      y_contiguous = y_contiguous && y_offset[lane] == y_offset[0] + lane;
      if (++j == p.j) {
        j = 0;
        if (++i == p.i) i = 0, ++n;
      }
    }
  }
};

/// Where one tap of one panel reads.
template <class T>
struct TapPlan {
  using Acc = acc_t<T>;
  static constexpr int kColumns = kTileColumns<Acc>;
  struct Run {
    int32_t lane, length;
    int64_t offset;
  };
  enum class Kind { empty, whole, runs, scattered };

  Kind kind;
  int64_t offset[kColumns];  // per lane, -1 outside
  Run runs[kColumns];
  int run_count;

  void plan(const GemmConv& p, const PanelPixels<Acc>& pixels, const Tap& tap) {
    const int64_t shift = tap.dh * p.x_strides.h + tap.dw * p.x_strides.w;
    run_count = 0;
    for (int lane = 0; lane < kColumns; ++lane) {
      const bool reads =
          lane < pixels.count && inside(pixels.row[lane] + tap.dh, p.h) && inside(pixels.column[lane] + tap.dw, p.w);
      offset[lane] = reads ? pixels.x_offset[lane] + shift : -1;
      if (!reads) continue;
      if (run_count > 0) {
        Run& last = runs[run_count - 1];
        if (last.lane + last.length == lane && last.offset + last.length == offset[lane]) {
          ++last.length;
          continue;
        }
      }
      runs[run_count++] = {lane, 1, offset[lane]};
    }
    if (run_count == 0) kind = Kind::empty;
    else if (run_count == 1 && runs[0].length == kColumns) kind = Kind::whole;
    else kind = run_count <= kColumns / 4 ? Kind::runs : Kind::scattered;
  }

  /// One row of the panel, from channel plane `x`.
  void copy(const T* x, Acc* target) const {
    constexpr int kLane = simd::kLanes<Acc>;
    switch (kind) {
      case Kind::whole:
        for (int v = 0; v < kTileVectors; ++v)
          simd::store<Acc>(target + v * kLane, simd::load(x + runs[0].offset + v * kLane));
        return;
      case Kind::empty:
        for (int v = 0; v < kTileVectors; ++v) simd::store<Acc>(target + v * kLane, simd::zero<Acc>());
        return;
      case Kind::runs:
        for (int v = 0; v < kTileVectors; ++v) simd::store<Acc>(target + v * kLane, simd::zero<Acc>());
        for (int r = 0; r < run_count; ++r) {
          const T* source = x + runs[r].offset;
          Acc* into = target + runs[r].lane;
          int64_t left = runs[r].length;
          for (; left >= kLane; left -= kLane, source += kLane, into += kLane)
            simd::store<Acc>(into, simd::load(source));
          if (left > 0) simd::store_first<Acc>(into, simd::load_first(source, left), left);
        }
        return;
      case Kind::scattered:
        for (int lane = 0; lane < kColumns; ++lane)
          target[lane] = offset[lane] < 0 ? Acc(0) : simd::widen(x[offset[lane]]);
        return;
    }
  }
};

/// Rows [c_begin, c_end) x taps of one panel, channel-major, as weights of Layout::nchw lie.
template <class T>
void pack_pixels(const GemmConv& p, const PanelPixels<acc_t<T>>& pixels, const T* x, int64_t c_begin, int64_t c_end,
                 acc_t<T>* panel) {
  TapPlan<T> plan;
  for (int64_t t = 0; t < p.tap_count; ++t) {
    plan.plan(p, pixels, p.taps[t]);
    for (int64_t c = c_begin; c < c_end; ++c)
      plan.copy(x + c * p.x_strides.c, panel + ((c - c_begin) * p.tap_count + t) * kTileColumns<acc_t<T>>);
  }
}

/// Weights as rows of accumulator type: (group, m, c, t) dense.
template <class T>
void pack_weight_rows(const GemmConv& p, acc_t<T>* rows) {
  const int64_t depth = p.c * p.tap_count;
  parallel_for(0, p.groups * p.m, ceil_div(16384, depth + 1), [&](int64_t begin, int64_t end) {
    for (int64_t channel = begin; channel < end; ++channel) {
      const T* weight =
          static_cast<const T*>(p.weight) + channel / p.m * p.weight_group_stride + channel % p.m * p.weight_m_stride;
      acc_t<T>* row = rows + channel * depth;
      for (int64_t c = 0; c < p.c; ++c)
        for (int64_t t = 0; t < p.tap_count; ++t)
          *row++ = simd::widen(weight[c * p.weight_c_stride + p.taps[t].weight_offset_elems]);
    }
  });
}

/// True if pack_weight_rows would copy the weights onto themselves.
template <class T>
bool weights_are_rows(const GemmConv& p) {
  if (sizeof(T) != sizeof(acc_t<T>)) return false;
  const int64_t depth = p.c * p.tap_count;
  if (p.weight_m_stride != depth || p.weight_c_stride != p.tap_count || p.weight_group_stride != p.m * depth)
    return false;
  for (int64_t t = 0; t < p.tap_count; ++t)
    if (p.taps[t].weight_offset_elems != t) return false;
  return true;
}

}  // namespace
}  // namespace fastconv
