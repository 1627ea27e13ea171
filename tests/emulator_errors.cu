// One mistake per case, for test_emulator.py: each must be an error with its own text. Case 0 does nothing wrong.
#include "cuda_support/dtype.h"
#include "cuda_support/launch.h"
#include "cuda_support/launchers.h"
#include "cuda_support/ptx.cuh"
#include "cuda_support/tensor_map.h"

namespace fastconv::cuda {
namespace {

struct Maps {
  CUtensorMap tiled, empty;
};

__device__ void wrong_warp(int which, uint32_t shared, float* global) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (which == 1 && lane == 3) __trap();
  if (which == 2) __shfl_sync(lane == 7 ? 0xffu << 8 : ~0u, lane, 0);
  if (which == 3) ptx::mapa(shared, 1);
  if (which == 4) ptx::ld_shared_v4(shared + 8);
  if (which == 5) ptx::ld_shared_v4(shared + (64 << 10));
  if (which == 6) ptx::shared_address(global);
  if (which == 7) ptx::cp_async_cg_16(shared, reinterpret_cast<unsigned char*>(global) + 4);
  if (which == 8) ptx::cp_async_cg_16(shared, global, 17);
  if (which == 9) ptx::bar_sync(16, 32);
  if (which == 10) ptx::bar_arrive(1, 33);
  if (which == 11) ptx::barrier_cluster_wait();
  if (which == 12) {
    ptx::barrier_cluster_arrive();
    ptx::barrier_cluster_arrive();
  }
  if (which == 13) ptx::setmaxnreg_inc<232>();
  if (which == 14) atomicAdd(reinterpret_cast<float*>(reinterpret_cast<unsigned char*>(global) + 2), 1.0f);
  if (which == 16) load_vector<4>(global + 2);
  if (which == 17) store_vector(global + 1, Vector<float, 2>{});
  if (which == 18) load_streaming<4>(global + 3);
  if (which == 15 && lane < 16) {
    uint32_t r[1];
    ptx::ldmatrix_x1(r, shared);
  }
}

__device__ void wrong_barrier(int which, uint32_t shared, uint32_t bar, const Maps& maps) {
  if (which == 20) ptx::mbarrier_init(shared + 4, 1);
  if (which == 21) ptx::mbarrier_arrive(shared);
  if (which == 22) {
    ptx::st_shared_v2(bar, 0, 0);
    ptx::mbarrier_arrive(bar);
  }
  if (which == 23) ptx::mbarrier_wait_parity(bar, 2);
  if (which == 24)
    for (int i = 0; i < 70; ++i) ptx::mbarrier_init(shared + 8 * i, 1);
  if (which == 25) {
    ptx::mbarrier_arrive(bar);
    ptx::mbarrier_arrive(bar);
    ptx::mbarrier_arrive_expect_tx(bar, 16);
    ptx::mbarrier_arrive(bar);
    ptx::mbarrier_arrive(bar);
  }
  if (which == 30) ptx::cp_async_bulk_tensor_2d(shared, &maps.empty, bar, 0, 0);
  if (which == 31) ptx::cp_async_bulk_tensor_4d_im2col(shared, &maps.tiled, bar, {0, 0, 0, 0, 0, 0});
  if (which == 32) ptx::cp_async_bulk_tensor_2d(shared + 16, &maps.tiled, bar, 0, 0);
  if (which == 33) ptx::cp_async_bulk_tensor_2d(shared + (32 << 10), &maps.tiled, bar, 0, 0);
  if (which == 34) {  // exits under the load
    ptx::mbarrier_arrive_expect_tx(bar, 8 * 128);
    ptx::cp_async_bulk_tensor_2d(shared, &maps.tiled, bar, 0, 0);
  }
  if (which == 35) {  // exits before the store is read
    ptx::cp_async_bulk_tensor_2d_store(&maps.tiled, shared, 0, 0);
    ptx::cp_async_bulk_commit_group();
  }
}

__device__ void wrong_wgmma(int which, uint32_t shared) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  float d[4] = {}, large[128] = {};
  uint64_t a = ptx::wgmma_descriptor(shared, 16, 1024), b = a;
  if (which == 40) b |= uint64_t{1} << 49;
  if (which == 41) b = ptx::wgmma_descriptor(shared, 16, 1024, Swizzle::none);
  if (which == 42) b = ptx::wgmma_descriptor(shared + (60 << 10), 16, 1024);
  if (which == 43 && lane == 9) b += 2;
  if (which == 44 && lane >= 16) return;
  if (which == 46) ptx::setmaxnreg_dec<104>();
  ptx::wgmma_fence();
  if (which == 46) ptx::wgmma_mma_async<half, 256>(large, a, b, 1);
  else ptx::wgmma_mma_async<half, 8>(d, a, b, 1);
  ptx::wgmma_commit_group();
  if (which == 45) d[1] += 1;
  ptx::wgmma_wait_group<0>();
  ptx::st_shared_v2(shared + (16 << 10) + 8 * threadIdx.x, d[0] + d[1] + d[2] + d[3], large[127]);
}

__global__ void __launch_bounds__(128) wrong_kernel(const __grid_constant__ Maps maps, float* global, int which) {
  FASTCONV_DYNAMIC_SHARED(raw);
  const uint32_t shared = (ptx::shared_address(raw) + 1023) & ~1023u, bar = shared + (40 << 10);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(bar, 3);
    ptx::fence_mbarrier_init();
  }
  for (uint32_t i = threadIdx.x; i < (16 << 10) / 16; i += 128) ptx::st_shared_v4(shared + 16 * i, {});
  ptx::fence_proxy_async();
  __syncthreads();
  if (which > 0 && which < 20 && threadIdx.x < 32) wrong_warp(which, shared, global);
  if (which >= 20 && which < 40 && threadIdx.x == 0) wrong_barrier(which, shared, bar, maps);
  if (which >= 40) wrong_wgmma(which, shared);
}

}  // namespace

void launch_wrong(float* global, int which, cudaStream_t stream) {
  Maps maps{};
  maps.tiled = encode_tensor_map(TiledMap{MapElement::f16, 2, global, {64, 8}, {128}, {64, 8}, Swizzle::bytes128});
  launch(FASTCONV_KERNEL(wrong_kernel), 1, 128, 48 << 10, stream, maps, global, which);
}
FASTCONV_LAUNCHER("wrong", "cases", launch_wrong);

}  // namespace fastconv::cuda
