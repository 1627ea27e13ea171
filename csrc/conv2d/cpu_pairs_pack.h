// Panels of pixels for tiles of pairs, for NCHW: [pair of the depth][32 pixels], the depth being (channel, tap) as the
// weights have it. As in cpu_pack.h a tap is planned once per panel and replayed for every channel; here a panel is one
// vector of numbers, which are put together from masked loads and then interleaved with those of the next depth.
#pragma once

#include "conv2d/cpu_pack.h"
#include "conv2d/cpu_pairs.h"

namespace fastconv {
namespace {

inline constexpr int64_t kLargestPairStep = 8;  // of vectors that are put together from whole ones

/// Pixels `step` apart, as lanes of a vector that is put together from `step` vectors of the plane.
struct PairSteps {
  int64_t step;
  __m512i places;                       // of every lane in its vector
  __mmask32 lanes[kLargestPairStep];    // that a vector fills
  __mmask32 numbers[kLargestPairStep];  // of the vector, that fill them

  explicit PairSteps(int64_t apart) : step(apart) {
    if (step == 1 || step > kLargestPairStep) return;
    alignas(64) uint16_t place[kNumbers];
    for (int64_t k = 0; k < step; ++k) {
      lanes[k] = lanes_between(ceil_div(k * kNumbers, step), ceil_div((k + 1) * kNumbers, step));
      numbers[k] = 0;
    }
    for (int64_t lane = 0; lane < kNumbers; ++lane) {
      place[lane] = static_cast<uint16_t>(lane * step % kNumbers);
      numbers[lane * step / kNumbers] |= __mmask32{1} << place[lane];
    }
    places = _mm512_load_si512(place);
  }
};

/// Where one tap of one panel reads.
class PairTapPlan {
 public:
  PairTapPlan(const GemmConv& p, const PanelPixels<float>& pixels, const Tap& tap, const PairSteps& steps)
      : count_(0), step_(steps.step), steps_(steps) {
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
  }

  /// The 32 pixels of one channel; zeros outside the plane.
  FASTCONV_INLINE __m512i load(const BFloat16* x) const {
    __m512i result = _mm512_setzero_si512();
    if (step_ == 1) {
      for (int64_t i = 0; i < count_; ++i)
        result = _mm512_or_si512(result, load_numbers(x + pieces_[i].offset, pieces_[i].lanes));
      return result;
    }
    if (step_ > kLargestPairStep) return load_scattered(x);
    for (int64_t i = 0; i < count_; ++i) result = _mm512_or_si512(result, load_piece(pieces_[i], x));
    return result;
  }

  /// Rows of `channels` planes, `target_stride` apart.
  void load_all(const BFloat16* x, int64_t x_stride, int64_t channels, BFloat16* target, int64_t target_stride) const {
    if (step_ == 1 && count_ == 1) return load_runs<1>(x, x_stride, channels, target, target_stride);
    if (step_ == 1 && count_ == 2) return load_runs<2>(x, x_stride, channels, target, target_stride);
    if (step_ == 1 && count_ == 3) return load_runs<3>(x, x_stride, channels, target, target_stride);
    for (int64_t c = 0; c < channels; ++c, target += target_stride) _mm512_storeu_si512(target, load(x + c * x_stride));
  }

 private:
  /// Of few pieces places and masks stay in registers.
  template <int kPieces>
  void load_runs(const BFloat16* x, int64_t x_stride, int64_t channels, BFloat16* target, int64_t target_stride) const {
    const BFloat16* sources[kPieces];
    __mmask32 lanes[kPieces];
    for (int i = 0; i < kPieces; ++i) sources[i] = x + pieces_[i].offset, lanes[i] = pieces_[i].lanes;
    for (int64_t c = 0; c < channels; ++c, target += target_stride) {
      __m512i result = load_numbers(sources[0] + c * x_stride, lanes[0]);
#pragma GCC unroll 4
      for (int i = 1; i < kPieces; ++i)
        result = _mm512_or_si512(result, load_numbers(sources[i] + c * x_stride, lanes[i]));
      _mm512_storeu_si512(target, result);
    }
  }

  struct Piece {
    int64_t offset;  // of lane 0
    __mmask32 lanes;
    int64_t begin, end;  // in numbers from there, `step` apart
  };

  void add(int64_t begin, int64_t end, int64_t offset) {
    pieces_[count_++] = {offset, lanes_between(begin, end), begin * step_, (end - 1) * step_ + 1};
  }

  FASTCONV_INLINE __m512i load_piece(const Piece& piece, const BFloat16* x) const {
    __m512i result = _mm512_setzero_si512();
    for (int64_t k = piece.begin / kNumbers; k * kNumbers < piece.end; ++k) {
      const __mmask32 reads = steps_.numbers[k] & lanes_between(piece.begin - k * kNumbers, piece.end - k * kNumbers);
      const __m512i numbers = load_numbers(x + piece.offset + k * kNumbers, reads);
      const __mmask32 lanes = piece.lanes & steps_.lanes[k];
      result = _mm512_or_si512(result, _mm512_maskz_permutexvar_epi16(lanes, steps_.places, numbers));
    }
    return result;
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
  const PairSteps& steps_;
};

/// Depth of channels [c_begin, c_end) of one panel.
inline void pack_pixel_pairs(const GemmConv& p, const PanelPixels<float>& pixels, const BFloat16* x, int64_t c_begin,
                             int64_t c_end, Pair* panel) {
  const int64_t depth = (c_end - c_begin) * p.tap_count;
  x += c_begin * p.x_strides.c;
  const PairSteps steps(p.step.w * p.x_strides.w);
  if (p.tap_count == 1) {
    const PairTapPlan plan(p, pixels, p.taps[0], steps);
    for (int64_t d = 0; d < depth; d += 2, panel += kPairColumns, x += 2 * p.x_strides.c)
      store_pairs(panel, plan.load(x), d + 1 < depth ? plan.load(x + p.x_strides.c) : _mm512_setzero_si512());
    return;
  }
  auto* numbers = reinterpret_cast<BFloat16*>(panel);
  for (int64_t t = 0; t < p.tap_count; ++t) {
    const PairTapPlan plan(p, pixels, p.taps[t], steps);
    plan.load_all(x, p.x_strides.c, c_end - c_begin, numbers + t * kNumbers, p.tap_count * kNumbers);
  }
  if (depth % 2 != 0) _mm512_storeu_si512(numbers + depth * kNumbers, _mm512_setzero_si512());
  for (int64_t d = 0; d < depth; d += 2, numbers += 2 * kNumbers)
    store_pairs(reinterpret_cast<Pair*>(numbers), _mm512_loadu_si512(numbers), _mm512_loadu_si512(numbers + kNumbers));
}

}  // namespace
}  // namespace fastconv
