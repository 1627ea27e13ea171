// Any window, layout and alignment: a thread an element, in memory order, with loops over the window. Reads come from
// the caches; the gradient computes each neighbour's divisor anew.
#pragma once

#include "norm/cuda_power.cuh"

namespace fastconv::cuda {
namespace {

/// An element, and where its channel's neighbours are.
struct ElementPlace {
  int64_t index, distance;  // from a channel to the next
  int channel;

  /// NCHW has a channel to a unit's row and nothing inside; NHWC has one row.
  __device__ __forceinline__ ElementPlace(const Unit& unit, const Units& units)
      : index(((int64_t{unit.outer} * units.rows.divisor + unit.row) * units.columns.divisor + unit.column) *
                  units.inner.divisor +
              unit.inner),
        distance(units.inner.divisor > 1 ? 1 : units.columns.divisor),
        channel(static_cast<int>(unit.row + unit.inner)) {}
};

/// Sum over the window of `channel`, which lies `offset` channels from `place`, of a * b.
template <class T>
__device__ __forceinline__ float any_product(const Response<true>& r, const ElementPlace& place, int offset, const T* a,
                                             const T* b) {
  const int channel = place.channel + offset;
  const int first = max(channel - r.before, 0) - place.channel;
  const int last = min(channel + r.after, r.channels - 1) - place.channel;
  float sum = 0;
  for (int i = first; i <= last; ++i) {
    const int64_t at = place.index + i * place.distance;
    sum = fmaf(to_float(a[at]), to_float(b[at]), sum);
  }
  return sum;
}

template <class T>
__global__ __launch_bounds__(kUnitThreads) void response_any_kernel(Response<true> response, Units units,
                                                                    const T* __restrict__ x, T* __restrict__ y) {
  Unit unit;
  if (!units.find(unit)) return;
  const ElementPlace place(unit, units);
  y[place.index] = from_float<T>(response.forward(to_float(x[place.index]), any_product(response, place, 0, x, x)));
}

template <class T>
__global__ __launch_bounds__(kUnitThreads) void response_any_jvp_kernel(Response<true> response, Units units,
                                                                        const T* __restrict__ x,
                                                                        const T* __restrict__ tangent,
                                                                        T* __restrict__ y_tangent) {
  Unit unit;
  if (!units.find(unit)) return;
  const ElementPlace place(unit, units);
  y_tangent[place.index] =
      from_float<T>(response.jvp(to_float(x[place.index]), to_float(tangent[place.index]),
                                 any_product(response, place, 0, x, x), any_product(response, place, 0, x, tangent)));
}

template <class T>
__global__ __launch_bounds__(kUnitThreads) void response_any_backward_kernel(Response<true> response, Units units,
                                                                             const T* __restrict__ grad,
                                                                             const T* __restrict__ x,
                                                                             T* __restrict__ grad_input) {
  Unit unit;
  if (!units.find(unit)) return;
  const ElementPlace place(unit, units);
  // The channels whose window holds this one: the window with its sides changed.
  const int first = max(-response.after, -place.channel),
            last = min(response.before, response.channels - 1 - place.channel);
  float own = 0, shares = 0;
  for (int i = first; i <= last; ++i) {
    const int64_t at = place.index + i * place.distance;
    float direct, share;
    response.backward(to_float(grad[at]), to_float(x[at]), any_product(response, place, i, x, x), direct, share);
    if (i == 0) own = direct;
    shares += share;
  }
  grad_input[place.index] = from_float<T>(response.combine(own, to_float(x[place.index]), shares));
}

}  // namespace
}  // namespace fastconv::cuda
