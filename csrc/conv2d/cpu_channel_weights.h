// Weights for tiles whose columns are output channels: panels [tap][c][kTileColumns].
//
// Forward weights in NHWC are rows of depth, one per output channel: squares of them are transposed in registers. Of an
// input gradient the output channels lie side by side, and whole vectors are copied.
#pragma once

#include "common/parallel.h"
#include "conv2d/cpu_tile.h"
#include "conv2d/cpu_transpose.h"
#include "conv2d/gemm_conv.h"

namespace fastconv {
namespace {

/// Depth [begin, end) of the flattened (tap, c) axis of one panel; zero where m ends.
template <class T>
void pack_weight_panel(const GemmConv& p, int64_t group, int64_t panel, int64_t begin, int64_t end, acc_t<T>* target) {
  using Acc = acc_t<T>;
  constexpr int64_t kColumns = kTileColumns<Acc>, kLane = simd::kLanes<Acc>;
  const int64_t m = panel * kColumns, live = min_of(kColumns, p.m - m);
  const T* weight = static_cast<const T*>(p.weight) + group * p.weight_group_stride + m * p.weight_m_stride;
  bool one_run = p.weight_c_stride == 1;
  for (int64_t t = 0; t < p.tap_count; ++t) one_run = one_run && p.taps[t].weight_offset_elems == t * p.c;
  const int64_t run = one_run ? p.c * p.tap_count : p.c;
  if (live < kColumns) std::memset(target, 0, static_cast<size_t>((end - begin) * kColumns) * sizeof(Acc));
  for (int64_t d = begin; d < end;) {
    const int64_t t = d / run, c = d % run, length = min_of(run - c, end - d);
    const T* source = weight + p.taps[t].weight_offset_elems + c * p.weight_c_stride;
    if (p.weight_m_stride == 1) {
      for (int64_t i = 0; i < length; ++i)
        for (int64_t lane = 0; lane < live; lane += kLane) {
          const T* row = source + i * p.weight_c_stride + lane;
          simd::store<Acc>(target + i * kColumns + lane,
                           lane + kLane <= live ? simd::load(row) : simd::load_first(row, live - lane));
        }
    } else if (p.weight_c_stride == 1) {
      transpose_rows<T>(source, p.weight_m_stride, live, length, target, kColumns);
    } else {
      for (int64_t lane = 0; lane < live; ++lane)
        for (int64_t i = 0; i < length; ++i)
          target[i * kColumns + lane] = simd::widen(source[lane * p.weight_m_stride + i * p.weight_c_stride]);
    }
    target += length * kColumns;
    d += length;
  }
}

template <class Acc>
int64_t weight_panel_elems(const GemmConv& p) {
  return p.groups * ceil_div(p.m, kTileColumns<Acc>) * p.c * p.tap_count * kTileColumns<Acc>;
}

/// Panels [group][m / kTileColumns][tap][c][kTileColumns].
template <class T>
void pack_weight_panels(const GemmConv& p, acc_t<T>* panels) {
  constexpr int64_t kColumns = kTileColumns<acc_t<T>>;
  const int64_t depth = p.c * p.tap_count, per_group = ceil_div(p.m, kColumns);
  parallel_for(0, p.groups * per_group, ceil_div(32768, depth * kColumns + 1), [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index)
      pack_weight_panel<T>(p, index / per_group, index % per_group, 0, depth, panels + index * depth * kColumns);
  });
}

}  // namespace
}  // namespace fastconv
