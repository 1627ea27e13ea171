// Average pooling over the windows of two AverageAxis tables, and its adjoint.
//
// NHWC needs nothing but the tables: lanes are channels, so regular and adaptive windows are the same kernel. NCHW
// walks a regular grid with cpu_windows.h; an adaptive one sums its rows first, lanes along W, and each output then
// adds up its columns of that sum.
#pragma once

#include "pool/cpu_phase_row.h"
#include "pool/cpu_windows.h"

namespace fastconv {
namespace {

/// The divisors' column factors in the accumulator's type, with a vector of slack; with an override, that everywhere.
template <class Acc>
class ColumnDivisors {
 public:
  explicit ColumnDivisors(const AverageProblem& p)
      : override_(static_cast<Acc>(p.divisor_override)),
        counts_((p.columns.positions + simd::kLanes<Acc>)*static_cast<int64_t>(sizeof(Acc))) {
    const int64_t padded = p.columns.positions + simd::kLanes<Acc>;
    for (int64_t q = 0; q < padded; ++q)
      counts_.template as<Acc>()[q] =
          override_ != 0 ? override_ : static_cast<Acc>(q < p.columns.positions ? p.columns.count[q] : 1);
  }
  /// What row i multiplies the column factors by.
  FASTCONV_INLINE Acc row_factor(const AverageProblem& p, int64_t i) const {
    return override_ != 0 ? Acc(1) : static_cast<Acc>(p.rows.count[i]);
  }
  FASTCONV_INLINE Acc at(const AverageProblem& p, int64_t i, int64_t q) const {
    return row_factor(p, i) * counts_.template as<Acc>()[q];
  }
  /// Of kLanes outputs from column q.
  FASTCONV_INLINE simd::Vec<Acc> lanes(const AverageProblem& p, int64_t i, int64_t q) const {
    return simd::load(counts_.template as<Acc>() + q) * simd::broadcast<Acc>(row_factor(p, i));
  }

 private:
  Acc override_;
  Scratch counts_;
};

template <class T>
struct AverageSink {
  const AverageProblem& p;
  const ColumnDivisors<acc_t<T>>& divisors;
  T* y;

  template <class Reduction>
  FASTCONV_INLINE void put(const Reduction& reduction, int64_t index, int64_t live, int64_t i, int64_t q,
                           bool whole) const {
    const auto mean = reduction.value / divisors.lanes(p, i, q);
    if (whole) simd::store<T>(y + index, mean);
    else simd::store_first<T>(y + index, mean, live);
  }
};

template <class T>
void average_nhwc(const AverageProblem& p, const ColumnDivisors<acc_t<T>>& divisors, const T* x, T* y) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  const int64_t rows = p.rows.positions, columns = p.columns.positions;
  const int64_t window = ceil_div(p.rows.size, rows) * ceil_div(p.columns.size, columns);
  parallel_for(0, p.n * rows * columns, grain_for(p.c * window), [&](int64_t begin, int64_t end) {
    int64_t q = begin % columns, i = begin / columns % rows, image = begin / columns / rows;
    for (int64_t pixel = begin; pixel < end; ++pixel) {
      const int64_t first_row = image * p.rows.size + p.rows.begin[i];
      const WindowPixels<T> pixels{x + (first_row * p.columns.size + p.columns.begin[q]) * p.c,
                                   p.rows.end[i] - p.rows.begin[i],
                                   p.columns.size * p.c,
                                   p.columns.end[q] - p.columns.begin[q],
                                   p.c,
                                   0,
                                   0};
      const auto divisor = simd::broadcast<Acc>(divisors.at(p, i, q));
      reduce_pixel<RunningSum<Acc>>(pixels, p.c, [&](const RunningSum<Acc>& sum, int64_t channel) {
        T* target = y + pixel * p.c + channel;
        if (p.c >= kLane) simd::store<T>(target, sum.value / divisor);
        else simd::store_first<T>(target, sum.value / divisor, p.c);
      });
      if (++q < columns) continue;
      q = 0;
      if (++i == rows) i = 0, ++image;
    }
  });
}

/// sums[w] = sum over the rows [begin, end) of a plane; `sums` has a vector of slack.
template <class T>
FASTCONV_INLINE void add_rows(const T* plane, int64_t begin, int64_t end, int64_t width, acc_t<T>* sums) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  for (int64_t w = 0; w < width; w += kLane) {
    auto sum = simd::zero<Acc>();
    const int64_t live = min_of(kLane, width - w);
    for (int64_t h = begin; h < end; ++h)
      sum += live == kLane ? simd::load(plane + h * width + w) : simd::load_first(plane + h * width + w, live);
    simd::store<Acc>(sums + w, sum);
  }
}

template <class T>
void average_nchw_adaptive(const AverageProblem& p, const ColumnDivisors<acc_t<T>>& divisors, const T* x, T* y) {
  using Acc = acc_t<T>;
  const int64_t rows = p.rows.positions, columns = p.columns.positions, h = p.rows.size, w = p.columns.size;
  parallel_for(0, p.n * p.c * rows, grain_for(w * ceil_div(h, rows) + columns), [&](int64_t begin, int64_t end) {
    Scratch sums((w + simd::kLanes<Acc>)*static_cast<int64_t>(sizeof(Acc)));
    for (int64_t row = begin; row < end; ++row) {
      const int64_t i = row % rows;
      add_rows(x + row / rows * h * w, p.rows.begin[i], p.rows.end[i], w, sums.as<Acc>());
      for (int64_t q = 0; q < columns; ++q) {
        Acc sum = 0;
        for (int64_t j = p.columns.begin[q]; j < p.columns.end[q]; ++j) sum += sums.as<Acc>()[j];
        y[row * columns + q] = simd::narrow<T>(sum / divisors.at(p, i, q));
      }
    }
  });
}

