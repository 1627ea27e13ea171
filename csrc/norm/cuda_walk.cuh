// NCHW, windows of five channels: a thread takes N pixels and walks down the channels, four a step, with the window in
// registers, so every element is loaded once (and the few at a walk's ends twice).
#pragma once

#include <type_traits>

#include "norm/cuda_power.cuh"

namespace fastconv::cuda {
namespace {

constexpr int kStep = 4;  // channels whose loads are in flight together
static_assert(kStep == 2 * kSide, "what a step carries over is what the next one needs");

/// A thread's way: its pixels, in the channels [begin, end) of its stretch. Unit rows are stretches of `each` channels.
struct Walk {
  int64_t first;  // element of its pixels in channel 0
  int begin, end, channels;
  int64_t plane;

  __device__ __forceinline__ Walk(const Unit& unit, int lanes, int each, int channels_, int plane_)
      : first(int64_t{unit.outer} * channels_ * plane_ + int64_t{unit.column} * lanes),
        begin(unit.row * each),
        end(min(begin + each, channels_)),
        channels(channels_),
        plane(plane_) {}

  __device__ __forceinline__ int64_t at(int channel) const { return first + channel * plane; }
  /// kStep channels from `channel` on, where `from` points, into lines[0..kStep); zero where there is no channel.
  /// `from` goes on to the next: an addition, where an address from the channel's number is a 64-bit multiplication.
  template <int N, class Pointer>
  __device__ __forceinline__ void load(Pointer& from, int channel, float (*lines)[N]) const {
#pragma unroll
    for (int i = 0; i < kStep; ++i, from += plane) {
      decltype(load_vector<N>(from)) values = {};
      if (static_cast<unsigned>(channel + i) < static_cast<unsigned>(channels)) values = load_vector<N>(from);
      to_float(values, lines[i]);
    }
  }
  template <int N, class Pointer>
  __device__ __forceinline__ void store(Pointer& to, int channel, const float (&line)[N]) const {
    if (channel < end) store_vector(to, from_float<std::remove_reference_t<decltype(*to)>, N>(line));
    to += plane;
  }
};

/// The last kStep of kLines lines become the first.
template <int kLines, int N>
__device__ __forceinline__ void shift(float (&lines)[kLines][N]) {
#pragma unroll
  for (int i = 0; i + kStep < kLines; ++i)
#pragma unroll
    for (int n = 0; n < N; ++n) lines[i][n] = lines[i + kStep][n];
}

/// Sum over the window of a * b whose first line is `line`, in lane n.
template <int N>
__device__ __forceinline__ float lines_product(const float (*a)[N], const float (*b)[N], int n) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kWindow; ++i) sum = fmaf(a[i][n], b[i][n], sum);
  return sum;
}

template <int N, class T>
__global__ __launch_bounds__(kUnitThreads) void response_walk_kernel(Response<false> response, Units units, int each,
                                                                     int plane, const T* __restrict__ x,
                                                                     T* __restrict__ y) {
  Unit unit;
  if (!units.find(unit)) return;
  const Walk walk(unit, N, each, response.channels, plane);
  float lines[2 * kStep][N];  // channels c - 2 to c + 5
  x += walk.at(walk.begin - kSide), y += walk.at(walk.begin);
  walk.load(x, walk.begin - kSide, lines);
  for (int c = walk.begin; c < walk.end; c += kStep) {
    walk.load(x, c + kSide, lines + kStep);
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      float result[N];
#pragma unroll
      for (int n = 0; n < N; ++n)
        result[n] = response.forward(lines[i + kSide][n], lines_product(lines + i, lines + i, n));
      walk.store(y, c + i, result);
    }
    shift(lines);
  }
}

template <int N, class T>
__global__ __launch_bounds__(kUnitThreads) void response_walk_jvp_kernel(Response<false> response, Units units,
                                                                         int each, int plane, const T* __restrict__ x,
                                                                         const T* __restrict__ tangent,
                                                                         T* __restrict__ y_tangent) {
  Unit unit;
  if (!units.find(unit)) return;
  const Walk walk(unit, N, each, response.channels, plane);
  float lines[2 * kStep][N], along[2 * kStep][N];
  x += walk.at(walk.begin - kSide), tangent += walk.at(walk.begin - kSide), y_tangent += walk.at(walk.begin);
  walk.load(x, walk.begin - kSide, lines);
  walk.load(tangent, walk.begin - kSide, along);
  for (int c = walk.begin; c < walk.end; c += kStep) {
    walk.load(x, c + kSide, lines + kStep);
    walk.load(tangent, c + kSide, along + kStep);
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      float result[N];
#pragma unroll
      for (int n = 0; n < N; ++n)
        result[n] = response.jvp(lines[i + kSide][n], along[i + kSide][n], lines_product(lines + i, lines + i, n),
                                 lines_product(lines + i, along + i, n));
      walk.store(y_tangent, c + i, result);
    }
    shift(lines);
    shift(along);
  }
}

/// Results of channels c to c + 3 need the shares of c - 2 to c + 5, which need x of c - 4 to c + 7. The first turn of
/// the loop only fills: its results would be those of the channels before the walk.
template <int N, class T>
__global__ __launch_bounds__(kUnitThreads) void response_walk_backward_kernel(Response<false> response, Units units,
                                                                              int each, int plane,
                                                                              const T* __restrict__ grad,
                                                                              const T* __restrict__ x,
                                                                              T* __restrict__ grad_input) {
  Unit unit;
  if (!units.find(unit)) return;
  const Walk walk(unit, N, each, response.channels, plane);
  float lines[3 * kStep][N];                                  // x of channels c - 4 to c + 7
  float share[2 * kStep][N] = {}, direct[2 * kStep][N] = {};  // of channels c - 2 to c + 5
  x += walk.at(walk.begin - 2 * kStep), grad += walk.at(walk.begin - kStep + kSide);
  grad_input += walk.at(walk.begin);
  walk.load(x, walk.begin - 2 * kStep, lines);
  walk.load(x, walk.begin - kStep, lines + kStep);
  for (int c = walk.begin - kStep; c < walk.end; c += kStep) {
    float grads[kStep][N];
    walk.load(x, c + kStep, lines + 2 * kStep);
    walk.load(grad, c + kSide, grads);
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      const int channel = c + kSide + i;
      const bool exists = channel >= 0 && channel < walk.channels;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const auto* window = lines + kStep + i;  // from channel - 2 on
        response.backward(grads[i][n], window[kSide][n], lines_product(window, window, n), direct[kStep + i][n],
                          share[kStep + i][n]);
        // A channel that does not exist has no share, not even 0 / 0 where k is 0.
        if (!exists) share[kStep + i][n] = 0;
      }
    }
    if (c >= walk.begin) {
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        float result[N];
#pragma unroll
        for (int n = 0; n < N; ++n) {
          float shares = 0;
#pragma unroll
          for (int j = 0; j < kWindow; ++j) shares += share[i + j][n];
          result[n] = response.combine(direct[i + kSide][n], lines[i + kStep][n], shares);
        }
        walk.store(grad_input, c + i, result);
      }
    }
    shift(lines);
    shift(share);
    shift(direct);
  }
}

}  // namespace
}  // namespace fastconv::cuda
