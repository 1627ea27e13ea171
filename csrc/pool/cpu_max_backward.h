// The gradient of max pooling, gathered: every input element looks at the windows that cover it and adds the gradients
// of those whose offset names it. No atomics, a fixed order, every element written once.
//
// NCHW: windows of two or three columns with stride 2 are summed in registers, others in phases (cpu_phase_row.h).
// NHWC: lanes are channels; where windows do not overlap, each is read once and written to all of its pixels.
#pragma once

#include "pool/cpu_phase_row.h"
#include "pool/cpu_tap_table.h"
#include "pool/cpu_windows.h"

namespace fastconv {
namespace {

/// Gradients and offsets, and how to read lanes of them: a gradient where the offset is a given tap, else zero.
template <class T, class Offset>
struct Winners {
  using Acc = acc_t<T>;
  using Vec = simd::Vec<Acc>;
  static constexpr int64_t kLane = simd::kLanes<Acc>;
  const T* grad;
  const Offset* offsets;
  int64_t total;  // elements of each

  struct Lanes {
    Vec grad;
    Offsets<Acc> offset;
    FASTCONV_INLINE Vec of_tap(int64_t tap) const {
      return offset == broadcast_offset<Acc>(tap) ? grad : simd::zero<Acc>();
    }
  };

  FASTCONV_INLINE Lanes whole(int64_t index) const {
    return {simd::load(grad + index), load_offsets<Acc>(offsets + index)};
  }
  /// The first `live` lanes, live <= kLane, perhaps none. The others carry no gradient, so their offsets do not matter.
  FASTCONV_INLINE Lanes first(int64_t index, int64_t live) const {
    if (live >= kLane) return whole(index);
    if (live <= 0) return {simd::zero<Acc>(), Offsets<Acc>{}};
    return {simd::load_first(grad + index, live), index + kLane <= total
                                                      ? load_offsets<Acc>(offsets + index)
                                                      : load_first_offsets<Acc>(offsets + index, live)};
  }
};

// ---------------------------------------------------------------- NCHW

/// Stride 2: padded columns 2j and 2j + 1 are one lane of two vectors, so all taps of a block are sums in registers.
///
/// kPad 0: the even column 2j is tap 0 of window j and tap 2 of window j - 1, the odd one is tap 1 of window j.
/// kPad 1: a block starts with the odd column 2j + 1, which is tap 1 of window j; next is tap 0 of j + 1 and tap 2 of
/// j.
template <int kTaps, int kPad, class T, class Offset>
FASTCONV_INLINE void backward_block(const Winners<T, Offset>& winners, int64_t row, int64_t columns, int64_t j,
                                    int64_t tap, simd::Vec<acc_t<T>>& left, simd::Vec<acc_t<T>>& right) {
  using Acc = acc_t<T>;
  const int64_t live = columns - j;
  const auto here = winners.first(row + j, live);
  if constexpr (kPad == 0) {
    left += here.of_tap(tap);
    right += here.of_tap(tap + 1);
    if constexpr (kTaps == 3) {
      if (j > 0) left += winners.first(row + j - 1, live + 1).of_tap(tap + 2);
      else left += shift_in_zero<Acc>(here.of_tap(tap + 2));
    }
  } else {
    left += here.of_tap(tap + 1);
    right += winners.first(row + j + 1, live - 1).of_tap(tap);
    if constexpr (kTaps == 3) right += here.of_tap(tap + 2);
  }
}

template <int kTaps, int kPad, class T, class Offset>
void max_backward_step2(const PoolProblem& p, const Winners<T, Offset>& winners, T* grad_input) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  const int64_t rows = p.p(), columns = p.q();
  const TapTable row_taps(p.h, rows, p.r, p.stride.h, p.padding.h, p.dilation.h);
  parallel_for(0, p.n * p.c * p.h, grain_for(p.w * 2), [&](int64_t begin, int64_t end) {
    for (int64_t line = begin, plane = begin / p.h, h = begin % p.h; line < end; ++line) {
      T* target = grad_input + line * p.w;
      const int64_t room = (end - line) * p.w;
      for (int64_t w = 0; w < p.w; w += 2 * kLane) {
        auto left = simd::zero<Acc>(), right = simd::zero<Acc>();
        for (int64_t slot = row_taps.begin(h); slot < row_taps.end(h); ++slot)
          backward_block<kTaps, kPad>(winners, (plane * rows + row_taps.output(slot)) * columns, columns, w / 2,
                                      row_taps.tap(slot) * kTaps, left, right);
        const auto low = interleave_low<Acc>(left, right), high = interleave_high<Acc>(left, right);
        if (w + 2 * kLane <= room) {
          // What spills over the row's end is written again with the next row.
          simd::store<T>(target + w, low);
          simd::store<T>(target + w + kLane, high);
        } else {
          const int64_t live = p.w - w;
          simd::store_first<T>(target + w, low, min_of(kLane, live));
          if (live > kLane) simd::store_first<T>(target + w + kLane, high, min_of(kLane, live - kLane));
        }
      }
      if (++h == p.h) h = 0, ++plane;
    }
  });
}

/// Any stride and dilation.
template <class T, class Offset>
void max_backward_phases(const PoolProblem& p, const Winners<T, Offset>& winners, T* grad_input) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  const int64_t rows = p.p(), columns = p.q();
  const TapTable row_taps(p.h, rows, p.r, p.stride.h, p.padding.h, p.dilation.h);
  parallel_for(0, p.n * p.c * p.h, grain_for(p.w * 4), [&](int64_t begin, int64_t end) {
    const PhaseRow<Acc> sums(p);
    for (int64_t line = begin, plane = begin / p.h, h = begin % p.h; line < end; ++line) {
      sums.clear(p);
      for (int64_t slot = row_taps.begin(h); slot < row_taps.end(h); ++slot) {
        const int64_t row = (plane * rows + row_taps.output(slot)) * columns;
        for (int64_t q = 0; q < columns; q += kLane) {
          const auto lanes = winners.first(row + q, columns - q);
          for (int64_t s = 0; s < p.s; ++s) {
            Acc* target = sums.tap(p, s) + q;
            simd::store<Acc>(target, simd::load(target) + lanes.of_tap(row_taps.tap(slot) * p.s + s));
          }
        }
      }
      sums.write(p, grad_input + line * p.w, (end - line) * p.w);
      if (++h == p.h) h = 0, ++plane;
    }
  });
}

