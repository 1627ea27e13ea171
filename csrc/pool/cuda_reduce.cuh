// What happens inside a window, N lanes at a time: the running maximum, and the running maximum with its offset.
//
// torch's rules: the first of equal maxima wins, a NaN replaces whatever was there, so the last NaN wins.
#pragma once

#include "cuda_support/dtype.h"

namespace fastconv::cuda {

// One instruction for two 16-bit numbers; fp32 has no intrinsic that keeps NaN: two comparisons and a selection.
__device__ __forceinline__ float max_keep_nan(float value, float x) { return x > value || x != x ? x : value; }
__device__ __forceinline__ half max_keep_nan(half value, half x) { return __hmax_nan(value, x); }
__device__ __forceinline__ bfloat16 max_keep_nan(bfloat16 value, bfloat16 x) { return __hmax_nan(value, x); }
__device__ __forceinline__ __half2 max_keep_nan(__half2 value, __half2 x) { return __hmax2_nan(value, x); }
__device__ __forceinline__ __nv_bfloat162 max_keep_nan(__nv_bfloat162 value, __nv_bfloat162 x) {
  return __hmax2_nan(value, x);
}

template <class T>
struct PairOf;
template <>
struct PairOf<half> {
  using type = __half2;
};
template <>
struct PairOf<bfloat16> {
  using type = __nv_bfloat162;
};

/// Without offsets: the maximum is exact in T, so nothing is widened.
template <class T, int N>
struct RunningMax {
  using Offset = uint8_t;
  static constexpr bool kOffsets = false;
  Vector<T, N> value = {};

  __device__ __forceinline__ void start_empty(int) {
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] = from_float<T>(-INFINITY);
  }
  __device__ __forceinline__ void start(const Vector<T, N>& x, int) { value = x; }
  __device__ __forceinline__ void take(const Vector<T, N>& x, int) {
    if constexpr (sizeof(T) == 2 && N % 2 == 0) {
      using Pair = typename PairOf<T>::type;
#pragma unroll
      for (int i = 0; i < N; i += 2) {
        Pair& both = reinterpret_cast<Pair&>(value[i]);
        both = max_keep_nan(both, reinterpret_cast<const Pair&>(x[i]));
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) value[i] = max_keep_nan(value[i], x[i]);
    }
  }
  __device__ __forceinline__ Vector<T, N> values() const { return value; }
};

/// Compared in float32, which holds every fp16 and bf16 number.
template <class T, int N, class Offset_ = uint8_t>
struct RunningMaxOffset {
  using Offset = Offset_;
  static constexpr bool kOffsets = true;
  float value[N] = {};
  int offset[N] = {};

  __device__ __forceinline__ void start_empty(int first) {
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] = -INFINITY, offset[i] = first;
  }
  __device__ __forceinline__ void start(const Vector<T, N>& x, int tap) {
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] = to_float(x[i]), offset[i] = tap;
  }
  __device__ __forceinline__ void take(const Vector<T, N>& x, int tap) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float wide = to_float(x[i]);
      const bool replaces = wide > value[i] || wide != wide;
      value[i] = replaces ? wide : value[i];
      offset[i] = replaces ? tap : offset[i];
    }
  }
  __device__ __forceinline__ Vector<T, N> values() const { return from_float<T, N>(value); }
};

/// N bytes or words of offsets as one access where they fit one.
template <class Offset, int N>
__device__ __forceinline__ void store_offsets(Offset* to, const int (&offset)[N]) {
  constexpr int kEach = static_cast<int>(sizeof(Offset)) * N > 16 ? 16 / static_cast<int>(sizeof(Offset)) : N;
#pragma unroll
  for (int first = 0; first < N; first += kEach) {
    Vector<Offset, kEach> packed;
#pragma unroll
    for (int i = 0; i < kEach; ++i) packed[i] = static_cast<Offset>(offset[first + i]);
    store_vector(to + first, packed);
  }
}
template <int N, class Offset>
__device__ __forceinline__ void load_offsets(const Offset* from, int (&offset)[N]) {
  constexpr int kEach = static_cast<int>(sizeof(Offset)) * N > 16 ? 16 / static_cast<int>(sizeof(Offset)) : N;
#pragma unroll
  for (int first = 0; first < N; first += kEach) {
    const auto packed = load_vector<kEach>(from + first);
#pragma unroll
    for (int i = 0; i < kEach; ++i) offset[first + i] = static_cast<int>(packed[i]);
  }
}

}  // namespace fastconv::cuda
