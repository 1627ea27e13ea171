// A row of input gradient, NCHW, while the windows that cover it are added up.
//
// The buffer holds each residue of the padded column modulo stride.w contiguously ("phases"): there one tap of all the
// windows of a row is one contiguous addition, whatever the stride and the dilation, and margins take what falls into
// the padding. Writing the row interleaves the phases.
#pragma once

#include "common/parallel.h"
#include "pool/cpu_reduce.h"
#include "pool/pool.h"

namespace fastconv {
namespace {

template <class Acc>
class PhaseRow {
 public:
  explicit PhaseRow(const PoolProblem& p)
      : phase_elems_((p.w + 2 * p.padding.w + p.stride.w * p.q() + p.s * p.dilation.w) / p.stride.w +
                     2 * simd::kLanes<Acc>),
        buffer_(p.stride.w * phase_elems_ * static_cast<int64_t>(sizeof(Acc))) {}

  void clear(const PoolProblem& p) const {
    std::memset(buffer_.template as<void>(), 0, static_cast<size_t>(p.stride.w * phase_elems_) * sizeof(Acc));
  }

  /// Where tap s of output column 0 lies; columns follow.
  Acc* tap(const PoolProblem& p, int64_t s) const {
    const int64_t column = s * p.dilation.w;
    return buffer_.template as<Acc>() + column % p.stride.w * phase_elems_ + column / p.stride.w;
  }

  /// `room` elements may be overwritten from `target` on: whatever spills over the row's end is written again later.
  template <class T>
  void write(const PoolProblem& p, T* target, int64_t room) const {
    constexpr int64_t kLane = simd::kLanes<Acc>;
    const Acc* buffer = buffer_.template as<Acc>();
    int64_t w = 0;
    if (p.stride.w == 1) {
      for (; w < p.w && w + kLane <= room; w += kLane) simd::store<T>(target + w, simd::load(buffer + p.padding.w + w));
    } else if (p.stride.w == 2) {
      const Acc* even = buffer + p.padding.w % 2 * phase_elems_ + p.padding.w / 2;
      const Acc* odd = buffer + (1 - p.padding.w % 2) * phase_elems_ + (p.padding.w + 1) / 2;
      for (; w < p.w && w + 2 * kLane <= room; w += 2 * kLane) {
        const auto a = simd::load(even + w / 2), b = simd::load(odd + w / 2);
        simd::store<T>(target + w, interleave_low<Acc>(a, b));
        simd::store<T>(target + w + kLane, interleave_high<Acc>(a, b));
      }
    }
    int64_t phase = (w + p.padding.w) % p.stride.w, index = (w + p.padding.w) / p.stride.w;
    for (; w < p.w; ++w) {
      target[w] = simd::narrow<T>(buffer[phase * phase_elems_ + index]);
      if (++phase == p.stride.w) phase = 0, ++index;
    }
  }

 private:
  int64_t phase_elems_;
  Scratch buffer_;
};

}  // namespace
}  // namespace fastconv
