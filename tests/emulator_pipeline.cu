// A small Hopper convolution for test_emulator.py, with every mechanism that a large one has: TMA im2col and multicast
// into a ring of mbarriers, a producer warp, two warpgroups that take alternate tiles, swizzled stmatrix, TMA stores.
//
// y[m][k] = sum over (r, s, c) of x_im2col[m][(r, s, c)] w[k][(r, s, c)]; x and y are NHWC, w is KRSC, 16-bit, C and K
// multiples of 8. `bug` plants one mistake, listed in test_emulator.py.
#include "cuda_support/device.h"
#include "cuda_support/dtype.h"
#include "cuda_support/launch.h"
#include "cuda_support/launchers.h"
#include "cuda_support/ptx.cuh"
#include "cuda_support/tensor_map.h"

namespace fastconv::cuda {
namespace {

constexpr int kPixels = 64, kChannels = 64, kBlockC = 64, kStages = 3, kThreads = 3 * 128;
constexpr int kPixelBytes = kPixels * 128, kWeightBytes = kChannels * 128, kStageBytes = kPixelBytes + kWeightBytes;
constexpr int kStagingBytes = kPixels * 128;  // one for each warpgroup
constexpr int kSharedBytes = 1024 + kStages * kStageBytes + 2 * kStagingBytes + (2 * kStages + 2) * 8;
static_assert(kStageBytes % 1024 == 0, "a swizzled tile starts at a multiple of 1024 bytes");

struct Parameters {
  CUtensorMap pixels, weights, output;
  int m, k, p, q, s, stride, pad_h, pad_w, dilation;
  int c_blocks, k_blocks;         // blocks of input channels, R * S times as many
  int channel_tiles, tiles, bug;  // `tiles` per block of a cluster
};

struct Tile {
  int pixel, channel;
};

template <int kCluster>
__device__ __forceinline__ Tile tile_of(const Parameters& p, int number, int rank) {
  return {(number / p.channel_tiles * kCluster + rank) * kPixels, number % p.channel_tiles * kChannels};
}

struct Ring {
  uint32_t base;
  __device__ __forceinline__ uint32_t stage(int i) const { return base + i * kStageBytes; }
  __device__ __forceinline__ uint32_t staging(int warpgroup) const {
    return base + kStages * kStageBytes + warpgroup * kStagingBytes;
  }
  __device__ __forceinline__ uint32_t full(int i) const { return staging(2) + i * 8; }
  __device__ __forceinline__ uint32_t empty(int i) const { return full(kStages + i); }
  /// The other warpgroup is past its last wait: see mbarrier_try_wait_parity about phases n and n + 2.
  __device__ __forceinline__ uint32_t order(int warpgroup) const { return full(2 * kStages + warpgroup); }
};

template <int kCluster>
__device__ void produce(const Parameters& p, const Ring& ring, int rank, int first, int step) {
  int slot = 0, parity = 1;
  for (int number = first; number < p.tiles; number += step) {
    const Tile tile = tile_of<kCluster>(p, number, rank);
    const int pixel = tile.pixel < p.m ? tile.pixel : 0;  // the last cluster's spare tile: loaded, never stored
    const int q = pixel % p.q, row = pixel / p.q, n = row / p.p;
    const int w = q * p.stride - p.pad_w, h = row % p.p * p.stride - p.pad_h;
    for (int block = 0; block < p.k_blocks; ++block) {
      const int tap = block / p.c_blocks, c = block % p.c_blocks * kBlockC;
      if (p.bug != 2) ptx::mbarrier_wait_parity(ring.empty(slot), parity);
      const int wrong_bytes = p.bug == 8 ? -128 : p.bug == 9 ? 128 : 0;
      ptx::mbarrier_arrive_expect_tx(ring.full(slot), kStageBytes + wrong_bytes);
      ptx::cp_async_bulk_tensor_4d_im2col(ring.stage(slot), &p.pixels, ring.full(slot),
                                          {c, w, h, n, tap % p.s * p.dilation, tap / p.s * p.dilation});
      const uint32_t weights = ring.stage(slot) + kPixelBytes;
      if constexpr (kCluster == 1)
        ptx::cp_async_bulk_tensor_3d(weights, &p.weights, ring.full(slot), c, tap, tile.channel);
      else  // each block brings its share to all
        ptx::cp_async_bulk_tensor_3d_multicast(weights + rank * (kWeightBytes / kCluster), &p.weights, ring.full(slot),
                                               (1 << kCluster) - 1, c, tap,
                                               tile.channel + rank * (kChannels / kCluster));
      if (++slot == kStages) {
        slot = 0;
        parity ^= 1;
      }
    }
  }
}

template <int kCluster>
__device__ __forceinline__ void release(const Ring& ring, int slot, int lane) {
  if constexpr (kCluster == 1) {
    if (lane == 0) ptx::mbarrier_arrive(ring.empty(slot));
  } else {
    if (lane < kCluster) ptx::mbarrier_arrive_cluster(ring.empty(slot), lane);
  }
}

/// The products of one tile. `done` blocks have gone through the ring before.
template <class T, int kCluster>
__device__ __forceinline__ void multiply_tile(const Parameters& p, const Ring& ring, int done, int warpgroup,
                                              float (&sums)[kChannels / 2]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int slot = done % kStages, parity = done / kStages & 1, previous = -1;
  for (int block = 0; block < p.k_blocks; ++block) {
    if (p.bug != 1) ptx::mbarrier_wait_parity(ring.full(slot), parity);
    const uint64_t a = ptx::wgmma_descriptor(ring.stage(slot), 16, 1024);
    const uint64_t b = ptx::wgmma_descriptor(ring.stage(slot) + kPixelBytes, 16, 1024);
    if (p.bug != 12) ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step)
      ptx::wgmma_mma_async<T, kChannels>(sums, a + 2 * step, b + 2 * step, block | step);
    ptx::wgmma_commit_group();
    if (block == p.k_blocks - 1 && lane == 0) ptx::mbarrier_arrive(ring.order(warpgroup ^ 1));
    if (p.bug != 6) ptx::wgmma_wait_group<1>();  // the block before has been read: its slot is free
    if (p.bug == 14) release<kCluster>(ring, slot, lane);
    else if (previous >= 0) release<kCluster>(ring, previous, lane);
    previous = slot;
    if (++slot == kStages) {
      slot = 0;
      parity ^= 1;
    }
  }
  if (p.bug != 5) ptx::wgmma_wait_group<0>();
  if (p.bug != 14) release<kCluster>(ring, previous, lane);
}

template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  const Vector<T, 2> pair{from_float<T>(low), from_float<T>(high)};
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}

