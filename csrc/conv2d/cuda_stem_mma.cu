// Stem convolution, forward, fp16 and bf16 on tensor cores (mma.sync, sm_80): the same problems as cuda_stem.cu.
//
// An implicit product: rows are pixels, columns filters, and the depth runs over the window. Image channels are padded
// to 4 in shared memory, so that a pixel is 8 bytes and a window row is a run of pixels. 16 steps of depth are 4 pixels
// of that run. The order of the depth is ours to choose, as long as both operands have the same: lane t of a quad takes
// all 4 channels of pixel t where the instruction's layout says elements 2t, 2t + 1, 2t + 8, 2t + 9, and both operands'
// fragments become one aligned 8-byte load, for any stride. A run is padded to a multiple of 4 pixels: what lies behind
// the window is replaced by zeros (multiplying it by zero weights would let a NaN in).
//
// Useful part of the depth: 7x7 of 3 channels 147 / 224, 3x3 27 / 48, 11x11 363 / 528.
//
// A program is 8 warps of 64 pixels x 32 filters. Results go through shared memory, a warp's 32 x 32 at a time, so that
// a warp writes 64 contiguous bytes in either layout.
#include "conv2d/cuda_stem.cuh"
#include "conv2d/cuda_stem_refuse.h"
#include "cuda_support/launch.h"
#include "cuda_support/launchers.h"
#include "cuda_support/ptx.cuh"

namespace fastconv::cuda {
namespace {

constexpr int kWarpPixels = 64, kWarpFilters = 32, kWarps = kStemThreads / 32;
constexpr int kRowTiles = kWarpPixels / 16, kColumnTiles = kWarpFilters / 8;
constexpr int kBufferWords = 32 * 33;     // of a warp: 32 x 32 results, and a word per row against bank conflicts
constexpr int64_t kSlabBytes = 24 << 10;  // at most twice that here, where pixels have 4 channels

struct StemMmaBlocks {
  int filter_groups = 1, filter_tiles = 1;  // of 32 filters, in a block; of blocks
  int run = 1;                              // steps of 4 pixels that cover a window row
  int row_pixels = 1;                       // of the slab
  int tiles_per_block = 1;
  int64_t tiles = 0;
  FastDivide by_row_pixels;

