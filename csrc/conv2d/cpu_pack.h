// Packing: turns a window of the input into the panels that multiply_tile reads.
//
// A panel holds kTileColumns pixels side by side for every (channel, tap). Its pixels lie in a few runs, one per row of
// the grid. For one tap a run reads consecutive elements (`step` apart), clipped where padding begins; so a tap is
// planned once per panel, as the pieces that make up each vector, and the plan is replayed for every channel: one load
// and one store per vector in the common case, two masked loads where a row ends inside the vector.
#pragma once

#include "conv2d/cpu_lanes.h"
#include "conv2d/cpu_naive.h"
#include "conv2d/cpu_tile.h"
#include "conv2d/gemm_conv.h"

namespace fastconv {
namespace {

/// Pixels of one grid row: lanes [lane, lane + length) of a panel.
struct PixelRun {
  int64_t lane, length;
  int64_t row, column;  // input row and column of tap (0, 0) of the first
  int64_t x_offset;     // of that input element, if it were inside
  int64_t y_offset;
};

/// The pixels of one panel: grid positions numbered n * I * J + i * J + j from `first`.
template <class Acc>
struct PanelPixels {
  int64_t count;  // at most kTileColumns; the rest of the panel is zeros
  int64_t run_count;
  bool y_contiguous;
  PixelRun runs[kTileColumns<Acc>];

  void locate(const GemmConv& p, int64_t first, int64_t total) {
    count = min_of(kTileColumns<Acc>, total - first);
    int64_t n = first / (p.i * p.j), i = first / p.j % p.i, j = first % p.j;
    y_contiguous = true;
    run_count = 0;
    for (int64_t lane = 0; lane < count;) {
      PixelRun& run = runs[run_count++];
      run.lane = lane;
      run.length = min_of(count - lane, p.j - j);
      run.row = i * p.step.h;
      run.column = j * p.step.w;
      run.x_offset = n * p.x_strides.n + run.row * p.x_strides.h + run.column * p.x_strides.w;
      run.y_offset = p.y_offset + n * p.y_strides.n + i * p.y_strides.h + j * p.y_strides.w;
      y_contiguous = y_contiguous && p.y_strides.w == 1 && run.y_offset == runs[0].y_offset + lane;
      lane += run.length;
      j = 0;
      if (++i == p.i) i = 0, ++n;
    }
  }
};

/// The same convolution with the plane as one row where the kernel is 1x1 without stride or padding, so that rows of
/// pixels are as long as they can be.
inline GemmConv flatten_plane(GemmConv p) {
  const bool pointwise = p.tap_count == 1 && p.taps[0].dh == 0 && p.taps[0].dw == 0 && p.step.h == 1 && p.step.w == 1 &&
                         p.i == p.h && p.j == p.w;
  if (!pointwise || p.x_strides.h != p.w * p.x_strides.w || p.y_strides.h != p.j * p.y_strides.w) return p;
  p.j = p.w = p.h * p.w;
  p.i = p.h = 1;
  return p;
}

/// Where one tap of one panel reads.
template <class T>
class TapPlan {
 public:
  using Acc = acc_t<T>;
  static constexpr int kLane = simd::kLanes<Acc>;

  TapPlan(const GemmConv& p, const PanelPixels<Acc>& pixels, const Tap& tap) : step_(p.step.w * p.x_strides.w) {
    const int64_t shift = tap.dh * p.x_strides.h + tap.dw * p.x_strides.w;
    for (int64_t r = 0; r < pixels.run_count; ++r) {
      const PixelRun& run = pixels.runs[r];
      if (!inside(run.row + tap.dh, p.h)) continue;
      const int64_t column = run.column + tap.dw;
      int64_t begin = 0, end = run.length;
      if (column < 0) begin = ceil_div(-column, p.step.w);
      if (column + (end - 1) * p.step.w >= p.w) end = column < p.w ? ceil_div(p.w - column, p.step.w) : 0;
      for (int64_t lane = run.lane + begin; lane < run.lane + end;) {
        const int64_t vector = lane / kLane, vector_begin = vector * kLane;
        const int64_t last = min_of(run.lane + end, vector_begin + kLane);
        pieces_[vector][piece_count_[vector]++] = {lane - vector_begin, last - vector_begin,
                                                   run.x_offset + shift + (vector_begin - run.lane) * step_};
        lane = last;
      }
    }
  }