template <class T>
void average(const AverageProblem& p, const T* x, T* y) {
  const ColumnDivisors<acc_t<T>> divisors(p);
  if (p.layout == Layout::nhwc) average_nhwc(p, divisors, x, y);
  else if (p.regular) walk_nchw_any<RunningSum<acc_t<T>>>(p.grid, x, AverageSink<T>{p, divisors, y});
  else average_nchw_adaptive(p, divisors, x, y);
}

// ---------------------------------------------------------------- adjoint

/// kVectors vectors of channels of input pixel (h, w); `first_output_row` is the image's first row of outputs.
template <int kVectors, class T>
FASTCONV_INLINE void average_backward_pixel(const AverageProblem& p, const ColumnDivisors<acc_t<T>>& divisors,
                                            const T* grad, int64_t first_output_row, int64_t h, int64_t w,
                                            int64_t channel, int64_t live, T* target) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  simd::Vec<Acc> sums[kVectors] = {};
  for (int64_t i = p.rows.first[h]; i < p.rows.last[h]; ++i)
    for (int64_t q = p.columns.first[w]; q < p.columns.last[w]; ++q) {
      const T* source = grad + ((first_output_row + i) * p.columns.positions + q) * p.c + channel;
      const auto divisor = simd::broadcast<Acc>(divisors.at(p, i, q));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        sums[v] += (live >= kLane ? simd::load(source + v * kLane) : simd::load_first(source, live)) / divisor;
    }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    if (live >= kLane) simd::store<T>(target + channel + v * kLane, sums[v]);
    else simd::store_first<T>(target + channel, sums[v], live);
  }
}

template <class T>
void average_backward_nhwc(const AverageProblem& p, const ColumnDivisors<acc_t<T>>& divisors, const T* grad,
                           T* grad_input) {
  constexpr int64_t kLane = simd::kLanes<acc_t<T>>;
  const int64_t h = p.rows.size, w = p.columns.size;
  parallel_for(0, p.n * h, grain_for(w * p.c * 4), [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const int64_t image = line / h * p.rows.positions, row = line % h;
      for (int64_t column = 0; column < w; ++column) {
        T* target = grad_input + (line * w + column) * p.c;
        int64_t c = 0;
        for (; c + 4 * kLane <= p.c; c += 4 * kLane)
          average_backward_pixel<4>(p, divisors, grad, image, row, column, c, kLane, target);
        for (; c + kLane <= p.c; c += kLane)
          average_backward_pixel<1>(p, divisors, grad, image, row, column, c, kLane, target);
        if (c == p.c) continue;
        if (p.c >= kLane) average_backward_pixel<1>(p, divisors, grad, image, row, column, p.c - kLane, kLane, target);
        else average_backward_pixel<1>(p, divisors, grad, image, row, column, 0, p.c, target);
      }
    }
  });
}

/// shares[q] = what each input element of row h gets from the windows of output column q.
template <class T>
FASTCONV_INLINE void gather_shares(const AverageProblem& p, const ColumnDivisors<acc_t<T>>& divisors, const T* grad,
                                   int64_t plane, int64_t h, acc_t<T>* shares) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  const int64_t columns = p.columns.positions;
  for (int64_t q = 0; q < columns; q += kLane) {
    const int64_t live = min_of(kLane, columns - q);
    auto share = simd::zero<Acc>();
    for (int64_t i = p.rows.first[h]; i < p.rows.last[h]; ++i) {
      const T* source = grad + (plane * p.rows.positions + i) * columns + q;
      share += (live == kLane ? simd::load(source) : simd::load_first(source, live)) / divisors.lanes(p, i, q);
    }
    // Dead lanes are 0 / 1, except under an override: 0 / override, zero as well.
    simd::store<Acc>(shares + q, share);
  }
}

template <class T>
void average_backward_nchw(const AverageProblem& p, const ColumnDivisors<acc_t<T>>& divisors, const T* grad,
                           T* grad_input) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  const int64_t h = p.rows.size, w = p.columns.size, columns = p.columns.positions;
  parallel_for(0, p.n * p.c * h, grain_for(w * 4), [&](int64_t begin, int64_t end) {
    Scratch shares((columns + kLane) * static_cast<int64_t>(sizeof(Acc)));
    const PhaseRow<Acc> sums(p.grid);
    for (int64_t line = begin; line < end; ++line) {
      gather_shares(p, divisors, grad, line / h, line % h, shares.as<Acc>());
      T* target = grad_input + line * w;
      if (p.regular) {
        sums.clear(p.grid);
        for (int64_t s = 0; s < p.grid.s; ++s) {
          Acc* phase = sums.tap(p.grid, s);
          for (int64_t q = 0; q < columns; q += kLane)
            simd::store<Acc>(phase + q, simd::load(phase + q) + simd::load(shares.as<Acc>() + q));
        }
        sums.write(p.grid, target, (end - line) * w);
        continue;
      }
      for (int64_t column = 0; column < w; ++column) {
        Acc sum = 0;
        for (int64_t q = p.columns.first[column]; q < p.columns.last[column]; ++q) sum += shares.as<Acc>()[q];
        target[column] = simd::narrow<T>(sum);
      }
    }
  });
}

template <class T>
void average_backward(const AverageProblem& p, const T* grad, T* grad_input) {
  const ColumnDivisors<acc_t<T>> divisors(p);
  if (p.layout == Layout::nhwc) average_backward_nhwc(p, divisors, grad, grad_input);
  else average_backward_nchw(p, divisors, grad, grad_input);
}

}  // namespace
}  // namespace fastconv
