// The gradient of max pooling, gathered: every input element looks at the windows that cover it and adds the gradients
// of those whose offset names it. No atomics, a fixed order, every element written once.
//
// NCHW: a row of input gradient is summed in phases (cpu_phase_row.h). NHWC: lanes are channels.
#pragma once

#include "pool/cpu_phase_row.h"
#include "pool/cpu_windows.h"

namespace fastconv {
namespace {

/// For every input position along one axis, the (output position, tap) pairs that read it, taps ascending.
class TapTable {
 public:
  TapTable(int64_t size, int64_t positions, int64_t window, int64_t stride, int64_t padding, int64_t dilation)
      : start_((size + 2) * kWord), output_(positions * window * kWord), tap_(positions * window * kWord) {
    int64_t* start = start_.as<int64_t>();
    for (int64_t i = 0; i < size + 2; ++i) start[i] = 0;
    const auto for_each_pair = [&](const auto& body) {
      for (int64_t tap = 0; tap < window; ++tap)
        for (int64_t output = 0; output < positions; ++output) {
          const int64_t position = output * stride - padding + tap * dilation;
          if (position >= 0 && position < size) body(position, output, tap);
        }
    };
    for_each_pair([&](int64_t position, int64_t, int64_t) { ++start[position + 2]; });
    for (int64_t i = 2; i < size + 2; ++i) start[i] += start[i - 1];
    // Filling moves start[position + 1] from the list's beginning to its end, which is the next list's beginning.
    for_each_pair([&](int64_t position, int64_t output, int64_t tap) {
      const int64_t slot = start[position + 1]++;
      output_.as<int64_t>()[slot] = output;
      tap_.as<int64_t>()[slot] = tap;
    });
  }

  FASTCONV_INLINE int64_t begin(int64_t position) const { return start_.as<int64_t>()[position]; }
  FASTCONV_INLINE int64_t end(int64_t position) const { return start_.as<int64_t>()[position + 1]; }
  FASTCONV_INLINE int64_t output(int64_t slot) const { return output_.as<int64_t>()[slot]; }
  FASTCONV_INLINE int64_t tap(int64_t slot) const { return tap_.as<int64_t>()[slot]; }

 private:
  static constexpr int64_t kWord = sizeof(int64_t);
  Scratch start_, output_, tap_;
};

// ---------------------------------------------------------------- NCHW

template <class T, class Offset>
void max_backward_nchw(const PoolProblem& p, const T* grad, const Offset* offsets, T* grad_input) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  const int64_t rows = p.p(), columns = p.q(), planes = p.n * p.c, total = planes * rows * columns;
  const TapTable row_taps(p.h, rows, p.r, p.stride.h, p.padding.h, p.dilation.h);
  parallel_for(0, planes * p.h, grain_for(p.w * 4), [&](int64_t begin, int64_t end) {
    const PhaseRow<Acc> sums(p);
    for (int64_t line = begin, plane = begin / p.h, h = begin % p.h; line < end; ++line) {
      sums.clear(p);
      for (int64_t slot = row_taps.begin(h); slot < row_taps.end(h); ++slot) {
        const int64_t base = (plane * rows + row_taps.output(slot)) * columns;
        for (int64_t q = 0; q < columns; q += kLane) {
          const int64_t index = base + q, live = min_of(kLane, columns - q);
          // Dead lanes carry a zero gradient, so what offset they read does not matter.
          const auto g = live == kLane ? simd::load(grad + index) : simd::load_first(grad + index, live);
          const auto o = index + kLane <= total ? load_offsets<Acc>(offsets + index)
                                                : load_first_offsets<Acc>(offsets + index, live);
          for (int64_t s = 0; s < p.s; ++s) {
            Acc* target = sums.tap(p, s) + q;
            const auto wins = o == broadcast_offset<Acc>(row_taps.tap(slot) * p.s + s);
            simd::store<Acc>(target, simd::load(target) + (wins ? g : simd::zero<Acc>()));
          }
        }
      }
      sums.write(p, grad_input + line * p.w, (end - line) * p.w);
      if (++h == p.h) h = 0, ++plane;
    }
  });
}

// ---------------------------------------------------------------- NHWC

template <class T, class Offset>
struct MaxBackwardPixel {
  const PoolProblem& p;
  const TapTable &row_taps, &column_taps;
  const T* grad;
  const Offset* offsets;
  int64_t columns;

  /// kVectors vectors of channels of input pixel (h, w); `image` is the image's first output row.
  template <int kVectors>
  FASTCONV_INLINE void sum(int64_t image, int64_t h, int64_t w, int64_t channel, int64_t live, T* target) const {
    using Acc = acc_t<T>;
    constexpr int64_t kLane = simd::kLanes<Acc>;
    simd::Vec<Acc> sums[kVectors] = {};
    for (int64_t a = row_taps.begin(h); a < row_taps.end(h); ++a)
      for (int64_t b = column_taps.begin(w); b < column_taps.end(w); ++b) {
        const int64_t index = ((image + row_taps.output(a)) * columns + column_taps.output(b)) * p.c + channel;
        const auto tap = broadcast_offset<Acc>(row_taps.tap(a) * p.s + column_taps.tap(b));
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const auto g = live >= kLane ? simd::load(grad + index + v * kLane) : simd::load_first(grad + index, live);
          const auto o = live >= kLane ? load_offsets<Acc>(offsets + index + v * kLane)
                                       : load_first_offsets<Acc>(offsets + index, live);
          sums[v] += o == tap ? g : simd::zero<Acc>();
        }
      }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      if (live >= kLane) simd::store<T>(target + channel + v * kLane, sums[v]);
      else simd::store_first<T>(target + channel, sums[v], live);
    }
  }
};

template <class T, class Offset>
void max_backward_nhwc(const PoolProblem& p, const T* grad, const Offset* offsets, T* grad_input) {
  constexpr int64_t kLane = simd::kLanes<acc_t<T>>;
  const int64_t rows = p.p();
  const TapTable row_taps(p.h, rows, p.r, p.stride.h, p.padding.h, p.dilation.h);
  const TapTable column_taps(p.w, p.q(), p.s, p.stride.w, p.padding.w, p.dilation.w);
  const MaxBackwardPixel<T, Offset> pixel{p, row_taps, column_taps, grad, offsets, p.q()};
  parallel_for(0, p.n * p.h, grain_for(p.w * p.c * 4), [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const int64_t image = line / p.h * rows, h = line % p.h;
      for (int64_t w = 0; w < p.w; ++w) {
        T* target = grad_input + (line * p.w + w) * p.c;
        int64_t c = 0;
        for (; c + 4 * kLane <= p.c; c += 4 * kLane) pixel.template sum<4>(image, h, w, c, kLane, target);
        for (; c + kLane <= p.c; c += kLane) pixel.template sum<1>(image, h, w, c, kLane, target);
        if (c == p.c) continue;
        if (p.c >= kLane) pixel.template sum<1>(image, h, w, p.c - kLane, kLane, target);
        else pixel.template sum<1>(image, h, w, 0, p.c, target);
      }
    }
  });
}

template <class T, class Offset>
void max_backward(const PoolProblem& p, const T* grad, const Offset* offsets, T* grad_input) {
  if (p.layout == Layout::nchw) max_backward_nchw(p, grad, offsets, grad_input);
  else max_backward_nhwc(p, grad, offsets, grad_input);
}

}  // namespace
}  // namespace fastconv
