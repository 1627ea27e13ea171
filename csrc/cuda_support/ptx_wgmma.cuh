// wgmma: matrix products of a warpgroup, operands in shared memory (sm_90a). Part of ptx.cuh.
//
// Four warps, the first one's number a multiple of 4, execute every wrapper together. D is 64 x N in registers: thread
// 32 w + l holds d[4j], d[4j + 1] = D[16 w + l / 4][8 j + 2 (l % 4)] and the next, d[4j + 2], d[4j + 3] = the same
// columns 8 rows further down.
//
// ptxas serialises all wgmma of a kernel (warnings C7510, C7520) when one is conditional inside the loop, or when a
// function is called there.
#pragma once

#include "cuda_support/ptx_mma.cuh"
#include "cuda_support/swizzle.h"

namespace fastconv::ptx {

/// The descriptor of an operand in shared memory. Bits 0-13 address / 16, 16-29 leading offset / 16, 32-45 stride
/// offset / 16, 62-63 swizzle. Let B be the bytes of a swizzled row (32, 64, 128).
///   K-major, rows of B bytes: stride offset = 8 B (from 8 rows to the next 8), leading offset unused. One k-step
///     (32 bytes) further: add 2 to the descriptor. May start at any row: the swizzle follows absolute addresses.
///   MN-major, 16-bit types, panels of [k][B / 2]: stride offset = 8 B (from 8 k to the next 8), leading offset = from
///     one panel to the next. One k-step further: add 16 B bytes, so B to the descriptor.
/// Verified on an H100 for 128 bytes; for 32 and 64 this is the PTX manual's description.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes,
                                                     Swizzle swizzle = Swizzle::bytes128) {
  const uint64_t mode = swizzle == Swizzle::none ? 0 : 4 - static_cast<int>(swizzle);
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(stride_bytes >> 4) << 32 | mode << 62;
}

/// wgmma.fence: before the first wgmma, and again whenever other instructions touched the accumulators.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/// wgmma.wait_group: at most `kPending` groups still run. Until then accumulators must not be read and operands not be
/// overwritten.
template <int kPending>
__device__ __forceinline__ void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

template <class T, int N, int kMnMajorA, int kMnMajorB>
struct Wgmma;

/// wgmma.mma_async m64nNk16 (half, bfloat16) or m64nNk8 (tf32): d = a b + d, or a b where scale_d is 0. Both operands
/// by descriptor; kMnMajorA and kMnMajorB (16-bit types only) say which are stored with M or N innermost.
template <class T, int N, int kMnMajorA = 0, int kMnMajorB = 0>
__device__ __forceinline__ void wgmma_mma_async(float (&d)[N / 2], uint64_t a, uint64_t b, int scale_d) {
  Wgmma<T, N, kMnMajorA, kMnMajorB>::multiply(d, a, b, scale_d);
}

/// The same with A in registers, K-major, in mma_m16n8k16's order (m16n8k8's for tf32), warp w holding rows 16 w to
/// 16 w + 15. They must not be written until the group has been waited for.
template <class T, int N, int kMnMajorB = 0>
__device__ __forceinline__ void wgmma_mma_async(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int scale_d) {
  Wgmma<T, N, 0, kMnMajorB>::multiply(d, a, b, scale_d);
}

// ---------------------------------------------------------------- one specialisation per N: asm wants literal operands

#define FASTCONV_D4 "%0, %1, %2, %3"
#define FASTCONV_D8 FASTCONV_D4 ", %4, %5, %6, %7"
#define FASTCONV_D16 FASTCONV_D8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FASTCONV_D32 FASTCONV_D16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTCONV_D48 FASTCONV_D32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define FASTCONV_D64 FASTCONV_D48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTCONV_D80 FASTCONV_D64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define FASTCONV_D96 FASTCONV_D80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FASTCONV_D112 \
  FASTCONV_D96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define FASTCONV_D128 \
  FASTCONV_D112 ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define FASTCONV_R4(o) "+f"(d[o]), "+f"(d[o + 1]), "+f"(d[o + 2]), "+f"(d[o + 3])
#define FASTCONV_R8(o) FASTCONV_R4(o), FASTCONV_R4(o + 4)
#define FASTCONV_R16(o) FASTCONV_R8(o), FASTCONV_R8(o + 8)
#define FASTCONV_R32(o) FASTCONV_R16(o), FASTCONV_R16(o + 16)
#define FASTCONV_R48(o) FASTCONV_R32(o), FASTCONV_R16(o + 32)
#define FASTCONV_R64(o) FASTCONV_R32(o), FASTCONV_R32(o + 32)
#define FASTCONV_R80(o) FASTCONV_R64(o), FASTCONV_R16(o + 64)
#define FASTCONV_R96(o) FASTCONV_R64(o), FASTCONV_R32(o + 64)
#define FASTCONV_R112(o) FASTCONV_R96(o), FASTCONV_R16(o + 96)
#define FASTCONV_R128(o) FASTCONV_R96(o), FASTCONV_R32(o + 96)