template <class T>
__device__ __forceinline__ void store_tile(const Parameters& p, const Ring& ring, Tile tile, int warpgroup,
                                           const float (&sums)[kChannels / 2]) {
  const int thread = static_cast<int>(threadIdx.x) % 128, lane = thread % 32;
  const uint32_t staging = ring.staging(warpgroup);
  if (thread == 0 && p.bug != 13) ptx::cp_async_bulk_wait_group_read<0>();  // the tile before has left the staging area
  ptx::bar_sync(1 + warpgroup, 128);
#pragma unroll
  for (int group = 0; group < kChannels / 16; ++group) {
    const float* v = sums + 8 * group;
    const uint32_t fragments[4] = {pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7])};
    const int row = thread / 32 * 16 + lane % 16, chunk = 2 * group + lane / 16;
    const uint32_t address = swizzle_address(staging + row * 128 + chunk * 16, Swizzle::bytes128);
    ptx::stmatrix_x4(p.bug == 3 ? address ^ 16 : address, fragments);
  }
  if (p.bug != 10) ptx::fence_proxy_async();
  if (p.bug != 11) ptx::bar_sync(1 + warpgroup, 128);
  if (thread == 0) {
    if (tile.pixel < p.m) ptx::cp_async_bulk_tensor_2d_store(&p.output, staging, tile.channel, tile.pixel);
    ptx::cp_async_bulk_commit_group();
  }
}

