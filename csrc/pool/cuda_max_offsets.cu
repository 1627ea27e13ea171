// The two ops that read max pooling's offsets: torch's indices, and the pick that is its tangent.
#include "cuda_support/launchers.h"
#include "pool/cuda_pool.h"
#include "pool/cuda_reduce.cuh"
#include "pool/cuda_select.h"
#include "pool/cuda_shape.cuh"

namespace fastconv::cuda {
namespace {

/// Where an offset points, in the input's rows and columns. Outside the input where a window holds no element of it,
/// which only dilation with padding can do.
struct Winner {
  int h, w;
  __device__ __forceinline__ Winner(const PoolShape& g, const FastDivide& window_columns, const Unit& unit,
                                    uint32_t tap) {
    const int r = window_columns.divide_keep_rest(tap);
    h = static_cast<int>(unit.row) * g.stride_h - g.pad_h + r * g.dilation_h;
    w = static_cast<int>(unit.column) * g.stride_w - g.pad_w + static_cast<int>(tap) * g.dilation_w;
  }
  __device__ __forceinline__ bool inside(const PoolShape& g) const { return h >= 0 && h < g.h && w >= 0 && w < g.w; }
};

/// N channels a thread in NHWC, one output in NCHW. The indices are eight times what else there is to move: 16 bytes
/// are two of them.
template <class Offset, int N>
__global__ __launch_bounds__(kUnitThreads) void max_indices_kernel(PoolShape g, Units units, FastDivide window_columns,
                                                                   const Offset* __restrict__ offsets,
                                                                   int64_t* __restrict__ indices) {
  Unit unit;
  if (!units.find(unit)) return;
  const int64_t index = g.output_at(unit.outer, unit.row, unit.column) + unit.inner * N;
  int tap[N];
  load_offsets<N>(offsets + index, tap);
  constexpr int kEach = N == 1 ? 1 : 2;
#pragma unroll
  for (int first = 0; first < N; first += kEach) {
    Vector<int64_t, kEach> values;
#pragma unroll
    for (int n = 0; n < kEach; ++n) {
      const Winner winner(g, window_columns, unit, tap[first + n]);
      values[n] = static_cast<int64_t>(winner.h) * g.w + winner.w;
    }
    store_vector(indices + index + first, values);
  }
}

template <class Offset, int N, class T>
__global__ __launch_bounds__(kUnitThreads) void max_gather_kernel(PoolShape g, Units units, FastDivide window_columns,
                                                                  const T* __restrict__ x,
                                                                  const Offset* __restrict__ offsets,
                                                                  T* __restrict__ y) {
  Unit unit;
  if (!units.find(unit)) return;
  const int64_t index = g.output_at(unit.outer, unit.row, unit.column) + unit.inner * N;
  int tap[N];
  load_offsets<N>(offsets + index, tap);
  Vector<T, N> values;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const Winner winner(g, window_columns, unit, tap[n]);
    values[n] = from_float<T>(0);
    if (winner.inside(g)) values[n] = x[g.input_at(unit.outer, winner.h, winner.w) + unit.inner * N + n];
  }
  store_vector(y + index, values);
}

template <int N, class Offset>
void indices(const PoolProblem& p, const Offset* offsets, int64_t* to, cudaStream_t stream) {
  const PoolShape g(p);
  for_each_slice(outer_items(p), p.p(), p.q(), inner_channels(p) / N, [&](int64_t first, const Units& units) {
    launch(FASTCONV_KERNEL(max_indices_kernel<Offset, N>), grid_of(units), kUnitThreads, 0, stream, g, units,
           FastDivide(p.s), offsets + first * g.output_outer, to + first * g.output_outer);
  });
}

template <int N, class T, class Offset>
void gather(const PoolProblem& p, const T* x, const Offset* offsets, T* y, cudaStream_t stream) {
  const PoolShape g(p);
  for_each_slice(outer_items(p), p.p(), p.q(), inner_channels(p) / N, [&](int64_t first, const Units& units) {
    launch(FASTCONV_KERNEL(max_gather_kernel<Offset, N, T>), grid_of(units), kUnitThreads, 0, stream, g, units,
           FastDivide(p.s), x + first * g.input_outer, offsets + first * g.output_outer, y + first * g.output_outer);
  });
}

}  // namespace

void launch_max_pool2d_indices(const PoolProblem& p, const void* offsets, void* to, cudaStream_t stream) {
  auto* typed = static_cast<int64_t*>(to);
  if (!offsets_fit_byte(p)) return indices<1>(p, static_cast<const int32_t*>(offsets), typed, stream);
  const auto* bytes = static_cast<const uint8_t*>(offsets);
  if (p.layout == Layout::nhwc && p.c % 4 == 0 && aligned(offsets, 4) && aligned(to, 16))
    return indices<4>(p, bytes, typed, stream);
  indices<1>(p, bytes, typed, stream);
}

void launch_max_pool2d_gather(const PoolProblem& p, const void* x, const void* offsets, void* y, cudaStream_t stream) {
  dispatch_element("max_pool2d_gather", p.dtype, [&](auto element) {
    using T = decltype(element);
    const auto* from = static_cast<const T*>(x);
    auto* to = static_cast<T*>(y);
    if (!offsets_fit_byte(p)) return gather<1>(p, from, static_cast<const int32_t*>(offsets), to, stream);
    const auto* bytes = static_cast<const uint8_t*>(offsets);
    if (channels_are_vectors(p, x, y, offsets)) return gather<kVectorElements<T>>(p, from, bytes, to, stream);
    gather<1>(p, from, bytes, to, stream);
  });
}

FASTCONV_LAUNCHER("max_pool2d_indices", "windows", launch_max_pool2d_indices);
FASTCONV_LAUNCHER("max_pool2d_gather", "windows", launch_max_pool2d_gather);

}  // namespace fastconv::cuda
