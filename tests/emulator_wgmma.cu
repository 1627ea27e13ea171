// wgmma and TMA for test_emulator.py: every operand layout, and boxes of pixels as they land in shared memory.
#include "cuda_support/dtype.h"
#include "cuda_support/launch.h"
#include "cuda_support/launchers.h"
#include "cuda_support/ptx.cuh"
#include "cuda_support/tensor_map.h"

namespace fastconv::cuda {
namespace {

// ---------------------------------------------------------------- d[64][N] = a b, one warpgroup

constexpr int kDepth = 128;  // K of the whole product

/// An operand of `kRows` (M or N) by kDepth in shared memory, brought by TMA. K-major: panels of one swizzled row of K;
/// MN-major: panels of one swizzled row of M or N.
template <class T, int kRows, Swizzle kSwizzle, bool kMnMajor>
struct Operand {
  static constexpr int kBytes = kRows * kDepth * static_cast<int>(sizeof(T));
  static constexpr int kRowBytes = static_cast<int>(swizzle_row_bytes(kSwizzle));
  static constexpr int kRowElements = kRowBytes / static_cast<int>(sizeof(T));
  static constexpr int kPanels = (kMnMajor ? kRows : kDepth) / kRowElements;
  static constexpr int kPanelRows = kMnMajor ? kDepth : kRows;
  static constexpr int kPanelBytes = kPanelRows * kRowBytes;

  static CUtensorMap map(const void* base, MapElement element, int shift) {
    const int inner = kMnMajor ? kRows : kDepth, outer = (kMnMajor ? kDepth : kRows) + shift;
    TiledMap tiled{element,
                   2,
                   base,
                   {static_cast<uint64_t>(inner), static_cast<uint64_t>(outer)},
                   {inner * sizeof(T)},
                   {static_cast<uint32_t>(kRowElements), static_cast<uint32_t>(kPanelRows + shift)},
                   kSwizzle};
    return encode_tensor_map(tiled);
  }

  /// One thread. `shift` more rows are loaded, and the descriptor starts that much further down.
  __device__ static void load(uint32_t to, const CUtensorMap* map, uint32_t barrier, int shift) {
    for (int panel = 0; panel < kPanels; ++panel)
      ptx::cp_async_bulk_tensor_2d(to + panel * (kPanelBytes + shift * 1024), map, barrier, panel * kRowElements, 0);
  }
  __device__ static uint32_t loaded_bytes(int shift) { return kPanels * (kPanelBytes + shift * kRowBytes); }