  int filters() const { return filter_groups * kWarpFilters; }
  int64_t weight_bytes(const ConvProblem& p) const { return p.r * run * filters() * 32; }
  /// All but the slab: results, scales and shifts, weights.
  int64_t fixed_bytes(const ConvProblem& p) const {
    return (kWarps * kBufferWords + 2 * filters()) * int64_t{sizeof(float)} + weight_bytes(p);
  }
  int64_t slab_bytes(const StemTile& tile) const { return int64_t{tile.slab_rows} * row_pixels * 8; }
};

/// Weights as [window row and step][filter][pixel of the step][channel], zeros where the window or the filters end.
template <class T>
__device__ __forceinline__ void fill_weights(const ConvProblem& p, const StemMmaBlocks& blocks, const T* weight,
                                             int first_filter, T* to) {
  const int filters = blocks.filter_groups * kWarpFilters;
  const Strides4 ws = p.weight_strides();
  for (int i = threadIdx.x; i < static_cast<int>(p.r) * blocks.run * filters * 16; i += kStemThreads) {
    const int c = i % 4, t = i / 4 % 4, k = first_filter + i / 16 % filters, step = i / 16 / filters;
    const int r = step / blocks.run, s = step % blocks.run * 4 + t;
    const bool exists = c < p.c && s < p.s && k < p.k;
    to[i] = exists ? weight[k * ws.n + c * ws.c + r * ws.h + s * ws.w] : from_float<T>(0.0f);
  }
}

/// The slab as [row][column][4 channels]. Neighbouring threads read neighbouring elements of either layout.
template <class T>
__device__ __forceinline__ void fill_pixels(const ConvProblem& p, const StemTile& tile, const StemMmaBlocks& blocks,
                                            const T* image, int row, int column, T* slab) {
  const int top = row * static_cast<int>(p.stride.h) - static_cast<int>(p.padding.top);
  const int left = column * static_cast<int>(p.stride.w) - static_cast<int>(p.padding.left);
  const int height = static_cast<int>(p.h), width = static_cast<int>(p.w), channels = static_cast<int>(p.c);
  const int pixels = tile.slab_rows * blocks.row_pixels;
  for (int i = threadIdx.x; i < 4 * pixels; i += kStemThreads) {
    const int pixel = p.layout == Layout::nchw ? i % pixels : i / 4, c = p.layout == Layout::nchw ? i / pixels : i % 4;
    uint32_t s = pixel;
    const int h = top + static_cast<int>(blocks.by_row_pixels.divide_keep_rest(s)), w = left + static_cast<int>(s);
    const bool exists = c < channels && static_cast<uint32_t>(h) < static_cast<uint32_t>(height) &&
                        static_cast<uint32_t>(w) < static_cast<uint32_t>(width);
    const int at = p.layout == Layout::nchw ? (c * height + h) * width + w : (h * width + w) * channels + c;
    slab[pixel * 4 + c] = exists ? image[at] : from_float<T>(0.0f);
  }
}

/// sum += slab * weights for the warp's pixels and filters. base[i]: slab pixel where the window of the lane's row
/// g + 8 i starts (g = lane / 4), plus the lane's place in its quad.
template <class T>
__device__ __forceinline__ void multiply(const ConvProblem& p, const StemMmaBlocks& blocks, const T* slab,
                                         const T* weights, const int (&base)[2 * kRowTiles],
                                         float (&sum)[kRowTiles][kColumnTiles][4]) {
  const int place = threadIdx.x % 4, filters = blocks.filter_groups * kWarpFilters;
  const uint2* pixels = reinterpret_cast<const uint2*>(slab);
  const uint2* taps = reinterpret_cast<const uint2*>(weights);  // at the lane's filter and place
#pragma unroll 1                                                // unrolled, it needs more registers than there are
  for (int r = 0; r < static_cast<int>(p.r); ++r) {
#pragma unroll 1
    for (int step = 0; step < blocks.run; ++step, taps += filters * 4) {
      const bool inside = step * 4 + place < static_cast<int>(p.s);
      const uint2* from = pixels + r * blocks.row_pixels + step * 4;
      uint32_t b[kColumnTiles][2];
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) b[n][0] = taps[n * 32].x, b[n][1] = taps[n * 32].y;
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        const uint2 upper = inside ? from[base[2 * m]] : uint2{0, 0};
        const uint2 lower = inside ? from[base[2 * m + 1]] : uint2{0, 0};
        const uint32_t a[4] = {upper.x, lower.x, upper.y, lower.y};
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) ptx::mma_m16n8k16<T>(sum[m][n], a, b[n]);
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kStemThreads, 2)
    stem_mma(ConvProblem p, StemTile tile, StemMmaBlocks blocks, const T* x, const T* weight, T* y,
             CudaEpilogue epilogue, StemEpilogue output) {
  FASTCONV_DYNAMIC_SHARED(shared);
  const int filters = blocks.filter_groups * kWarpFilters, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* buffer = reinterpret_cast<float*>(shared) + warp * kBufferWords;
  float* scales = reinterpret_cast<float*>(shared) + kWarps * kBufferWords;
  T* weights = reinterpret_cast<T*>(scales + 2 * filters);
  T* slab = weights + static_cast<int>(p.r) * blocks.run * filters * 16;
  const int first_filter = static_cast<int>(blockIdx.y) * filters, pixels = tile.rows * tile.columns;
  fill_weights(p, blocks, weight, first_filter, weights);
  fill_scales(epilogue, first_filter, filters, static_cast<int>(p.k), scales);
  const int own_filter = warp % blocks.filter_groups * kWarpFilters;
  const int own_pixel = warp / blocks.filter_groups * kWarpPixels;
  int base[2 * kRowTiles];
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    uint32_t q = min(own_pixel + 8 * i + lane / 4, pixels - 1);  // rows beyond the tile repeat its last pixel
    const int row = static_cast<int>(tile.by_columns.divide_keep_rest(q));
    base[i] = row * static_cast<int>(p.stride.h) * blocks.row_pixels + static_cast<int>(q * p.stride.w) + lane % 4;
  }
  const int rows = static_cast<int>(p.p()), columns = static_cast<int>(p.q()), all_filters = static_cast<int>(p.k);
  const bool lanes_are_pixels = p.layout == Layout::nchw;
  for (int done = 0; done < blocks.tiles_per_block; ++done) {
    const int64_t index = int64_t{blockIdx.x} * blocks.tiles_per_block + done;
    if (index >= blocks.tiles) break;
    const int64_t image = index / (tile.tiles_p * tile.tiles_q);
    const int in_image = static_cast<int>(index % (tile.tiles_p * tile.tiles_q));
    const int row = in_image / tile.tiles_q * tile.rows, column = in_image % tile.tiles_q * tile.columns;
    __syncthreads();  // the last tile's slab is no longer read
    fill_pixels(p, tile, blocks, x + image * (p.c * p.h * p.w), row, column, slab);
    __syncthreads();
    const int64_t image_at = image * (p.k * (rows * columns));
    float sum[kRowTiles][kColumnTiles][4] = {};
    multiply(p, blocks, slab, weights + (own_filter * 4 + lane) * 4, base, sum);
#pragma unroll
    for (int half_tile = 0; half_tile < 2; ++half_tile) {  // 32 of the 64 pixels
      __syncwarp();                                        // the buffer is no longer read
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            buffer[(m * 16 + i / 2 * 8 + lane / 4) * 33 + n * 8 + lane % 4 * 2 + i % 2] = sum[half_tile * 2 + m][n][i];
      __syncwarp();
#pragma unroll 2
      for (int i = 0; i < 32; ++i) {  // lanes are neighbours in memory: pixels in NCHW, filters in NHWC
        const int pixel = lanes_are_pixels ? lane : i, filter = lanes_are_pixels ? i : lane;
        uint32_t q = own_pixel + half_tile * 32 + pixel;
        const bool in_tile = static_cast<int>(q) < pixels;
        const int at_row = row + static_cast<int>(tile.by_columns.divide_keep_rest(q));
        const int at_column = column + static_cast<int>(q), own = own_filter + filter;
        if (in_tile && at_row < rows && at_column < columns && first_filter + own < all_filters) {
          const int64_t to = image_at + (at_row * columns + at_column) * output.pixel_stride +
                             (first_filter + own) * output.filter_stride;
          y[to] = output.finish<T>(buffer[pixel * 33 + filter] * scales[own] + scales[filters + own], to);
        }
      }
    }
  }
}

}  // namespace

