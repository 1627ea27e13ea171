// Global average pooling: the mean of each plane, and its adjoint.
#include <type_traits>

#include "cuda_support/launchers.h"
#include "cuda_support/reduce.cuh"
#include "pool/cuda_pool.h"
#include "pool/cuda_select.h"
#include "pool/cuda_shape.cuh"

namespace fastconv::cuda {
namespace {

constexpr int kBatch = 8;  // loads of one thread in flight together: all that 7 x 7 needs with 8 threads

/// Adds up load(i), a Vector<T, N>, for i = first, first + step, ... below count; three levels of partial sums, so that
/// a plane of millions keeps its digits.
template <int N, class Load>
__device__ __forceinline__ void sum_in_levels(int64_t first, int64_t count, int64_t step, float (&total)[N],
                                              const Load& load) {
  constexpr int kBatches = 8, kParts = 64;
  int64_t i = first;
  while (i < count) {
    float middle[N] = {};
    for (int part = 0; part < kParts && i < count; ++part) {
      float sum[N] = {};
      for (int batch = 0; batch < kBatches && i < count; ++batch, i += kBatch * step) {
        decltype(load(i)) values[kBatch];
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          values[k] = {};
          if (i + k * step < count) values[k] = load(i + k * step);
        }
#pragma unroll
        for (int k = 0; k < kBatch; ++k)
#pragma unroll
          for (int n = 0; n < N; ++n) sum[n] += to_float(values[k][n]);
      }
#pragma unroll
      for (int n = 0; n < N; ++n) middle[n] += sum[n];
    }
#pragma unroll
    for (int n = 0; n < N; ++n) total[n] += middle[n];
  }
}

// ---------------------------------------------------------------- NCHW

constexpr int kSmallPlanes = 64;                          // in a block: any size of plane then starts on 16 bytes
constexpr int kPlaneLanes = kUnitThreads / kSmallPlanes;  // threads that add up one plane
static_assert(kSmallPlanes * kPlaneLanes == kUnitThreads && kSmallPlanes * 2 % 16 == 0);
constexpr int64_t kSmallBytes = 56 << 10;  // of a block's planes: 14 x 14 in float32, four blocks to a multiprocessor

/// Planes of 7 x 7 or 14 x 14: a block copies 64 of them, one stretch of memory, to shared memory with 16-byte loads,
/// whatever the size of a plane; then four threads add up each.
template <class T>
__global__ __launch_bounds__(kUnitThreads) void global_planes_kernel(const T* __restrict__ x, T* __restrict__ y,
                                                                     int64_t planes, int plane, bool vectors) {
  FASTCONV_DYNAMIC_SHARED(raw);
  T* staged = reinterpret_cast<T*>(raw);
  constexpr int kLanes = kVectorElements<T>;
  const int64_t first = int64_t{blockIdx.x} * kSmallPlanes;
  const int here = static_cast<int>(min(int64_t{kSmallPlanes}, planes - first)), total = here * plane;
  const T* from = x + first * plane;
  const int whole = vectors ? total / kLanes : 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < whole; i += kUnitThreads)
    store_vector(staged + i * kLanes, load_streaming<kLanes>(from + int64_t{i} * kLanes));
#pragma unroll 1
  for (int i = whole * kLanes + threadIdx.x; i < total; i += kUnitThreads) staged[i] = from[i];
  __syncthreads();
  const int mine = threadIdx.x / kPlaneLanes, lane = threadIdx.x % kPlaneLanes;
  float sum = 0;
  if (mine < here)
    for (int i = lane; i < plane; i += kPlaneLanes) sum += to_float(staged[mine * plane + i]);
#pragma unroll
  for (int distance = kPlaneLanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  if (lane == 0 && mine < here) y[first + mine] = from_float<T>(sum / static_cast<float>(plane));
}

/// A block for each larger plane.
template <int N, class T>
__global__ __launch_bounds__(kUnitThreads) void global_plane_kernel(const T* __restrict__ x, T* __restrict__ y,
                                                                    int64_t plane) {
  const T* from = x + int64_t{blockIdx.x} * plane;
  float sums[N] = {};
  sum_in_levels<N>(threadIdx.x, plane / N, kUnitThreads, sums,
                   [&](int64_t i) { return load_units<true, N>(from + i * N); });
  float sum = 0;
#pragma unroll
  for (int n = 0; n < N; ++n) sum += sums[n];
  sum = block_sum<kUnitThreads>(sum);
  if (threadIdx.x == 0) y[blockIdx.x] = from_float<T>(sum / static_cast<float>(plane));
}

/// An outer item is kLanes planes, which is `plane` vectors of kLanes elements: 16-byte stores, whatever the size of a
/// plane. `planes` and the pointers count from this launch's first plane.
template <class T>
__global__ __launch_bounds__(kUnitThreads) void global_backward_planes_kernel(Units units, FastDivide by_plane,
                                                                              int64_t planes, bool vectors,
                                                                              const T* __restrict__ grad,
                                                                              T* __restrict__ grad_input) {
  constexpr int kLanes = kVectorElements<T>;
  Unit unit;
  if (!units.find(unit)) return;
  const uint32_t plane = by_plane.divisor, start = unit.column * kLanes;
  const float count = static_cast<float>(plane);
  const int64_t first = int64_t{unit.outer} * kLanes;
  const uint32_t current = by_plane.divide(start);
  if (first + current >= planes) return;
  const auto share_of = [&](uint32_t which) {
    return from_float<T>(to_float(grad[min(first + which, planes - 1)]) / count);
  };
  // Where the next plane begins: past the vector, inside it, or several times in it.
  const int next = static_cast<int>(min((current + 1) * plane - start, uint32_t{kLanes}));
  Vector<T, kLanes> values;
  if (plane >= kLanes) {
    const T here = share_of(current), after = share_of(current + 1);
#pragma unroll
    for (int n = 0; n < kLanes; ++n) values[n] = n < next ? here : after;
  } else {
#pragma unroll
    for (int n = 0; n < kLanes; ++n) values[n] = share_of(by_plane.divide(start + n));
  }
  const int live = static_cast<int>(min((planes - first) * plane - start, int64_t{kLanes}));
  T* to = grad_input + first * plane + start;
  if (vectors && live == kLanes) {
    store_streaming(to, values);
  } else {
#pragma unroll
    for (int n = 0; n < kLanes; ++n)
      if (n < live) to[n] = values[n];
  }
}

// ---------------------------------------------------------------- NHWC

/// A block: `lanes` vectors of channels of one image by kUnitThreads / lanes groups of pixels. Groups are added in
/// order.
template <int N, class T>
__global__ __launch_bounds__(kUnitThreads) void global_channels_kernel(const T* __restrict__ x, T* __restrict__ y,
                                                                       FastDivide chunks, int64_t plane, int vectors,
                                                                       int lanes) {
  FASTCONV_SHARED(partial, float[N][kUnitThreads]);
  uint32_t chunk = blockIdx.x;
  const int64_t image = chunks.divide_keep_rest(chunk);
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = kUnitThreads / lanes;
  const int vector = chunk * lanes + lane;
  const int64_t channels = int64_t{vectors} * N;
  float sums[N] = {};
  if (vector < vectors) {
    const T* from = x + image * plane * channels + int64_t{vector} * N;
    sum_in_levels<N>(group, plane, groups, sums, [&](int64_t i) { return load_units<true, N>(from + i * channels); });
  }
#pragma unroll
  for (int n = 0; n < N; ++n) partial[n][threadIdx.x] = sums[n];
  __syncthreads();
  for (int value = threadIdx.x; value < N * lanes; value += kUnitThreads) {
    const int n = value / lanes, of = value % lanes;
    if (static_cast<int>(chunk) * lanes + of >= vectors) continue;
    float sum = 0;
    for (int other = 0; other < groups; ++other) sum += partial[n][other * lanes + of];
    y[image * channels + (int64_t{chunk} * lanes + of) * N + n] = from_float<T>(sum / static_cast<float>(plane));
  }
}

constexpr int kPixelsEach = 4;  // that one thread writes: a load and N divisions serve them all

template <int N, class T>
__global__ __launch_bounds__(kUnitThreads) void global_backward_channels_kernel(Units units, int64_t plane,
                                                                                int64_t channels,
                                                                                const T* __restrict__ grad,
                                                                                T* __restrict__ grad_input) {
  Unit unit;
  if (!units.find(unit)) return;
  const auto value = load_vector<N>(grad + unit.outer * channels + unit.inner * N);
  float share[N];
#pragma unroll
  for (int n = 0; n < N; ++n) share[n] = to_float(value[n]) / static_cast<float>(plane);
  const auto rounded = from_float<T, N>(share);
  const int64_t first = int64_t{unit.column} * kPixelsEach;
  T* to = grad_input + (unit.outer * plane + first) * channels + unit.inner * N;
#pragma unroll
  for (int i = 0; i < kPixelsEach; ++i)
    if (first + i < plane) store_vector(to + i * channels, rounded);
}

// ---------------------------------------------------------------- launches

template <class T>
void global_nchw(const PoolProblem& p, const T* x, T* y, cudaStream_t stream) {
  constexpr int kLanes = kVectorElements<T>;
  const int64_t plane = p.h * p.w, planes = p.n * p.c, bytes = kSmallPlanes * plane * static_cast<int64_t>(sizeof(T));
  if (bytes <= kSmallBytes) {
    launch(FASTCONV_KERNEL(global_planes_kernel<T>), blocks_for(planes, kSmallPlanes), kUnitThreads, bytes, stream, x,
           y, planes, static_cast<int>(plane), aligned(x, 16));
  } else if (aligned(x, 16) && plane % kLanes == 0) {
    launch(FASTCONV_KERNEL(global_plane_kernel<kLanes, T>), blocks_for(planes, 1), kUnitThreads, 0, stream, x, y,
           plane);
  } else {
    launch(FASTCONV_KERNEL(global_plane_kernel<1, T>), blocks_for(planes, 1), kUnitThreads, 0, stream, x, y, plane);
  }
}

template <int N, class T>
void global_nhwc(const PoolProblem& p, const T* x, T* y, cudaStream_t stream) {
  const int64_t vectors = p.c / N;
  if (vectors == 0) return;
  const int lanes = vectors > 16 ? 32 : vectors > 8 ? 16 : 8;
  const int64_t chunks = ceil_div(vectors, lanes);
  launch(FASTCONV_KERNEL(global_channels_kernel<N, T>), blocks_for(p.n * chunks, 1), kUnitThreads, 0, stream, x, y,
         FastDivide(chunks), p.h * p.w, static_cast<int>(vectors), lanes);
}

template <class T>
void global_backward_nchw(const PoolProblem& p, const T* grad, T* grad_input, cudaStream_t stream) {
  constexpr int kLanes = kVectorElements<T>;
  const int64_t plane = p.h * p.w, planes = p.n * p.c;
  if (plane > 0x7fffffff / kLanes)
    throw std::runtime_error("global average: a plane of " + std::to_string(plane) + " elements, expected at most " +
                             std::to_string(0x7fffffff / kLanes) + "; use channels_last");
  for_each_slice(ceil_div(planes, kLanes), 1, plane, 1, [&](int64_t first, const Units& units) {
    const int64_t before = first * kLanes;
    launch(FASTCONV_KERNEL(global_backward_planes_kernel<T>), grid_of(units), kUnitThreads, 0, stream, units,
           FastDivide(plane), planes - before, aligned(grad_input, 16), grad + before, grad_input + before * plane);
  });
}

template <int N, class T>
void global_backward_nhwc(const PoolProblem& p, const T* grad, T* grad_input, cudaStream_t stream) {
  const int64_t plane = p.h * p.w;
  for_each_slice(p.n, 1, ceil_div(plane, kPixelsEach), p.c / N, [&](int64_t first, const Units& units) {
    launch(FASTCONV_KERNEL(global_backward_channels_kernel<N, T>), grid_of(units), kUnitThreads, 0, stream, units,
           plane, p.c, grad + first * p.c, grad_input + first * plane * p.c);
  });
}

}  // namespace

