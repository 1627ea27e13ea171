// Panels of pixels for tiles of pairs, for NCHW: [pair of the depth][32 pixels], the depth being (channel, tap) as the
// weights have it. As in cpu_pack.h a tap is planned once per panel and replayed for every channel; here a panel is one
// vector of numbers, which are put together from masked loads and then interleaved with those of the next depth.
#pragma once

#include "conv2d/cpu_pack.h"
#include "conv2d/cpu_pairs.h"

namespace fastconv {
namespace {

inline constexpr int64_t kLargestPairStep = 8;  // of vectors that are put together from whole ones

/// Where one tap of one panel reads.
class PairTapPlan {
 public:
  PairTapPlan(const GemmConv& p, const PanelPixels<float>& pixels, const Tap& tap)
      : count_(0), step_(p.step.w * p.x_strides.w) {
    const int64_t shift = tap.dh * p.x_strides.h + tap.dw * p.x_strides.w;
    for (int64_t r = 0; r < pixels.run_count; ++r) {
      const PixelRun& run = pixels.runs[r];
      if (!inside(run.row + tap.dh, p.h)) continue;
      const int64_t column = run.column + tap.dw;
      const int64_t begin = column < 0 ? ceil_div(-column, p.step.w) : 0;
      int64_t end = run.length;
      if (column + (end - 1) * p.step.w >= p.w) end = column < p.w ? ceil_div(p.w - column, p.step.w) : 0;
      if (begin < end) add(run.lane + begin, run.lane + end, run.x_offset + shift - run.lane * step_);
    }
    alignas(64) uint16_t places[kNumbers];
    for (int64_t lane = 0; lane < kNumbers; ++lane) places[lane] = static_cast<uint16_t>(lane * step_ % kNumbers);
    places_ = _mm512_load_si512(places);
  }

  /// The 32 pixels of one channel; zeros outside the plane.
  FASTCONV_INLINE __m512i load(const BFloat16* x) const {
    __m512i result = _mm512_setzero_si512();
    if (step_ == 1) {
      if (count_ > 0) result = load_numbers(x + pieces_[0].offset, pieces_[0].lanes);
      for (int64_t i = 1; i < count_; ++i)
        result = _mm512_or_si512(result, load_numbers(x + pieces_[i].offset, pieces_[i].lanes));
      return result;
    }
    if (step_ > kLargestPairStep) return load_scattered(x);
    for (int64_t i = 0; i < count_; ++i) {
      const Piece& piece = pieces_[i];
      const BFloat16* source = x + piece.offset;
      for (int64_t k = piece.first; k < piece.last; ++k) {
        const __m512i numbers = load_numbers(source + k * kNumbers, piece.numbers[k]);
        result = _mm512_or_si512(result, _mm512_maskz_permutexvar_epi16(piece.lanes & lanes_of_[k], places_, numbers));
      }
    }
    return result;
  }

 private:
  struct Piece {
    int64_t offset;  // of lane 0
    __mmask32 lanes;
    int64_t first, last;                  // vectors of the source that hold some
    __mmask32 numbers[kLargestPairStep];  // of each
  };

  void add(int64_t begin, int64_t end, int64_t offset) {
    Piece& piece = pieces_[count_++];
    piece.offset = offset;
    piece.lanes = lanes_between(begin, end);
    if (step_ == 1 || step_ > kLargestPairStep) return;
    for (int64_t k = 0; k < kLargestPairStep; ++k) piece.numbers[k] = 0;
    piece.first = begin * step_ / kNumbers, piece.last = (end - 1) * step_ / kNumbers + 1;
    for (int64_t lane = begin; lane < end; ++lane)
      piece.numbers[lane * step_ / kNumbers] |= __mmask32{1} << lane * step_ % kNumbers;
    for (int64_t k = 0; k < step_; ++k)
      lanes_of_[k] = lanes_between(ceil_div(k * kNumbers, step_), ceil_div((k + 1) * kNumbers, step_));
  }

  __m512i load_scattered(const BFloat16* x) const {
    alignas(64) BFloat16 numbers[kNumbers] = {};
    for (int64_t i = 0; i < count_; ++i)
      for (int64_t lane = 0; lane < kNumbers; ++lane)
        if (pieces_[i].lanes >> lane & 1) numbers[lane] = x[pieces_[i].offset + lane * step_];
    return _mm512_load_si512(numbers);
  }

  Piece pieces_[kNumbers];
  int64_t count_;
  int64_t step_;
  __m512i places_;  // of every lane in its vector of the source
  __mmask32 lanes_of_[kLargestPairStep];
};

/// Depth of channels [c_begin, c_end) of one panel.
inline void pack_pixel_pairs(const GemmConv& p, const PanelPixels<float>& pixels, const BFloat16* x, int64_t c_begin,
                             int64_t c_end, Pair* panel) {
  const int64_t depth = (c_end - c_begin) * p.tap_count;
  x += c_begin * p.x_strides.c;
  if (p.tap_count == 1) {
    const PairTapPlan plan(p, pixels, p.taps[0]);
    for (int64_t d = 0; d < depth; d += 2, panel += kPairColumns, x += 2 * p.x_strides.c)
      store_pairs(panel, plan.load(x), d + 1 < depth ? plan.load(x + p.x_strides.c) : _mm512_setzero_si512());
    return;
  }
  auto* numbers = reinterpret_cast<BFloat16*>(panel);
  for (int64_t t = 0; t < p.tap_count; ++t) {
    const PairTapPlan plan(p, pixels, p.taps[t]);
    for (int64_t c = 0; c < c_end - c_begin; ++c)
      _mm512_storeu_si512(numbers + (c * p.tap_count + t) * kNumbers, plan.load(x + c * p.x_strides.c));
  }
  if (depth % 2 != 0) _mm512_storeu_si512(numbers + depth * kNumbers, _mm512_setzero_si512());
  for (int64_t d = 0; d < depth; d += 2, numbers += 2 * kNumbers)
    store_pairs(reinterpret_cast<Pair*>(numbers), _mm512_loadu_si512(numbers), _mm512_loadu_si512(numbers + kNumbers));
}

}  // namespace
}  // namespace fastconv