  /// Rows of the panel, `target_stride` apart, from `channels` planes, `x_stride` apart.
  void pack(const T* x, int64_t x_stride, int64_t channels, Acc* target, int64_t target_stride) const {
    for (int v = 0; v < kTileVectors; ++v) pack_vector(v, x, x_stride, channels, target + v * kLane, target_stride);
  }

 private:
  struct Piece {
    int64_t begin, end;  // lanes
    int64_t offset;      // of lane 0
  };

  void pack_vector(int v, const T* x, int64_t x_stride, int64_t channels, Acc* target, int64_t target_stride) const {
    const Piece* pieces = pieces_[v];
    const int64_t count = piece_count_[v];
    if (count == 0) {
      for (int64_t c = 0; c < channels; ++c) simd::store<Acc>(target + c * target_stride, simd::zero<Acc>());
      return;
    }
    const T* source = x + pieces[0].offset;
    if (count == 1 && step_ == 1 && pieces[0].end - pieces[0].begin == kLane) {
      for (int64_t c = 0; c < channels; ++c) {
        // The next panel's pixels: every channel is another page, so the hardware does not see them coming.
        __builtin_prefetch(source + c * x_stride + kTileColumns<Acc>);
        simd::store<Acc>(target + c * target_stride, simd::load(source + c * x_stride));
      }
      return;
    }
    if (step_ == 1) pack_pieces<1>(pieces, count, x, x_stride, channels, target, target_stride);
    else if (step_ == 2) pack_pieces<2>(pieces, count, x, x_stride, channels, target, target_stride);
    else pack_pieces<0>(pieces, count, x, x_stride, channels, target, target_stride);
  }

  /// kStep: the step where it is known to the compiler, else 0.
  template <int kStep>
  void pack_pieces(const Piece* pieces, int64_t count, const T* x, int64_t x_stride, int64_t channels, Acc* target,
                   int64_t target_stride) const {
    const int64_t step = kStep > 0 ? kStep : step_;
    const LaneRange<Acc> first(pieces[0].begin, pieces[0].end);
    const T* source = x + pieces[0].offset;
    if (count == 2) {
      const LaneRange<Acc> second(pieces[1].begin, pieces[1].end);
      const T* other = x + pieces[1].offset;
      for (int64_t c = 0; c < channels; ++c)
        simd::store<Acc>(target + c * target_stride, merge<Acc>(load_range(source + c * x_stride, step, first),
                                                                load_range(other + c * x_stride, step, second)));
      return;
    }
    for (int64_t c = 0; c < channels; ++c) {
      if (kStep > 1) __builtin_prefetch(source + c * x_stride + kTileColumns<Acc> * step);
      simd::store<Acc>(target + c * target_stride, load_range(source + c * x_stride, step, first));
    }
    for (int64_t i = 1; i < count; ++i) {
      const LaneRange<Acc> range(pieces[i].begin, pieces[i].end);
      const T* other = x + pieces[i].offset;
      for (int64_t c = 0; c < channels; ++c)
        simd::store<Acc>(target + c * target_stride, merge<Acc>(simd::load(target + c * target_stride),
                                                                load_range(other + c * x_stride, step, range)));
    }
  }

  Piece pieces_[kTileVectors][kLane];
  int64_t piece_count_[kTileVectors] = {};
  int64_t step_;
};

/// Rows [c_begin, c_end) x taps of one panel, channel-major, as weights of Layout::nchw lie.
template <class T>
void pack_pixels(const GemmConv& p, const PanelPixels<acc_t<T>>& pixels, const T* x, int64_t c_begin, int64_t c_end,
                 acc_t<T>* panel) {
  constexpr int64_t kColumns = kTileColumns<acc_t<T>>;
  for (int64_t t = 0; t < p.tap_count; ++t)
    TapPlan<T>(p, pixels, p.taps[t])
        .pack(x + c_begin * p.x_strides.c, p.x_strides.c, c_end - c_begin, panel + t * kColumns,
              p.tap_count * kColumns);
}

}  // namespace
}  // namespace fastconv
