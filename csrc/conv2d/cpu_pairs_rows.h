// What the tiles of pairs read for NHWC: rows of x, one per pixel, and panels of weights. Both have the depth (tap,
// channel) with the taps from top left to bottom right, so that neighbouring taps are one run of x, and end with a zero
// where the depth is odd.
#pragma once

#include "common/parallel.h"
#include "conv2d/cpu_channel_lanes.h"
#include "conv2d/cpu_pairs.h"

namespace fastconv {
namespace {

/// Taps side by side in x: numbers [begin, end) of the depth, read from (dh, dw) on.
struct TapRun {
  int64_t dh, dw, begin, end;
  int64_t offset;  // of (dh, dw) in x
  __mmask32 tail;  // of its last vector
};

/// The taps of a product in rising order. An input gradient has them the other way round.
class PairTaps {
 public:
  explicit PairTaps(const GemmConv& p)
      : memory_(max_of(p.tap_count, 1) * static_cast<int64_t>(sizeof(TapRun))), p_(p), falling_(false) {
    if (p.tap_count == 0) return;
    const Tap &first = p.taps[0], &last = p.taps[p.tap_count - 1];
    falling_ = last.dh < first.dh || (last.dh == first.dh && last.dw < first.dw);
    for (int64_t t = 0; t < p.tap_count; ++t) {
      const Tap& tap = at(t);
      add(tap, t * p.c);
      low_ = t == 0 ? Size2{tap.dh, tap.dw} : Size2{min_of(low_.h, tap.dh), min_of(low_.w, tap.dw)};
      high_ = t == 0 ? Size2{tap.dh, tap.dw} : Size2{max_of(high_.h, tap.dh), max_of(high_.w, tap.dw)};
    }
  }
  /// Whether all taps of the pixel whose tap (0, 0) is there lie in the plane.
  bool inner(int64_t row, int64_t column) const {
    return row + low_.h >= 0 && row + high_.h < p_.h && column + low_.w >= 0 && column + high_.w < p_.w;
  }
  const Tap& at(int64_t t) const { return p_.taps[falling_ ? p_.tap_count - 1 - t : t]; }
  int64_t run_count() const { return run_count_; }
  const TapRun* runs() const { return memory_.as<TapRun>(); }

 private:
  void add(const Tap& tap, int64_t begin) {
    TapRun* runs = memory_.as<TapRun>();
    if (run_count_ > 0 && p_.x_strides.w == p_.c) {
      TapRun& run = runs[run_count_ - 1];
      if (run.dh == tap.dh && run.dw * p_.c + begin - run.begin == tap.dw * p_.c) {
        run.end = begin + p_.c;
        run.tail = lanes_between(0, (run.end - run.begin) % kNumbers);
        return;
      }
    }
    const int64_t offset = tap.dh * p_.x_strides.h + tap.dw * p_.x_strides.w;
    runs[run_count_++] = {tap.dh, tap.dw, begin, begin + p_.c, offset, lanes_between(0, p_.c % kNumbers)};
  }

