// NHWC, windows of five channels: a thread takes 16 bytes of channels of one pixel, and four channels on each side,
// which its neighbours' loads bring. Nothing is shared between threads but the cache.
#pragma once

#include "norm/cuda_power.cuh"

namespace fastconv::cuda {
namespace {

/// Channels on each side of a thread's own: the windows of the windows.
constexpr int kMargin = 2 * kSide;

/// N channels of a pixel between margins, in float32; zero where there is no channel.
template <int N>
struct PixelChannels {
  float values[N + 2 * kMargin];

  template <class T>
  __device__ __forceinline__ PixelChannels(const T* own, bool has_before, bool has_after) {
    const Vector<T, kMargin> none = {};
    const auto before = has_before ? load_vector<kMargin>(own - kMargin) : none;
    const auto middle = load_vector<N>(own);
    const auto after = has_after ? load_vector<kMargin>(own + N) : none;
#pragma unroll
    for (int i = 0; i < kMargin; ++i) values[i] = to_float(before[i]), values[kMargin + N + i] = to_float(after[i]);
#pragma unroll
    for (int i = 0; i < N; ++i) values[kMargin + i] = to_float(middle[i]);
  }
  /// Channel i of the thread's own, from -kMargin on.
  __device__ __forceinline__ float own(int i) const { return values[kMargin + i]; }
  /// The first channel of its window.
  __device__ __forceinline__ const float* window(int i) const { return values + kMargin + i - kSide; }
};

/// Which channels a thread has.
template <int N>
struct ChannelPlace {
  int64_t index;
  bool has_before, has_after;
  __device__ __forceinline__ ChannelPlace(const Unit& unit, int channels, uint32_t plane)
      : index((int64_t{unit.outer} * plane + unit.column) * channels + unit.inner * N),
        has_before(unit.inner > 0),
        has_after(static_cast<int>((unit.inner + 1) * N) < channels) {}
};

template <int N, class T>
__global__ __launch_bounds__(kUnitThreads) void response_channels_kernel(Response<false> response, Units units,
                                                                         const T* __restrict__ x, T* __restrict__ y) {
  Unit unit;
  if (!units.find(unit)) return;
  const ChannelPlace<N> place(unit, response.channels, units.columns.divisor);
  const PixelChannels<N> values(x + place.index, place.has_before, place.has_after);
  float result[N];
#pragma unroll
  for (int i = 0; i < N; ++i)
    result[i] = response.forward(values.own(i), window_product(values.window(i), values.window(i)));
  store_vector(y + place.index, from_float<T, N>(result));
}

template <int N, class T>
__global__ __launch_bounds__(kUnitThreads) void response_channels_jvp_kernel(Response<false> response, Units units,
                                                                             const T* __restrict__ x,
                                                                             const T* __restrict__ tangent,
                                                                             T* __restrict__ y_tangent) {
  Unit unit;
  if (!units.find(unit)) return;
  const ChannelPlace<N> place(unit, response.channels, units.columns.divisor);
  const PixelChannels<N> values(x + place.index, place.has_before, place.has_after);
  const PixelChannels<N> along(tangent + place.index, place.has_before, place.has_after);
  float result[N];
#pragma unroll
  for (int i = 0; i < N; ++i)
    result[i] = response.jvp(values.own(i), along.own(i), window_product(values.window(i), values.window(i)),
                             window_product(values.window(i), along.window(i)));
  store_vector(y_tangent + place.index, from_float<T, N>(result));
}

/// The shares of the two channels on each side are computed again, which is cheaper than to exchange them.
template <int N, class T>
__global__ __launch_bounds__(kUnitThreads) void response_channels_backward_kernel(Response<false> response, Units units,
                                                                                  const T* __restrict__ grad,
                                                                                  const T* __restrict__ x,
                                                                                  T* __restrict__ grad_input) {
  Unit unit;
  if (!units.find(unit)) return;
  const ChannelPlace<N> place(unit, response.channels, units.columns.divisor);
  const PixelChannels<N> values(x + place.index, place.has_before, place.has_after);
  const PixelChannels<N> grads(grad + place.index, place.has_before, place.has_after);
  float direct[N + 2 * kSide], share[N + 2 * kSide];
#pragma unroll
  for (int i = -kSide; i < N + kSide; ++i) {
    response.backward(grads.own(i), values.own(i), window_product(values.window(i), values.window(i)),
                      direct[kSide + i], share[kSide + i]);
    // A channel that does not exist has no share, not even 0 / 0 where k is 0.
    if (i < 0 ? !place.has_before : i >= N && !place.has_after) share[kSide + i] = 0;
  }
  float result[N];
#pragma unroll
  for (int i = 0; i < N; ++i) result[i] = response.combine(direct[kSide + i], values.own(i), window_sum(share + i));
  store_vector(grad_input + place.index, from_float<T, N>(result));
}

}  // namespace
}  // namespace fastconv::cuda
