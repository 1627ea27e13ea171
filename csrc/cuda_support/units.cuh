// How threads share the work of a memory-bound kernel: one thread per unit, units numbered in memory order, so that
// neighbouring threads touch neighbouring addresses and a block holds several planes where planes are small.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda_support/dtype.h"
#include "cuda_support/fast_divide.h"
#include "cuda_support/launch.h"

namespace fastconv::cuda {

inline constexpr int kUnitThreads = 256;

// A launch numbers its units with 32 bits, because a 64-bit division costs 70 instructions; larger problems are
// launched in slices. The tests make slices small to run that path.
#if !defined(FASTCONV_UNITS_PER_LAUNCH)
#define FASTCONV_UNITS_PER_LAUNCH 0x7fff0000
#endif

/// One thread's work: an outer item (an image in NHWC, a plane in NCHW), a row, a column, and a vector of channels
/// (NHWC) or nothing (NCHW: inner is 0).
struct Unit {
  uint32_t outer, row, column, inner;
};

struct Units {
  FastDivide rows, columns, inner;
  uint32_t count = 0;

  Units() = default;
  Units(int64_t outer, int64_t rows_, int64_t columns_, int64_t inner_)
      : rows(rows_),
        columns(columns_),
        inner(inner_),
        count(static_cast<uint32_t>(outer * rows_ * columns_ * inner_)) {}

  /// False for the threads of the last block that have no unit.
  __device__ __forceinline__ bool find(Unit& unit) const {
    uint32_t index = blockIdx.x * kUnitThreads + threadIdx.x;
    if (index >= count) return false;
    const uint32_t pixel = inner.divide_keep_rest(index);
    unit.inner = index;
    uint32_t rest = pixel;
    const uint32_t line = columns.divide_keep_rest(rest);
    unit.column = rest;
    rest = line;
    unit.outer = rows.divide_keep_rest(rest);
    unit.row = rest;
    return true;
  }
};

/// body(first, units) for slices of the outer axis that 32 bits can number.
template <class Body>
void for_each_slice(int64_t outer, int64_t rows, int64_t columns, int64_t inner, const Body& body) {
  constexpr int64_t kLimit = FASTCONV_UNITS_PER_LAUNCH, kLargest = 0x7fff0000;
  const int64_t each = rows * columns * inner;
  if (each == 0) return;
  if (each > kLargest)
    throw std::runtime_error("one image has " + std::to_string(each) + " units of work, expected at most " +
                             std::to_string(kLargest) + "; split the image");
  const int64_t step = std::max<int64_t>(1, kLimit / each);
  for (int64_t first = 0; first < outer; first += step)
    body(first, Units(std::min(step, outer - first), rows, columns, inner));
}

inline dim3 grid_of(const Units& units) { return {blocks_for(units.count, kUnitThreads)}; }

/// A vector as one access; streaming, for what is read once, where it has 16 bytes. Results are stored normally: the
/// next layer reads them.
template <bool kStreaming, int N, class T>
__device__ __forceinline__ Vector<T, N> load_units(const T* from) {
  if constexpr (kStreaming && sizeof(T) * N == 16) return load_streaming<N>(from);
  else return load_vector<N>(from);
}

}  // namespace fastconv::cuda