template <class T, class Offset>
void max_backward_nchw(const PoolProblem& p, const Winners<T, Offset>& winners, T* grad_input) {
  if (p.stride.w == 2 && p.dilation.w == 1 && p.s == 2) {
    if (p.padding.w == 0) return max_backward_step2<2, 0>(p, winners, grad_input);
    return max_backward_step2<2, 1>(p, winners, grad_input);
  }
  if (p.stride.w == 2 && p.dilation.w == 1 && p.s == 3) {
    if (p.padding.w == 0) return max_backward_step2<3, 0>(p, winners, grad_input);
    return max_backward_step2<3, 1>(p, winners, grad_input);
  }
  max_backward_phases(p, winners, grad_input);
}

// ---------------------------------------------------------------- NHWC

/// A window that covers a pixel: where its channels start, and which of its taps the pixel is.
struct Covering {
  int64_t index, tap;
};

template <class T, class Offset>
void max_backward_nhwc(const PoolProblem& p, const Winners<T, Offset>& winners, T* grad_input) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  const int64_t rows = p.p(), columns = p.q();
  const TapTable row_taps(p.h, rows, p.r, p.stride.h, p.padding.h, p.dilation.h);
  const TapTable column_taps(p.w, columns, p.s, p.stride.w, p.padding.w, p.dilation.w);
  const int64_t most = row_taps.most() * column_taps.most();
  parallel_for(0, p.n * p.h, grain_for(p.w * p.c * 4), [&](int64_t begin, int64_t end) {
    Scratch list(most * static_cast<int64_t>(sizeof(Covering)));
    Covering* coverings = list.as<Covering>();
    for (int64_t line = begin; line < end; ++line) {
      const int64_t image = line / p.h * rows, h = line % p.h;
      for (int64_t w = 0; w < p.w; ++w) {
        int64_t count = 0;
        for (int64_t a = row_taps.begin(h); a < row_taps.end(h); ++a)
          for (int64_t b = column_taps.begin(w); b < column_taps.end(w); ++b)
            coverings[count++] = {((image + row_taps.output(a)) * columns + column_taps.output(b)) * p.c,
                                  row_taps.tap(a) * p.s + column_taps.tap(b)};
        T* target = grad_input + (line * p.w + w) * p.c;
        int64_t c = 0;
        for (; c + 2 * kLane <= p.c; c += 2 * kLane) {
          auto sum = simd::zero<Acc>(), next = simd::zero<Acc>();
          for (int64_t i = 0; i < count; ++i) {
            sum += winners.whole(coverings[i].index + c).of_tap(coverings[i].tap);
            next += winners.whole(coverings[i].index + c + kLane).of_tap(coverings[i].tap);
          }
          simd::store<T>(target + c, sum);
          simd::store<T>(target + c + kLane, next);
        }
        for (; c < p.c; c += kLane) {
          const int64_t live = min_of(kLane, p.c - c);
          auto sum = simd::zero<Acc>();
          for (int64_t i = 0; i < count; ++i)
            sum += winners.first(coverings[i].index + c, live).of_tap(coverings[i].tap);
          simd::store_first<T>(target + c, sum, live);
        }
      }
    }
  });
}

