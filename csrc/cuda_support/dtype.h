// Element types on the device: fp16, bf16, fp32. Conversion, 16-byte loads and stores, the type sums are kept in.
#pragma once

#include <stdexcept>
#include <string>

#include "common/problem.h"
#include "cuda_support/cuda.h"

namespace fastconv::cuda {

using half = __half;
using bfloat16 = __nv_bfloat16;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(bfloat16 value) { return __bfloat162float(value); }

/// Rounds to nearest even.
template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ half from_float<half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ bfloat16 from_float<bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

/// N elements that are loaded and stored as one. The compiler turns 4, 8 and 16 bytes into one instruction each.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  static_assert(sizeof(T) * N <= 16 && (N & (N - 1)) == 0, "a load carries at most 16 bytes, a power of two");
  T element[N];
  __device__ __forceinline__ T& operator[](int i) { return element[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return element[i]; }
};

/// Elements in a 16-byte access.
template <class T>
inline constexpr int kVectorElements = 16 / static_cast<int>(sizeof(T));

/// `from` must be aligned to N elements.
template <int N, class T>
__device__ __forceinline__ Vector<T, N> load_vector(const T* from) {
  FASTCONV_EXPECT_ALIGNED(from, sizeof(T) * N);
  return *reinterpret_cast<const Vector<T, N>*>(from);
}
template <int N, class T>
__device__ __forceinline__ void store_vector(T* to, const Vector<T, N>& value) {
  FASTCONV_EXPECT_ALIGNED(to, sizeof(T) * N);
  *reinterpret_cast<Vector<T, N>*>(to) = value;
}

/// 16-byte accesses that say the line will not be used again (ld.global.cs, st.global.cs): for tensors that are read or
/// written once, so that they do not push what is reused out of L2.
template <int N, class T>
__device__ __forceinline__ Vector<T, N> load_streaming(const T* from) {
  static_assert(sizeof(T) * N == 16, "written for 16 bytes");
  FASTCONV_EXPECT_ALIGNED(from, 16);
  union {
    uint4 bits;
    Vector<T, N> value;
  } both{__ldcs(reinterpret_cast<const uint4*>(from))};
  return both.value;
}
template <int N, class T>
__device__ __forceinline__ void store_streaming(T* to, const Vector<T, N>& value) {
  static_assert(sizeof(T) * N == 16, "written for 16 bytes");
  FASTCONV_EXPECT_ALIGNED(to, 16);
  union Both {
    Vector<T, N> value;
    uint4 bits;
    __device__ __forceinline__ explicit Both(const Vector<T, N>& v) : value(v) {}
  } both(value);
  __stcs(reinterpret_cast<uint4*>(to), both.bits);
}

template <class T, int N>
__device__ __forceinline__ void to_float(const Vector<T, N>& from, float (&to)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = to_float(from[i]);
}
template <class T, int N>
__device__ __forceinline__ Vector<T, N> from_float(const float (&from)[N]) {
  Vector<T, N> to;
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = from_float<T>(from[i]);
  return to;
}

/// True if every address that a kernel reaches from `pointer` in steps of `stride_elements` is aligned to `bytes`:
/// the host asks before it picks a vectorised kernel.
inline bool is_aligned(const void* pointer, int64_t stride_elements, int64_t element_bytes, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0 && stride_elements * element_bytes % bytes == 0;
}

/// Calls body(T{}) with the device's type for `dtype`.
template <class Body>
void dispatch_element(const char* kernel, DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32:
      return body(float{});
    case DType::f16:
      return body(half{});
    case DType::bf16:
      return body(bfloat16{});
    case DType::f64:
      throw std::runtime_error(std::string(kernel) +
                               ": got float64, expected float32, float16 or bfloat16; no CUDA kernel computes in "
                               "float64: convert the tensors or move them to the CPU");
  }
  throw std::logic_error("unknown dtype");
}

}  // namespace fastconv::cuda