template <class T, int kCluster>
__global__ void __launch_bounds__(kThreads, 1) pipeline_kernel(const __grid_constant__ Parameters p) {
  FASTCONV_DYNAMIC_SHARED(raw);
  const Ring ring{(ptx::shared_address(raw) + 1023) & ~1023u};
  const int rank = kCluster > 1 ? static_cast<int>(ptx::cluster_ctarank()) : 0;
  const int first = static_cast<int>(blockIdx.x) / kCluster, step = static_cast<int>(gridDim.x) / kCluster;
  const int warp = static_cast<int>(threadIdx.x) / 32, warpgroup = warp / 4;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(ring.full(i), 1);
      ptx::mbarrier_init(ring.empty(i), 4 * kCluster);  // one arrival for each warp that reads
    }
    ptx::mbarrier_init(ring.order(0), 4);
    ptx::mbarrier_init(ring.order(1), 4);
    if (p.bug != 15) ptx::fence_mbarrier_init();
  }
  if (p.bug != 18) __syncthreads();
  if (kCluster > 1) ptx::barrier_cluster_sync();

  if (warpgroup == 2) {
    ptx::setmaxnreg_dec<40>();
    if (warp == 8 && ptx::elect_sync()) produce<kCluster>(p, ring, rank, first, step);
  } else {
    ptx::setmaxnreg_inc<232>();
    float sums[kChannels / 2];
    int turn = 0;
    for (int number = first; number < p.tiles; number += step, ++turn) {
      if (turn % 2 != warpgroup) continue;
      if (turn > 0 && p.bug != 7) ptx::mbarrier_wait_parity(ring.order(warpgroup), (turn - 1) / 2 & 1);
      multiply_tile<T, kCluster>(p, ring, turn * p.k_blocks, warpgroup, sums);
      store_tile<T>(p, ring, tile_of<kCluster>(p, number, rank), warpgroup, sums);
    }
    if (threadIdx.x % 128 == 0) ptx::cp_async_bulk_wait_group_read<0>();
  }
  if (kCluster > 1 && p.bug != 17) {
    __syncwarp();
    ptx::barrier_cluster_sync();  // the others may still multicast to this block and arrive on its barriers
  }
}

template <class T, int kCluster>
void launch_pipeline(const ConvProblem& f, const void* x, const void* w, void* y, int bug, cudaStream_t stream) {
  constexpr MapElement kElement = std::is_same_v<T, half> ? MapElement::f16 : MapElement::bf16;
  const auto as_int = [](int64_t value) { return static_cast<int>(value); };
  const int span_w = as_int((f.s - 1) * f.dilation.w), span_h = as_int((f.r - 1) * f.dilation.h);
  const int pad_w = as_int(f.padding.left), pad_h = as_int(f.padding.top);
  const auto c = static_cast<uint64_t>(f.c), k = static_cast<uint64_t>(f.k), taps = static_cast<uint64_t>(f.r * f.s);
  Parameters p{};
  p.m = as_int(f.n * f.p() * f.q());
  p.k = as_int(f.k);
  p.p = as_int(f.p());
  p.q = as_int(f.q());
  p.s = as_int(f.s);
  p.stride = as_int(f.stride.w);
  p.pad_h = pad_h;
  p.pad_w = pad_w;
  p.dilation = as_int(f.dilation.w);
  p.c_blocks = as_int(ceil_div(f.c, kBlockC));
  p.k_blocks = p.c_blocks * as_int(f.r * f.s);
  p.channel_tiles = as_int(ceil_div(f.k, kChannels));
  p.tiles = as_int(ceil_div(ceil_div(p.m, kPixels), kCluster)) * p.channel_tiles;
  p.bug = bug;
  p.pixels =
      encode_tensor_map(Im2colMap{kElement, x, f.n, f.c, f.h, f.w, -pad_w, -pad_h, pad_w - span_w + (bug == 4 ? 1 : 0),
                                  pad_h - span_h, p.stride, p.stride, kBlockC, kPixels, Swizzle::bytes128});
  p.weights = encode_tensor_map(TiledMap{
      kElement, 3, w, {c, taps, k}, {2 * c, 2 * c * taps}, {kBlockC, 1, kChannels / kCluster}, Swizzle::bytes128});
  p.output = encode_tensor_map(
      TiledMap{kElement, 2, y, {k, static_cast<uint64_t>(p.m)}, {2 * k}, {kChannels, kPixels}, Swizzle::bytes128});
  const int clusters = min(p.tiles, max(1, device_properties().sm_count / kCluster));
  launch(FASTCONV_KERNEL(pipeline_kernel<T, kCluster>),
         {.grid = static_cast<unsigned>(clusters * kCluster),
          .block = kThreads,
          .shared_bytes = kSharedBytes,
          .cluster = kCluster},
         stream, p);
}

}  // namespace

void launch_pipeline_single(const ConvProblem& p, const void* x, const void* w, void* y, int bug, cudaStream_t stream) {
  if (p.dtype == DType::f16) launch_pipeline<half, 1>(p, x, w, y, bug, stream);
  else launch_pipeline<bfloat16, 1>(p, x, w, y, bug, stream);
}
FASTCONV_LAUNCHER("pipeline", "single", launch_pipeline_single);

void launch_pipeline_pair(const ConvProblem& p, const void* x, const void* w, void* y, int bug, cudaStream_t stream) {
  launch_pipeline<half, 2>(p, x, w, y, bug, stream);
}
FASTCONV_LAUNCHER("pipeline", "pair", launch_pipeline_pair);

}  // namespace fastconv::cuda