  Scratch memory_;
  const GemmConv& p_;
  bool falling_;
  Size2 low_, high_;
  int64_t run_count_ = 0;
};

/// target[i - begin] = source[i] for low <= i < high, else zero; i from begin to end. Writes whole vectors.
FASTCONV_INLINE void copy_numbers(const BFloat16* source, int64_t begin, int64_t end, int64_t low, int64_t high,
                                  BFloat16* target) {
  int64_t i = begin;
  if (low <= begin && high >= end)
    for (; i + kNumbers <= end; i += kNumbers, target += kNumbers)
      _mm512_storeu_si512(target, _mm512_loadu_si512(source + i));
  for (; i < end; i += kNumbers, target += kNumbers)
    _mm512_storeu_si512(target, load_numbers(source + i, lanes_between(low - i, min_of(high, end) - i)));
}

/// All taps of a pixel that sees no padding.
FASTCONV_INLINE void gather_inner_pixel(const TapRun* runs, int64_t run_count, const BFloat16* x, BFloat16* target) {
  for (int64_t r = 0; r < run_count; ++r) {
    const TapRun& run = runs[r];
    const BFloat16* source = x + run.offset;
    const int64_t length = run.end - run.begin;
    if (length <= kNumbers / 2) {  // shorter stores cross fewer cache lines
      const auto mask = static_cast<__mmask16>(run.tail);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm256_maskz_loadu_epi16(mask, source));
      target += length;
      continue;
    }
    int64_t i = 0;
    for (; i + kNumbers <= length; i += kNumbers, target += kNumbers)
      _mm512_storeu_si512(target, _mm512_loadu_si512(source + i));
    if (i == length) continue;
    _mm512_storeu_si512(target, load_numbers(source + i, run.tail));
    target += length - i;
  }
}

/// Depth [begin, end) for `pixels.count` pixels, one row of `row_numbers` each, and up to a vector after the last.
inline void gather_pairs(const GemmConv& p, const PairTaps& taps, const PixelPositions<float>& pixels,
                         const BFloat16* x, int64_t begin, int64_t end, int64_t row_numbers, BFloat16* rows) {
  const TapRun* runs = taps.runs();
  const int64_t run_count = taps.run_count();
  const bool whole = begin == 0 && end == p.c * p.tap_count;
  for (int64_t pixel = 0; pixel < pixels.count; ++pixel, rows += row_numbers) {
    if (whole && taps.inner(pixels.row[pixel], pixels.column[pixel])) {
      gather_inner_pixel(runs, run_count, x + pixels.x_offset[pixel], rows);
      continue;
    }
    for (int64_t r = 0; r < run_count; ++r) {
      const TapRun& run = runs[r];
      const int64_t first = max_of(begin, run.begin) - run.begin, last = min_of(end, run.end) - run.begin;
      if (first >= last) continue;
      const int64_t column = pixels.column[pixel] + run.dw;
      const bool reads = inside(pixels.row[pixel] + run.dh, p.h);
      const BFloat16* source = x + pixels.x_offset[pixel] + run.offset;
      copy_numbers(source, first, last, -column * p.c, reads ? (p.w - column) * p.c : first,
                   rows + run.begin + first - begin);
    }
  }
}

/// Pairs of depth [begin, end) of a panel of kPairColumns output channels. Vectors without one are not written.
inline void pack_pair_panel(const GemmConv& p, const PairTaps& taps, int64_t group, int64_t panel, int64_t begin,
                            int64_t end, Pair* target) {
  const int64_t m = panel * kPairColumns, live = min_of(kPairColumns, p.m - m);
  const BFloat16* weight =
      static_cast<const BFloat16*>(p.weight) + group * p.weight_group_stride + m * p.weight_m_stride;
  if (p.weight_m_stride == 1) {  // an input gradient: output channels lie side by side
    const __mmask32 mask = lanes_between(0, live);
    const auto load = [&](int64_t d) {
      const BFloat16* source = weight + taps.at(d / p.c).weight_offset_elems + d % p.c * p.weight_c_stride;
      return load_numbers(source, mask);
    };
    for (int64_t d = begin; d < end; d += 2, target += kPairColumns)
      store_pairs(target, load(d), d + 1 < end ? load(d + 1) : _mm512_setzero_si512());
    return;
  }
  if (p.weight_c_stride != 1) {  // of NCHW, beside images in NHWC
    BFloat16 numbers[kPairColumns][kNumbers];
    for (int64_t d = begin; d < end; d += kNumbers, target += kNumbers / 2 * kPairColumns) {
      const int64_t count = min_of(end - d, kNumbers);
      for (int64_t i = 0; i < count; ++i) {
        const BFloat16* source =
            weight + taps.at((d + i) / p.c).weight_offset_elems + (d + i) % p.c * p.weight_c_stride;
        for (int64_t lane = 0; lane < live; ++lane) numbers[lane][i] = source[lane * p.weight_m_stride];
      }
      for (int64_t lane = 0; lane < live; lane += kPairColumns / 2)
        transpose_pairs(numbers[lane], kNumbers, min_of(live - lane, kPairColumns / 2), count, target + lane,
                        kPairColumns);
    }
    return;
  }
  // A forward pass: the depth lies side by side, all of it.
  for (int64_t d = begin; d < end; d += kNumbers, target += kNumbers / 2 * kPairColumns)
    for (int64_t lane = 0; lane < live; lane += kPairColumns / 2)
      transpose_pairs(weight + lane * p.weight_m_stride + d, p.weight_m_stride, min_of(live - lane, kPairColumns / 2),
                      min_of(end - d, kNumbers), target + lane, kPairColumns);
}

/// Panels [group][m / kPairColumns][pair of the depth][kPairColumns].
inline void pack_pair_panels(const GemmConv& p, const PairTaps& taps, Pair* panels) {
  const int64_t depth = p.c * p.tap_count, per_group = ceil_div(p.m, kPairColumns);
  const int64_t panel_pairs = ceil_div(depth, 2) * kPairColumns;
  parallel_for(0, p.groups * per_group, ceil_div(65536, 2 * panel_pairs + 1), [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index)
      pack_pair_panel(p, taps, index / per_group, index % per_group, 0, depth, panels + index * panel_pairs);
  });
}

}  // namespace
}  // namespace fastconv
