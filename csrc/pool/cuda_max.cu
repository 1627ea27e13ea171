// Max pooling forward: picks the kernel.
#include <cstdio>

#include "cuda_support/launchers.h"
#include "pool/cuda_max.cuh"
#include "pool/cuda_pool.h"
#include "pool/cuda_select.h"

namespace fastconv::cuda {
namespace {

template <class Reduction, int N, class T>
void max_general(const PoolProblem& p, const T* x, T* y, typename Reduction::Offset* offsets, cudaStream_t stream) {
  const PoolShape g(p);
  for_each_slice(outer_items(p), p.p(), p.q(), inner_channels(p) / N, [&](int64_t first, const Units& units) {
    launch(FASTCONV_KERNEL(max_general_kernel<Reduction, N, T>), grid_of(units), kUnitThreads, 0, stream, g, units,
           x + first * g.input_outer, y + first * g.output_outer, advance(offsets, first * g.output_outer));
  });
}

template <class Reduction, int N, int kWindow, bool kInside, class T>
void max_square(const PoolProblem& p, const T* x, T* y, uint8_t* offsets, cudaStream_t stream) {
  const PoolShape g(p);
  const int64_t rows = ceil_div(p.p(), output_rows(kWindow));
  for_each_slice(outer_items(p), rows, p.q(), inner_channels(p) / N, [&](int64_t first, const Units& units) {
    launch(FASTCONV_KERNEL(max_square_kernel<Reduction, N, kWindow, kInside, T>), grid_of(units), kUnitThreads, 0,
           stream, g, units, x + first * g.input_outer, y + first * g.output_outer,
           advance(offsets, first * g.output_outer));
  });
}

template <class Reduction, int kWindow, class T>
void max_rows(const PoolProblem& p, const T* x, T* y, uint8_t* offsets, cudaStream_t stream) {
  const PoolShape g(p);
  const int64_t rows = ceil_div(p.p(), output_rows(kWindow));
  for_each_slice(outer_items(p), rows, p.w / kVectorElements<T>, 1, [&](int64_t first, const Units& units) {
    launch(FASTCONV_KERNEL(max_rows_kernel<Reduction, kWindow, T>), grid_of(units), kUnitThreads, 0, stream, g, units,
           x + first * g.input_outer, y + first * g.output_outer, advance(offsets, first * g.output_outer));
  });
}

template <template <class, int> class kReduction, int kWindow, class T>
void max_square(const PoolChoice& choice, const PoolProblem& p, const T* x, T* y, uint8_t* offsets,
                cudaStream_t stream) {
  constexpr int kLanes = kVectorElements<T>;
  if (choice.vectors) return max_square<kReduction<T, kLanes>, kLanes, kWindow, false>(p, x, y, offsets, stream);
  // One element a thread: instructions are what limits it, so those for edges are left out where there are none.
  if (windows_are_inside(p)) return max_square<kReduction<T, 1>, 1, kWindow, true>(p, x, y, offsets, stream);
  max_square<kReduction<T, 1>, 1, kWindow, false>(p, x, y, offsets, stream);
}

/// kReduction<T, N> is one of the two running maxima with byte offsets.
template <template <class, int> class kReduction, class T>
void max_byte(const PoolChoice& choice, const PoolProblem& p, const T* x, T* y, uint8_t* offsets, cudaStream_t stream) {
  constexpr int kLanes = kVectorElements<T>;
  switch (choice.path) {
    case PoolPath::rows:
      if (choice.window == 2) return max_rows<kReduction<T, kLanes / 2>, 2>(p, x, y, offsets, stream);
      return max_rows<kReduction<T, kLanes / 2>, 3>(p, x, y, offsets, stream);
    case PoolPath::square:
      if (choice.window == 2) return max_square<kReduction, 2>(choice, p, x, y, offsets, stream);
      return max_square<kReduction, 3>(choice, p, x, y, offsets, stream);
    case PoolPath::general:
      if (choice.vectors) return max_general<kReduction<T, kLanes>, kLanes>(p, x, y, offsets, stream);
      return max_general<kReduction<T, 1>, 1>(p, x, y, offsets, stream);
  }
  throw std::logic_error("max_pool2d: unknown kernel");
}

template <class T, int N>
using MaxByteOffset = RunningMaxOffset<T, N, uint8_t>;

}  // namespace

void launch_max_pool2d(const PoolProblem& p, const void* x, void* y, void* offsets, cudaStream_t stream) {
  const PoolChoice choice = choose_max(p, x, y, offsets);
  dispatch_element("max_pool2d", p.dtype, [&](auto element) {
    using T = decltype(element);
    const T* from = static_cast<const T*>(x);
    T* to = static_cast<T*>(y);
    if (!offsets) max_byte<RunningMax>(choice, p, from, to, nullptr, stream);
    else if (offsets_fit_byte(p)) max_byte<MaxByteOffset>(choice, p, from, to, static_cast<uint8_t*>(offsets), stream);
    else max_general<RunningMaxOffset<T, 1, int32_t>, 1>(p, from, to, static_cast<int32_t*>(offsets), stream);
  });
}

void explain_max_pool2d(const PoolProblem& p, const void* wide, const void* narrow, const void* offsets, void* text,
                        int64_t bytes) {
  const std::string reason = describe(choose_max(p, wide, narrow, offsets));
  std::snprintf(static_cast<char*>(text), static_cast<size_t>(bytes), "%s", reason.c_str());
}

FASTCONV_LAUNCHER("max_pool2d", "windows", launch_max_pool2d);
FASTCONV_LAUNCHER("explain_max_pool2d", "windows", explain_max_pool2d);

}  // namespace fastconv::cuda
