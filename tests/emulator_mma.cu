// A matrix product with mma.sync for test_emulator.py: cp.async ring, ldmatrix, swizzled tiles.
//
// c[m][n] = sum over k of a[m][k] b[n][k], all row-major, m and n multiples of 32 and k of the step. One block of four
// warps per 32 x 32 tile of c, each warp 16 x 16. Bugs: 1 no cp_async_wait_group, 2 no barrier after the wait, 3 the
// barrier comes after the slot is filled again, 4 wrong swizzle when reading, 5 the wait leaves one group too many, 6 a
// misaligned row address, 7 half of the warp skips an mma, 8 exits before its copies have landed.
#include "cuda_support/dtype.h"
#include "cuda_support/launch.h"
#include "cuda_support/launchers.h"
#include "cuda_support/ptx.cuh"

namespace fastconv::cuda {
namespace {

constexpr int kTile = 32, kSlots = 3, kRowBytes = 64, kStepsPerSlot = kRowBytes / 32;
constexpr int kTileBytes = kTile * kRowBytes, kSlotBytes = 2 * kTileBytes;
static_assert(kTile * (kRowBytes / 16) == 128, "each thread copies one 16-byte chunk of each tile");

/// Bits 0-1 of the chunk number are XORed with bits 1-2 of the row: eight rows at one chunk hit all banks once.
__device__ __forceinline__ uint32_t chunk_offset(int row, int chunk, int shift = 1) {
  return static_cast<uint32_t>(row * kRowBytes + ((chunk ^ (row >> shift & 3)) << 4));
}

template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (sizeof(T) == 4) ptx::mma_m16n8k8_tf32(d, a, b);
  else ptx::mma_m16n8k16<T>(d, a, b);
}

template <class T>
__global__ void __launch_bounds__(128) mma_kernel(const T* a, const T* b, float* c, int n, int k, int bug) {
  FASTCONV_DYNAMIC_SHARED(raw);
  const uint32_t base = ptx::shared_address(raw);
  constexpr int kSlotElements = kRowBytes / static_cast<int>(sizeof(T));
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int row = thread / 4, chunk = thread % 4, steps = k / kSlotElements;
  const T* from_a = a + (int64_t{blockIdx.y} * kTile + row) * k + chunk * (16 / sizeof(T));
  const T* from_b = b + (int64_t{blockIdx.x} * kTile + row) * k + chunk * (16 / sizeof(T));

  const auto fill = [&](int step) {
    if (step < steps) {
      const uint32_t slot = base + static_cast<uint32_t>(step % kSlots * kSlotBytes);
      ptx::cp_async_cg_16(slot + chunk_offset(row, chunk), from_a + step * kSlotElements);
      ptx::cp_async_cg_16(slot + kTileBytes + chunk_offset(row, chunk), from_b + step * kSlotElements);
    }
    ptx::cp_async_commit_group();  // also when empty, so that the count of groups is the count of steps
  };

  float d[2][4] = {};
  fill(0);
  fill(1);
  for (int step = 0; step < steps; ++step) {
    if (bug == 5) ptx::cp_async_wait_group<2>();
    else if (bug != 1) ptx::cp_async_wait_group<1>();
    // All warps have read the slot of the step before, and what they copied for this one is there.
    if (bug != 2 && bug != 3) __syncthreads();
    fill(step + 2);
    if (bug == 3) __syncthreads();
    const uint32_t slot = base + static_cast<uint32_t>(step % kSlots * kSlotBytes);
#pragma unroll
    for (int sub = 0; sub < kStepsPerSlot; ++sub) {
      const int a_row = warp / 2 * 16 + lane % 16, b_row = warp % 2 * 16 + lane / 16 * 8 + lane % 8;
      const int a_chunk = 2 * sub + lane / 16, b_chunk = 2 * sub + lane / 8 % 2;
      uint32_t fragment_a[4], fragment_b[4];
      ptx::ldmatrix_x4(fragment_a, slot + chunk_offset(a_row, a_chunk, bug == 4 ? 0 : 1) + (bug == 6 ? 8 : 0));
      ptx::ldmatrix_x4(fragment_b, slot + kTileBytes + chunk_offset(b_row, b_chunk));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t pair[2] = {fragment_b[2 * half], fragment_b[2 * half + 1]};
        if (bug != 7 || half == 0 || lane < 16) multiply<T>(d[half], fragment_a, pair);
      }
    }
  }
  if (bug == 8) ptx::cp_async_cg_16(base, from_a);
  const int m0 = static_cast<int>(blockIdx.y) * kTile + warp / 2 * 16 + lane / 4;
  const int n0 = static_cast<int>(blockIdx.x) * kTile + warp % 2 * 16 + 2 * (lane % 4);
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int e = 0; e < 4; ++e) c[int64_t{m0 + e / 2 * 8} * n + n0 + half * 8 + e % 2] = d[half][e];
}

}  // namespace

void launch_mma(DType dtype, const void* a, const void* b, float* c, int m, int n, int k, int bug,
                cudaStream_t stream) {
  dispatch_element("mma", dtype, [&](auto element) {
    using T = decltype(element);
    launch(FASTCONV_KERNEL(mma_kernel<T>), dim3(static_cast<unsigned>(n / kTile), static_cast<unsigned>(m / kTile)),
           128, kSlots * kSlotBytes, stream, static_cast<const T*>(a), static_cast<const T*>(b), c, n, k, bug);
  });
}
FASTCONV_LAUNCHER("mma", "pipeline", launch_mma);

}  // namespace fastconv::cuda
