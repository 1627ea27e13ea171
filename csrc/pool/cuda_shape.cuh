// A pooling problem as kernels see it: 32-bit sizes, 64-bit distances, the same for both layouts.
#pragma once

#include "cuda_support/units.cuh"
#include "pool/pool.h"

namespace fastconv::cuda {

/// A size of a pooling problem in 32 bits.
inline int pool_size(int64_t value) {
  // Half of the range, so that a position plus a window does not overflow.
  if (value > 0x3fffffff)
    throw std::runtime_error("pooling: a size of " + std::to_string(value) +
                             ", expected at most 1073741823; split the tensor");
  return static_cast<int>(value);
}

/// An outer item is an image in NHWC and a plane in NCHW; `inner` numbers its channels, or is 1. Distances in elements.
struct PoolShape {
  int h, w, p, q, r, s;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int pixel;                          // from a column to the next: C or 1
  int64_t input_row, output_row;      // from a row to the next
  int64_t input_outer, output_outer;  // from an outer item to the next

  explicit PoolShape(const PoolProblem& problem)
      : h(pool_size(problem.h)),
        w(pool_size(problem.w)),
        p(pool_size(problem.p())),
        q(pool_size(problem.q())),
        r(pool_size(problem.r)),
        s(pool_size(problem.s)),
        stride_h(pool_size(problem.stride.h)),
        stride_w(pool_size(problem.stride.w)),
        pad_h(pool_size(problem.padding.h)),
        pad_w(pool_size(problem.padding.w)),
        dilation_h(pool_size(problem.dilation.h)),
        dilation_w(pool_size(problem.dilation.w)),
        pixel(problem.layout == Layout::nhwc ? pool_size(problem.c) : 1),
        input_row(problem.w * pixel),
        output_row(problem.q() * pixel),
        input_outer(input_row * problem.h),
        output_outer(output_row * problem.p()) {}

  __device__ __forceinline__ int64_t input_at(uint32_t outer, int row, int column) const {
    return outer * input_outer + row * input_row + static_cast<int64_t>(column) * pixel;
  }
  __device__ __forceinline__ int64_t output_at(uint32_t outer, int row, int column) const {
    return outer * output_outer + row * output_row + static_cast<int64_t>(column) * pixel;
  }

  /// For launch()'s errors.
  std::string describe() const {
    const auto size = [](int rows, int columns) { return std::to_string(rows) + "x" + std::to_string(columns); };
    return "pooling of planes of " + size(h, w) + " to " + size(p, q) + ", window " + size(r, s) + " stride " +
           size(stride_h, stride_w) + " padding " + size(pad_h, pad_w) + " dilation " + size(dilation_h, dilation_w);
  }
};

/// A distance inside an outer item: 32 bits are enough for planes (N = 1: choose_max sees to it), and cost a third.
template <int N>
__device__ __forceinline__ auto in_plane(int64_t elements) {
  if constexpr (N == 1) return static_cast<int>(elements);
  else return elements;
}

inline int64_t outer_items(const PoolProblem& p) { return p.layout == Layout::nhwc ? p.n : p.n * p.c; }
inline int64_t inner_channels(const PoolProblem& p) { return p.layout == Layout::nhwc ? p.c : 1; }

/// `elements` on; null stays null.
template <class T>
T* advance(T* pointer, int64_t elements) {
  return pointer ? pointer + elements : nullptr;
}

/// The taps of a window along one axis that fall inside the input, [begin, end), and where tap 0 is.
struct Taps {
  int start, begin, end;

  __device__ __forceinline__ Taps(int position, int stride, int pad, int size, int window, int dilation)
      : start(position * stride - pad), begin(0), end(window) {
    if (start < 0) begin = min((dilation - 1 - start) / dilation, window);
    if (start + (window - 1) * dilation >= size)
      end = start >= size ? begin : max(begin, (size - start - 1) / dilation + 1);
  }
  /// The first tap inside; where there is none, a tap outside, which names no element.
  __device__ __forceinline__ int first(int window) const { return min(begin, window - 1); }
};

}  // namespace fastconv::cuda