/// y = epilogue(x * weight) in fp16 or bf16; all tensors dense in the problem's layout.
void launch_stem_mma_forward(const ConvProblem& p, const void* x, const void* weight, void* y,
                             const CudaEpilogue& epilogue, cudaStream_t stream) {
  if (const char* reason = refuse_stem_mma_cuda(p))
    throw std::runtime_error("the CUDA stem kernel on tensor cores refuses " + describe(p) + ": " + reason +
                             "; the stem kernel without them serves it");
  StemMmaBlocks blocks;
  blocks.run = static_cast<int>(ceil_div(p.s, 4));
  const auto room = [&] { return device_properties().shared_bytes_per_block - blocks.fixed_bytes(p); };
  // 64 filters share a slab where that wastes none; but those of 11x11 alone fill the 99 KB of some devices.
  blocks.filter_groups = round_up(p.k, 64) == round_up(p.k, 32) ? 2 : 1;
  if (room() < kSlabBytes) blocks.filter_groups = 1;
  blocks.filter_tiles = static_cast<int>(ceil_div(p.k, blocks.filters()));
  const StemTile tile =
      choose_stem_tile(p, kWarps / blocks.filter_groups * kWarpPixels, std::min(kSlabBytes, room() / 2));
  blocks.row_pixels = tile.slab_columns + 4 * blocks.run - static_cast<int>(p.s);
  blocks.by_row_pixels = FastDivide(blocks.row_pixels);
  blocks.tiles = p.n * tile.tiles_p * tile.tiles_q;
  // A block that does several tiles fetches its weights once; four blocks for each multiprocessor even out the end.
  const int64_t wanted = ceil_div(4 * int64_t{device_properties().sm_count}, blocks.filter_tiles);
  blocks.tiles_per_block = static_cast<int>(std::clamp<int64_t>(blocks.tiles / wanted, 1, 16));
  const dim3 grid(blocks_for(blocks.tiles, blocks.tiles_per_block), static_cast<unsigned>(blocks.filter_tiles));
  const auto shared = static_cast<size_t>(blocks.fixed_bytes(p) + blocks.slab_bytes(tile));
  const auto run = [&](auto element) {
    using T = decltype(element);
    launch(FASTCONV_KERNEL(stem_mma<T>), grid, kStemThreads, shared, stream, p, tile, blocks, static_cast<const T*>(x),
           static_cast<const T*>(weight), static_cast<T*>(y), epilogue, StemEpilogue(p, epilogue));
  };
  if (p.dtype == DType::f16) run(half{});
  else run(bfloat16{});
}

FASTCONV_LAUNCHER("conv2d", "stem_mma", launch_stem_mma_forward);

}  // namespace fastconv::cuda