// nvcc has no named operands: I0 to I6 are the numbers of the inputs, which follow those of D.
#define FASTCONV_WGMMA_16BIT(TYPE, NAME, N, R, I0, I1, I2, I3, I4, I5, I6)                                            \
  template <int kMnMajorA, int kMnMajorB>                                                                             \
  struct Wgmma<TYPE, N, kMnMajorA, kMnMajorB> {                                                                       \
    static __device__ __forceinline__ void multiply(float (&d)[R], uint64_t a, uint64_t b, int scale_d) {             \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N              \
                   "k16.f32." NAME "." NAME " {" FASTCONV_D##R "}, %" #I0 ", %" #I1 ", p, 1, 1, %" #I3 ", %" #I4      \
                                                               ";\n}\n"                                               \
                   : FASTCONV_R##R(0)                                                                                 \
                   : "l"(a), "l"(b), "r"(scale_d), "n"(kMnMajorA), "n"(kMnMajorB));                                   \
    }                                                                                                                 \
    static __device__ __forceinline__ void multiply(float (&d)[R], const uint32_t (&a)[4], uint64_t b, int scale_d) { \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N              \
                   "k16.f32." NAME "." NAME " {" FASTCONV_D##R "}, {%" #I0 ", %" #I1 ", %" #I2 ", %" #I3 "}, %" #I4   \
                                                               ", p, 1, 1, %" #I6 ";\n}\n"                            \
                   : FASTCONV_R##R(0)                                                                                 \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale_d), "n"(kMnMajorB));               \
    }                                                                                                                 \
  };
#define FASTCONV_WGMMA_TF32(N, R, I0, I1, I2, I3, I4, I5)                                                             \
  template <>                                                                                                         \
  struct Wgmma<tf32, N, 0, 0> {                                                                                       \
    static __device__ __forceinline__ void multiply(float (&d)[R], uint64_t a, uint64_t b, int scale_d) {             \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N              \
                   "k8.f32.tf32.tf32 {" FASTCONV_D##R "}, %" #I0 ", %" #I1 ", p, 1, 1;\n}\n"                          \
                   : FASTCONV_R##R(0)                                                                                 \
                   : "l"(a), "l"(b), "r"(scale_d));                                                                   \
    }                                                                                                                 \
    static __device__ __forceinline__ void multiply(float (&d)[R], const uint32_t (&a)[4], uint64_t b, int scale_d) { \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N              \
                   "k8.f32.tf32.tf32 {" FASTCONV_D##R "}, {%" #I0 ", %" #I1 ", %" #I2 ", %" #I3 "}, %" #I4            \
                                                      ", p, 1, 1;\n}\n"                                               \
                   : FASTCONV_R##R(0)                                                                                 \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale_d));                               \
    }                                                                                                                 \
  };
#define FASTCONV_WGMMA(N, R, I0, I1, I2, I3, I4, I5, I6)                        \
  FASTCONV_WGMMA_16BIT(__half, "f16", N, R, I0, I1, I2, I3, I4, I5, I6)         \
  FASTCONV_WGMMA_16BIT(__nv_bfloat16, "bf16", N, R, I0, I1, I2, I3, I4, I5, I6) \
  FASTCONV_WGMMA_TF32(N, R, I0, I1, I2, I3, I4, I5)

FASTCONV_WGMMA(8, 4, 4, 5, 6, 7, 8, 9, 10)
FASTCONV_WGMMA(16, 8, 8, 9, 10, 11, 12, 13, 14)
FASTCONV_WGMMA(32, 16, 16, 17, 18, 19, 20, 21, 22)
FASTCONV_WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38)
FASTCONV_WGMMA(96, 48, 48, 49, 50, 51, 52, 53, 54)
FASTCONV_WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70)
FASTCONV_WGMMA(160, 80, 80, 81, 82, 83, 84, 85, 86)
FASTCONV_WGMMA(192, 96, 96, 97, 98, 99, 100, 101, 102)
FASTCONV_WGMMA(224, 112, 112, 113, 114, 115, 116, 117, 118)
FASTCONV_WGMMA(256, 128, 128, 129, 130, 131, 132, 133, 134)

}  // namespace fastconv::ptx
