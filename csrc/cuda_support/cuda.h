// CUDA's language, from nvcc or from the emulator: the first include of every kernel file.
//
// With nvcc these are NVIDIA's headers. With -DFASTCONV_EMULATOR and csrc/emulator/include on the include path the same
// three names are the emulator's, and __global__, threadIdx, __syncthreads() and the rest mean what emulator/ says.
#pragma once

#include <cuda_runtime.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>

#if !defined(FASTCONV_EMULATOR)

namespace fastconv::cuda {
template <class T>
using plain_type = T;
}

/// Static shared memory: FASTCONV_SHARED(tile, float[32][33]); gives `tile`, 16-byte aligned and uninitialised.
/// C++ has no storage class for "one per block", so `__shared__` itself does not compile in the emulator.
#define FASTCONV_SHARED(name, ...) __shared__ __align__(16)::fastconv::cuda::plain_type<__VA_ARGS__> name

/// Dynamic shared memory: FASTCONV_DYNAMIC_SHARED(raw); gives `raw`, an unsigned char pointer that is 16-byte aligned
/// and no more; kernels that need 128 or 1024 bytes (TMA, swizzles) ask for as much more and round up.
#define FASTCONV_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

/// The GPU faults on a vector that is not aligned to its size, a CPU does not mind: the emulator looks.
#define FASTCONV_EXPECT_ALIGNED(pointer, bytes) static_cast<void>(0)

#endif