  __device__ static uint64_t descriptor(uint32_t at, int step, int shift, bool exchanged) {
    constexpr int kStepElements = 32 / static_cast<int>(sizeof(T)), kStepsPerRow = kRowBytes / 32;
    if constexpr (kMnMajor) {
      const uint32_t leading = exchanged ? 8 * kRowBytes : kPanelBytes,
                     stride = exchanged ? kPanelBytes : 8 * kRowBytes;
      return ptx::wgmma_descriptor(at + step * kStepElements * kRowBytes, leading, stride, kSwizzle);
    } else {
      const uint32_t panel = at + step / kStepsPerRow * (kPanelBytes + shift * 1024);
      return ptx::wgmma_descriptor(panel + shift * kRowBytes + step % kStepsPerRow * 32, 16, 8 * kRowBytes, kSwizzle);
    }
  }
};

struct ProductMaps {
  CUtensorMap a, b;
};

/// `exchanged`: leading and stride offsets of MN-major operands the wrong way round.
template <class T, class Tag, int N, Swizzle kSwizzle, bool kMnMajorA, bool kMnMajorB, bool kRegisters>
__global__ void __launch_bounds__(128, 1)
    product_kernel(const __grid_constant__ ProductMaps maps, const T* a, float* d, int shift, int exchanged) {
  using A = Operand<T, 64, kSwizzle, kMnMajorA>;
  using B = Operand<T, N, kSwizzle, kMnMajorB>;
  FASTCONV_DYNAMIC_SHARED(raw);
  const uint32_t at_a = (ptx::shared_address(raw) + 1023) & ~1023u;
  const uint32_t at_b = at_a + A::kBytes, barrier = at_b + B::kBytes + B::kPanels * shift * 1024;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, row = thread / 32 * 16 + lane / 4;
  if (thread == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (thread == 0) {
    ptx::mbarrier_arrive_expect_tx(barrier, A::loaded_bytes(0) + B::loaded_bytes(shift));
    A::load(at_a, &maps.a, barrier, 0);
    B::load(at_b, &maps.b, barrier, shift);
  }
  ptx::mbarrier_wait_parity(barrier, 0);

  constexpr int kStepElements = 32 / static_cast<int>(sizeof(T));
  float accumulators[N / 2];
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kDepth / kStepElements; ++step) {
    const uint64_t b = B::descriptor(at_b, step, shift, exchanged != 0);
    if constexpr (kRegisters) {
      uint32_t fragment[4];
      constexpr int kPair = 4 / static_cast<int>(sizeof(T));
      for (int i = 0; i < 4; ++i) {
        const T* from = a + (row + i % 2 * 8) * kDepth + step * kStepElements + lane % 4 * kPair + i / 2 * 4 * kPair;
        memcpy(&fragment[i], from, 4);
      }
      ptx::wgmma_mma_async<Tag, N, kMnMajorB>(accumulators, fragment, b, step != 0);
    } else {
      ptx::wgmma_mma_async<Tag, N, kMnMajorA, kMnMajorB>(accumulators, A::descriptor(at_a, step, 0, exchanged != 0), b,
                                                         step != 0);
    }
  }
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();
#pragma unroll
  for (int i = 0; i < N / 2; ++i) d[(row + i % 4 / 2 * 8) * N + i / 4 * 8 + lane % 4 * 2 + i % 2] = accumulators[i];
}

template <class T, class Tag, int N, Swizzle kSwizzle, bool kMnMajorA = false, bool kMnMajorB = false,
          bool kRegisters = false>
void launch_product(const void* a, const void* b, float* d, int shift, int exchanged, cudaStream_t stream) {
  using A = Operand<T, 64, kSwizzle, kMnMajorA>;
  using B = Operand<T, N, kSwizzle, kMnMajorB>;
  constexpr MapElement kElement = std::is_same_v<T, half>       ? MapElement::f16
                                  : std::is_same_v<T, bfloat16> ? MapElement::bf16
                                                                : MapElement::tf32;
  const ProductMaps maps{A::map(a, kElement, 0), B::map(b, kElement, shift)};
  const size_t shared_bytes = 2048 + A::kBytes + B::kBytes + static_cast<size_t>(B::kPanels) * shift * 1024;
  launch(FASTCONV_KERNEL(product_kernel<T, Tag, N, kSwizzle, kMnMajorA, kMnMajorB, kRegisters>),
         {.grid = 1, .block = 128, .shared_bytes = shared_bytes}, stream, maps, static_cast<const T*>(a), d, shift,
         exchanged);
}

// ---------------------------------------------------------------- boxes as they land

struct Box {
  int c, w, h, n, offset_w, offset_h;
};

/// Loads one im2col box per block (or pair of blocks, half each, multicast to both) and writes it out as it lies.
__global__ void box_kernel(const __grid_constant__ CUtensorMap map, const Box* boxes, uint32_t* out, int bytes,
                           int pair) {
  FASTCONV_DYNAMIC_SHARED(raw);
  const uint32_t at = (ptx::shared_address(raw) + 1023) & ~1023u, barrier = at + bytes;
  const uint32_t rank = pair ? ptx::cluster_ctarank() : 0;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (pair) ptx::barrier_cluster_sync();
  if (threadIdx.x == 0) {
    const Box box = boxes[blockIdx.x];
    ptx::mbarrier_arrive_expect_tx(barrier, bytes);
    const ptx::Im2colStart start{box.c, box.w, box.h, box.n, box.offset_w, box.offset_h};
    if (pair) ptx::cp_async_bulk_tensor_4d_im2col_multicast(at + rank * bytes / 2, &map, barrier, 3, start);
    else ptx::cp_async_bulk_tensor_4d_im2col(at, &map, barrier, start);
  }
  ptx::mbarrier_wait_parity(barrier, 0);
  for (int i = static_cast<int>(threadIdx.x) * 16; i < bytes; i += static_cast<int>(blockDim.x) * 16) {
    const uint4 chunk = ptx::ld_shared_v4(at + i);
    memcpy(out + (static_cast<size_t>(blockIdx.x) * bytes + i) / 4, &chunk, 16);
  }
  if (pair) ptx::barrier_cluster_sync();
}

/// Loads the im2col box of each block from one map and stores it through another.
__global__ void copy_kernel(const __grid_constant__ CUtensorMap from, const __grid_constant__ CUtensorMap to,
                            const Box* boxes, int bytes) {
  FASTCONV_DYNAMIC_SHARED(raw);
  const uint32_t at = (ptx::shared_address(raw) + 1023) & ~1023u, barrier = at + bytes;
  if (threadIdx.x != 0) return;
  const Box box = boxes[blockIdx.x];
  ptx::mbarrier_init(barrier, 1);
  ptx::fence_mbarrier_init();
  ptx::mbarrier_arrive_expect_tx(barrier, bytes);
  ptx::cp_async_bulk_tensor_4d_im2col(at, &from, barrier, {box.c, box.w, box.h, box.n, 0, 0});
  ptx::mbarrier_wait_parity(barrier, 0);
  ptx::cp_async_bulk_tensor_4d_im2col_store(&to, at, box.c, box.w, box.h, box.n);
  ptx::cp_async_bulk_commit_group();
  ptx::cp_async_bulk_wait_group<0>();
}

/// Rows of 16 floats through TMA with and without rounding to tf32.
__global__ void rounding_kernel(const __grid_constant__ CUtensorMap map, float* out) {
  FASTCONV_SHARED(values, float[64]);
  FASTCONV_SHARED(space, unsigned char[64 + 128]);
  const uint32_t barrier = ptx::shared_address(space);
  const uint32_t to = (ptx::shared_address(space) + 127) & ~127u;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(barrier, 64);
    ptx::cp_async_bulk_tensor_2d(to, &map, barrier, 0, 0);
  }
  __syncthreads();
  ptx::mbarrier_wait_parity(barrier, 0);
  if (threadIdx.x < 4) {
    const uint4 chunk = ptx::ld_shared_v4(to + 16 * threadIdx.x);
    memcpy(&values[4 * threadIdx.x], &chunk, 16);
  }
  __syncthreads();
  if (threadIdx.x < 16) out[threadIdx.x] = values[threadIdx.x];
}

/// One wgmma whose operands only plain stores write: ones times `value`, so d = 16 * value.
__global__ void __launch_bounds__(128, 1) refill_kernel(float* d, int value) {
  FASTCONV_DYNAMIC_SHARED(raw);
  const uint32_t address = ptx::shared_address(raw), at = (address + 1023) & ~1023u;
  auto* operands = reinterpret_cast<half*>(raw + (at - address));
  for (int i = static_cast<int>(threadIdx.x); i < 72 * 64; i += 128)  // 64 rows of A, 8 of B
    operands[i] = from_float<half>(i < 64 * 64 ? 1.0f : static_cast<float>(value));
  ptx::fence_proxy_async();
  __syncthreads();
  float sums[4] = {};
  ptx::wgmma_fence();
  ptx::wgmma_mma_async<half, 8>(sums, ptx::wgmma_descriptor(at, 16, 1024),
                                ptx::wgmma_descriptor(at + 64 * 128, 16, 1024), 1);
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();
  if (threadIdx.x == 0) d[0] = sums[0];
}

/// A TMA store, then one of the two waits, then a look at the tensor.
__global__ void bulk_kernel(const __grid_constant__ CUtensorMap map, const float* tensor, float* seen, int full) {
  FASTCONV_SHARED(values, float[48]);
  if (threadIdx.x > 0) return;
  const uint32_t at = (ptx::shared_address(values) + 127) & ~127u;
  for (int i = 0; i < 4; ++i) ptx::st_shared_v4(at + 16 * i, {1, 1, 1, 1});
  ptx::fence_proxy_async();
  ptx::cp_async_bulk_tensor_2d_store(&map, at, 0, 0);
  ptx::cp_async_bulk_commit_group();
  if (full) ptx::cp_async_bulk_wait_group<0>();
  else ptx::cp_async_bulk_wait_group_read<0>();
  ptx::st_shared_v4(at, {});  // what was stored has been read
  seen[0] = tensor[0];
}

}  // namespace

