// CUDA's keywords, vector types and the few runtime names that kernel files mention, for an ordinary C++ compiler.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __align__(bytes) alignas(bytes)
#define __builtin_assume(condition) ((condition) ? (void)0 : __builtin_unreachable())

// One per block cannot be expressed as a storage class: cuda_support/cuda.h's macros ask the emulator for it.
#define __shared__ write_FASTCONV_SHARED_or_FASTCONV_DYNAMIC_SHARED_instead_of___shared__

#define FASTCONV_VECTOR_2(type, name, bytes) \
  struct alignas(bytes) name {               \
    type x, y;                               \
  };                                         \
  inline name make_##name(type x, type y) { return {x, y}; }
#define FASTCONV_VECTOR_3(type, name) \
  struct name {                       \
    type x, y, z;                     \
  };                                  \
  inline name make_##name(type x, type y, type z) { return {x, y, z}; }
#define FASTCONV_VECTOR_4(type, name, bytes) \
  struct alignas(bytes) name {               \
    type x, y, z, w;                         \
  };                                         \
  inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }

FASTCONV_VECTOR_2(int, int2, 8)
FASTCONV_VECTOR_2(unsigned, uint2, 8)
FASTCONV_VECTOR_2(float, float2, 8)
FASTCONV_VECTOR_2(short, short2, 4)
FASTCONV_VECTOR_2(unsigned short, ushort2, 4)
FASTCONV_VECTOR_2(signed char, char2, 2)
FASTCONV_VECTOR_2(unsigned char, uchar2, 2)
FASTCONV_VECTOR_2(long long, longlong2, 16)
FASTCONV_VECTOR_2(double, double2, 16)
FASTCONV_VECTOR_3(int, int3)
FASTCONV_VECTOR_3(unsigned, uint3)
FASTCONV_VECTOR_3(float, float3)
FASTCONV_VECTOR_4(int, int4, 16)
FASTCONV_VECTOR_4(unsigned, uint4, 16)
FASTCONV_VECTOR_4(float, float4, 16)
FASTCONV_VECTOR_4(short, short4, 8)
FASTCONV_VECTOR_4(unsigned short, ushort4, 8)
FASTCONV_VECTOR_4(signed char, char4, 4)
FASTCONV_VECTOR_4(unsigned char, uchar4, 4)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

using cudaStream_t = struct FastconvEmulatedStream*;

enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorCooperativeLaunchTooLarge = 720,
};
using cudaError = cudaError_t;

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
  }
  return "unknown error";
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

// A launch in the emulator returns when the kernel has ended, so streams need no order of their own.
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice = 3, cudaMemcpyDefault = 4 };
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}