/// Windows that tile the input without overlap: each output is read once and written to all taps of its window.
template <class T, class Offset>
void max_backward_disjoint(const PoolProblem& p, const Winners<T, Offset>& winners, T* grad_input) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  const int64_t rows = p.p(), columns = p.q();
  const T nothing = simd::narrow<T>(Acc(0));
  parallel_for(0, p.n * rows, grain_for(p.w * p.c * 4), [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const int64_t image = line / rows, i = line % rows;
      // The last row of windows also owns the rows below it that no window covers; ceil_mode may leave it fewer.
      const int64_t first = i * p.r, last = i + 1 == rows ? p.h : first + p.r, covered = min_of(p.r, p.h - first);
      T* block = grad_input + (image * p.h + first) * p.w * p.c;
      for (int64_t q = 0; q < columns; ++q) {
        const int64_t index = (line * columns + q) * p.c, taps = min_of(p.s, p.w - q * p.s);
        for (int64_t c = 0; c < p.c; c += kLane) {
          const int64_t live = min_of(kLane, p.c - c);
          const auto lanes = winners.first(index + c, live);
          for (int64_t r = 0; r < covered; ++r)
            for (int64_t s = 0; s < taps; ++s) {
              T* target = block + (r * p.w + q * p.s + s) * p.c + c;
              if (live == kLane) simd::store<T>(target, lanes.of_tap(r * p.s + s));
              else simd::store_first<T>(target, lanes.of_tap(r * p.s + s), live);
            }
        }
      }
      for (int64_t r = 0; r < last - first; ++r) {
        const int64_t begin_column = r < covered ? min_of(p.w, columns * p.s) : 0;
        for (int64_t e = begin_column * p.c; e < p.w * p.c; ++e) block[r * p.w * p.c + e] = nothing;
      }
    }
  });
}

template <class T, class Offset>
void max_backward(const PoolProblem& p, const T* grad, const Offset* offsets, T* grad_input) {
  const Winners<T, Offset> winners{grad, offsets, p.n * p.c * p.p() * p.q()};
  if (p.layout == Layout::nchw) return max_backward_nchw(p, winners, grad_input);
  const bool disjoint = p.r == p.stride.h && p.s == p.stride.w && p.dilation.h == 1 && p.dilation.w == 1 &&
                        p.padding.h == 0 && p.padding.w == 0;
  if (disjoint) max_backward_disjoint(p, winners, grad_input);
  else max_backward_nhwc(p, winners, grad_input);
}

}  // namespace
}  // namespace fastconv