// ---------------------------------------------------------------- launchers

using enum Swizzle;
#define PRODUCT(name, ...)                                                                                            \
  void launch_product_##name(const void* a, const void* b, float* d, int shift, int exchanged, cudaStream_t stream) { \
    launch_product<__VA_ARGS__>(a, b, d, shift, exchanged, stream);                                                   \
  }                                                                                                                   \
  FASTCONV_LAUNCHER("product", #name, launch_product_##name);

// Names are type, N, bytes of the swizzle, then kk, mk, km, mm for how A and B are stored, r for A in registers.
PRODUCT(f16_64_128_kk, half, half, 64, bytes128)
PRODUCT(f16_64_128_mk, half, half, 64, bytes128, true, false)
PRODUCT(f16_64_128_km, half, half, 64, bytes128, false, true)
PRODUCT(f16_64_128_mm, half, half, 64, bytes128, true, true)
PRODUCT(f16_64_64_kk, half, half, 64, bytes64)
PRODUCT(f16_64_64_mm, half, half, 64, bytes64, true, true)
PRODUCT(f16_64_32_kk, half, half, 64, bytes32)
PRODUCT(f16_64_32_mm, half, half, 64, bytes32, true, true)
PRODUCT(f16_8_128_kk, half, half, 8, bytes128)
PRODUCT(f16_16_128_kk, half, half, 16, bytes128)
PRODUCT(f16_96_128_kk, half, half, 96, bytes128)
PRODUCT(f16_256_128_km, half, half, 256, bytes128, false, true)
PRODUCT(f16_32_128_rk, half, half, 32, bytes128, false, false, true)
PRODUCT(f16_64_128_rm, half, half, 64, bytes128, false, true, true)
PRODUCT(bf16_128_128_kk, bfloat16, bfloat16, 128, bytes128)
PRODUCT(bf16_192_64_mm, bfloat16, bfloat16, 192, bytes64, true, true)
PRODUCT(tf32_64_128_kk, float, ptx::tf32, 64, bytes128)
PRODUCT(tf32_32_64_kk, float, ptx::tf32, 32, bytes64)
PRODUCT(tf32_64_128_rk, float, ptx::tf32, 64, bytes128, false, false, true)
#undef PRODUCT

/// `corners` is lower_w, lower_h, upper_w, upper_h; `box` channels, pixels; half of the pixels per block where paired.
void launch_boxes(const ConvProblem& p, const void* x, const int* corners, const int* box, const int* boxes,
                  int box_count, int pair, void* out, cudaStream_t stream) {
  const int row_bytes = 2 * box[0];
  const Swizzle swizzle = row_bytes == 128 ? bytes128 : row_bytes == 64 ? bytes64 : row_bytes == 32 ? bytes32 : none;
  const CUtensorMap map = encode_tensor_map(Im2colMap{
      MapElement::f16, x, p.n, p.c, p.h, p.w, corners[0], corners[1], corners[2], corners[3],
      static_cast<int>(p.stride.w), static_cast<int>(p.stride.h), box[0], pair ? box[1] / 2 : box[1], swizzle});
  const int bytes = row_bytes * box[1];
  launch(FASTCONV_KERNEL(box_kernel),
         {.grid = static_cast<unsigned>(box_count),
          .block = 64,
          .shared_bytes = static_cast<size_t>(bytes) + 2048,
          .cluster = pair ? 2u : 1u},
         stream, map, reinterpret_cast<const Box*>(boxes), static_cast<uint32_t*>(out), bytes, pair);
}
FASTCONV_LAUNCHER("boxes", "im2col", launch_boxes);

/// x's pixels on the lattice of p.stride to y, which has x's shape.
void launch_copy(const ConvProblem& p, const void* x, const int* box, const int* boxes, int box_count, void* y,
                 cudaStream_t stream) {
  const auto map_of = [&](const void* base) {
    return encode_tensor_map(Im2colMap{MapElement::f16, base, p.n, p.c, p.h, p.w, 0, 0, 0, 0,
                                       static_cast<int>(p.stride.w), static_cast<int>(p.stride.h), box[0], box[1],
                                       bytes128});
  };
  const int bytes = 2 * box[0] * box[1];
  launch(FASTCONV_KERNEL(copy_kernel), static_cast<unsigned>(box_count), 32, static_cast<size_t>(bytes) + 2048, stream,
         map_of(x), map_of(y), reinterpret_cast<const Box*>(boxes), bytes);
}
FASTCONV_LAUNCHER("copy", "im2col", launch_copy);

/// Encodes a map and nothing else: `values` are channel box, pixels, swizzle, and the corners and steps, {w, h} each.
void launch_encode(const ConvProblem& p, const void* x, int offset_bytes, const int* values, cudaStream_t) {
  encode_tensor_map(Im2colMap{MapElement::f16, static_cast<const unsigned char*>(x) + offset_bytes, p.n, p.c, p.h, p.w,
                              values[3], values[4], values[5], values[6], values[7], values[8], values[0], values[1],
                              static_cast<Swizzle>(values[2])});
}
FASTCONV_LAUNCHER("encode", "im2col", launch_encode);

void launch_rounding(const float* x, float* out, int to_tf32, cudaStream_t stream) {
  const CUtensorMap map =
      encode_tensor_map(TiledMap{to_tf32 ? MapElement::tf32 : MapElement::f32, 2, x, {16, 1}, {64}, {16, 1}, none});
  launch(FASTCONV_KERNEL(rounding_kernel), 1, 32, 0, stream, map, out);
}
FASTCONV_LAUNCHER("rounding", "tiled", launch_rounding);

void launch_refill(float* d, int value, cudaStream_t stream) {
  launch(FASTCONV_KERNEL(refill_kernel), 1, 128, 12 << 10, stream, d, value);
}
FASTCONV_LAUNCHER("refill", "wgmma", launch_refill);

void launch_bulk(float* tensor, float* seen, int full, cudaStream_t stream) {
  const CUtensorMap map = encode_tensor_map(TiledMap{MapElement::f32, 2, tensor, {16, 1}, {64}, {16, 1}, none});
  launch(FASTCONV_KERNEL(bulk_kernel), 1, 32, 0, stream, map, tensor, seen, full);
}
FASTCONV_LAUNCHER("bulk", "store", launch_bulk);

}  // namespace fastconv::cuda
