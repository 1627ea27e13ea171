// cp.async and mbarrier. Part of ptx.cuh.
#pragma once

#include "cuda_support/cuda.h"

namespace fastconv::ptx {

// ---------------------------------------------------------------- cp.async (sm_80)

/// cp.async.cg, 16 bytes past L1: both addresses aligned to 16. Reads `source_bytes` (0 to 16) and fills the rest with
/// zeros; with 0 the source is not touched, but must be aligned.
__device__ __forceinline__ void cp_async_cg_16(uint32_t destination, const void* source, int source_bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(source_bytes)
               : "memory");
}

/// cp.async.ca, 4 or 8 bytes through L1, aligned to their size.
template <int kBytes>
__device__ __forceinline__ void cp_async_ca(uint32_t destination, const void* source, int source_bytes = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(destination), "l"(source), "n"(kBytes),
               "r"(source_bytes)
               : "memory");
}

/// Groups are per thread. After wait_group<N> all but the newest N groups of the calling thread have landed; what other
/// threads copied needs a barrier after their wait.
__device__ __forceinline__ void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---------------------------------------------------------------- mbarrier (sm_90; 8 bytes of shared memory, aligned)

/// mbarrier.init: `arrivals` complete a phase. One thread; then fence_mbarrier_init and a barrier of threads.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

/// mbarrier.arrive: one arrival; never more than were announced in a phase.
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/// mbarrier.arrive on the barrier at the same place in the block of that rank, which may be the own one. Without
/// .release.cluster: measured on an H100, that form cut the multicast rate to a third.
__device__ __forceinline__ void mbarrier_arrive_cluster(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 a;\nmapa.shared::cluster.u32 a, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [a];\n}\n" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

/// mbarrier.arrive.expect_tx: one arrival, and the phase also waits for `bytes` of TMA traffic. The bytes are those of
/// whole boxes, what lies outside the tensor included.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

/// mbarrier.try_wait.parity: true once the phase of this parity has completed. A fresh barrier says true for parity 1,
/// "the phase before the first". It cannot tell phase n from n + 2: no thread may fall two phases behind another.
__device__ __forceinline__ bool mbarrier_try_wait_parity(uint32_t barrier, uint32_t parity) {
  uint32_t complete;
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
               : "=r"(complete)
               : "r"(barrier), "r"(parity)
               : "memory");
  return complete != 0;
}
__device__ __forceinline__ void mbarrier_wait_parity(uint32_t barrier, uint32_t parity) {
  // No printf or trap on a timeout: a call inside a wgmma loop makes ptxas serialise it (C7510).
  while (!mbarrier_try_wait_parity(barrier, parity)) {
  }
}

}  // namespace fastconv::ptx