void launch_global_avg_pool2d(const PoolProblem& p, const void* x, void* y, cudaStream_t stream) {
  dispatch_element("global_avg_pool2d", p.dtype, [&](auto element) {
    using T = decltype(element);
    const T* from = static_cast<const T*>(x);
    T* to = static_cast<T*>(y);
    if (p.layout == Layout::nchw) global_nchw(p, from, to, stream);
    else if (channels_are_vectors(p, x, y, nullptr)) global_nhwc<kVectorElements<T>>(p, from, to, stream);
    else global_nhwc<1>(p, from, to, stream);
  });
}

void launch_global_avg_pool2d_backward(const PoolProblem& p, const void* grad, void* grad_input, cudaStream_t stream) {
  dispatch_element("global_avg_pool2d_backward", p.dtype, [&](auto element) {
    using T = decltype(element);
    const T* from = static_cast<const T*>(grad);
    T* to = static_cast<T*>(grad_input);
    if (p.layout == Layout::nchw) global_backward_nchw(p, from, to, stream);
    else if (channels_are_vectors(p, grad_input, grad, nullptr))
      global_backward_nhwc<kVectorElements<T>>(p, from, to, stream);
    else global_backward_nhwc<1>(p, from, to, stream);
  });
}

FASTCONV_LAUNCHER("adaptive_avg_pool2d", "global", launch_global_avg_pool2d);
FASTCONV_LAUNCHER("adaptive_avg_pool2d_backward", "global", launch_global_avg_pool2d_backward);

}  // namespace fastconv::cuda
