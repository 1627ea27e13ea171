// All inline PTX of the package. Every wrapper is named after its instruction and states the constraints that are easy
// to break; kernels contain no asm of their own, because the emulator has these same names (emulator/ptx.h).
//
// Shared memory is addressed by 32-bit numbers (shared_address). PTX calls that window shared::cta; the same numbers
// are valid where it wants shared::cluster and then mean the block's own memory.
#pragma once

#if defined(FASTCONV_EMULATOR)
#include "emulator/ptx.h"
#else

#include "cuda_support/cuda.h"

namespace fastconv::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---------------------------------------------------------------- identity

/// elect.sync: true in exactly one lane of a converged warp, the same one at every call. sm_90.
__device__ __forceinline__ bool elect_sync() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}\n" : "=r"(elected));
  return elected != 0;
}

/// mov %cluster_ctarank: rank of this block in its cluster, 0 where there is none. sm_90.
__device__ __forceinline__ uint32_t cluster_ctarank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

/// mapa.shared::cluster: the address that means `address` in the block of that rank. sm_90.
__device__ __forceinline__ uint32_t mapa(uint32_t address, uint32_t rank) {
  uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

/// setmaxnreg: by all warps of a warpgroup; a multiple of 8 from 24 to 256. Ignored (ptxas C7508) unless the kernel has
/// a cap at entry, __launch_bounds__(threads, 1). `inc` blocks until the block's other warpgroups have given back
/// enough, for ever if the sum exceeds what the block was launched with. sm_90a.
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---------------------------------------------------------------- barriers of threads

/// bar.sync: named barrier 0 to 15 over `threads` threads, a multiple of 32; barrier 0 is that of __syncthreads().
__device__ __forceinline__ void bar_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

/// bar.arrive: arrives without waiting; `threads` counts those that arrive and those that wait.
__device__ __forceinline__ void bar_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

/// barrier.cluster.arrive.release, barrier.cluster.wait.acquire: all threads of the cluster that have not exited.
/// Needed between mbarrier_init and the first remote arrival or multicast, and before exit where a peer may still reach
/// this block's memory. Not the .aligned form: the lanes of a producer warp come here at different times. sm_90.
__device__ __forceinline__ void barrier_cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
__device__ __forceinline__ void barrier_cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
__device__ __forceinline__ void barrier_cluster_sync() {
  barrier_cluster_arrive();
  barrier_cluster_wait();
}

// ---------------------------------------------------------------- fences

/// fence.proxy.async.shared::cta: by every thread that wrote shared memory with ordinary stores (stmatrix too), before
/// the barrier that precedes a TMA store or a wgmma that reads those bytes. sm_90.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// fence.mbarrier_init: makes mbarrier_init visible to TMA and to the cluster; a barrier of threads follows. sm_90.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// ---------------------------------------------------------------- loads and stores by shared address

__device__ __forceinline__ void st_shared_v2(uint32_t address, float a, float b) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(a), "f"(b) : "memory");
}
__device__ __forceinline__ void st_shared_v4(uint32_t address, uint4 value) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}
__device__ __forceinline__ uint4 ld_shared_v4(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

// ---------------------------------------------------------------- flags between blocks (launched as cooperative)

/// ld.acquire.gpu: what was written before the matching release is visible after it. In a loop it is a wait.
__device__ __forceinline__ uint32_t ld_acquire_gpu(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

/// st.release.gpu and red.release.gpu.add: by one thread, after a barrier of those whose writes it announces.
__device__ __forceinline__ void st_release_gpu(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
__device__ __forceinline__ void red_release_gpu_add(uint32_t* flag, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

}  // namespace fastconv::ptx

#include "cuda_support/ptx_async.cuh"
#include "cuda_support/ptx_mma.cuh"
#include "cuda_support/ptx_tma.cuh"
#include "cuda_support/ptx_wgmma.cuh"

#endif
