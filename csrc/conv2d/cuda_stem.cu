// Stem convolution, forward: at most 4 input channels, any window up to 11x11, any stride up to 4.
//
// A program (256 threads) takes tiles of outputs and 8 to 64 filters, whose weights it keeps in shared memory. A warp
// has 8 filters and 256 pixels, a thread 8 filters x 8 pixels in registers: for each tap it loads 8 inputs (one word
// each, neighbouring lanes at neighbouring words) and 8 weights (two 16-byte loads, the same for the whole warp) for 64
// multiply-adds.
#include "conv2d/cuda_stem.cuh"
#include "conv2d/cuda_stem_refuse.h"
#include "cuda_support/launch.h"
#include "cuda_support/launchers.h"

namespace fastconv::cuda {
namespace {

constexpr int kFilters = 8, kPixels = 8;  // of a thread
constexpr int kWarps = kStemThreads / 32;
constexpr int64_t kSlabBytes = 48 << 10;

struct StemBlocks {
  int filter_groups = 1, filter_tiles = 1;  // of 8 filters, in a block; of blocks
  int tiles_per_block = 1;
  int64_t tiles = 0;
  int rows = 0, columns = 0;  // of the output: read from the parameters, where they take no registers

  int filters() const { return filter_groups * kFilters; }
};

template <class T>
__global__ void __launch_bounds__(kStemThreads, 2)
    stem_forward(ConvProblem p, StemTile tile, StemBlocks blocks, const T* x, const T* weight, T* y,
                 CudaEpilogue epilogue, StemEpilogue output) {
  FASTCONV_DYNAMIC_SHARED(shared);
  const int filters = blocks.filter_groups * kFilters, taps = static_cast<int>(p.c * p.r * p.s);
  float* weights = reinterpret_cast<float*>(shared);  // [tap][filter of the block]
  float* slab = weights + taps * filters;
  int* offsets = reinterpret_cast<int*>(slab + static_cast<int>(p.c) * tile.slab_rows * tile.row_words);
  fill_tap_offsets(p, tile, offsets);
  float* scales = reinterpret_cast<float*>(offsets + taps);
  const int first_filter = static_cast<int>(blockIdx.y) * filters, window = static_cast<int>(p.r * p.s);
  fill_scales(epilogue, first_filter, filters, static_cast<int>(p.k), scales);
  const Strides4 ws = p.weight_strides();
  for (int i = threadIdx.x; i < taps * filters; i += kStemThreads) {
    const int k = i / taps, tap = i % taps, c = tap / window, r = tap % window / static_cast<int>(p.s);
    const int64_t at = (first_filter + k) * ws.n + c * ws.c + r * ws.h + tap % static_cast<int>(p.s) * ws.w;
    weights[tap * filters + k] = first_filter + k < p.k ? to_float(weight[at]) : 0.0f;
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int own_filter = warp % blocks.filter_groups * kFilters, pixels = tile.rows * tile.columns;
  const int first_pixel = warp / blocks.filter_groups * (32 * kPixels) + lane;
  int base[kPixels];
#pragma unroll
  for (int j = 0; j < kPixels; ++j)
    base[j] = first_pixel + 32 * j < pixels ? pixel_offset(p, tile, first_pixel + 32 * j) : 0;
  for (int step = 0; step < blocks.tiles_per_block; ++step) {
    const int64_t index = int64_t{blockIdx.x} * blocks.tiles_per_block + step;
    if (index >= blocks.tiles) break;
    const int image = static_cast<int>(index / (tile.tiles_p * tile.tiles_q));
    const int in_image = static_cast<int>(index % (tile.tiles_p * tile.tiles_q));
    const int row = in_image / tile.tiles_q * tile.rows, column = in_image % tile.tiles_q * tile.columns;
    __syncthreads();  // the last tile's slab is no longer read
    fill_slab(p, tile, x + image * (p.c * p.h * p.w), row, column, slab);
    __syncthreads();
    float sum[kPixels][kFilters] = {};
    const float* taken = weights + own_filter;
#pragma unroll 1
    for (int tap = 0; tap < taps; ++tap, taken += filters) {
      const float* from = slab + offsets[tap];
      const Vector<float, 4> low = load_vector<4>(taken), high = load_vector<4>(taken + 4);
#pragma unroll
      for (int j = 0; j < kPixels; ++j) {
        const float value = from[base[j]];
#pragma unroll
        for (int f = 0; f < kFilters; ++f) sum[j][f] = fmaf(f < 4 ? low[f] : high[f - 4], value, sum[j][f]);
      }
    }
    const int64_t image_at = image * (p.k * (blocks.rows * blocks.columns));
    const int filters_left = min(kFilters, static_cast<int>(p.k) - first_filter - own_filter);
#pragma unroll
    for (int j = 0; j < kPixels; ++j) {
      uint32_t q = first_pixel + 32 * j;
      const bool in_tile = static_cast<int>(q) < pixels;
      const int at_row = row + static_cast<int>(tile.by_columns.divide_keep_rest(q));
      const int at_column = column + static_cast<int>(q);
      const bool inside = in_tile && at_row < blocks.rows && at_column < blocks.columns;
      const int64_t at = image_at + (at_row * blocks.columns + at_column) * output.pixel_stride +
                         (first_filter + own_filter) * output.filter_stride;
#pragma unroll
      for (int f = 0; f < kFilters; ++f)
        if (inside && f < filters_left) {
          const int64_t to = at + f * output.filter_stride;
          y[to] = output.finish<T>(sum[j][f] * scales[own_filter + f] + scales[filters + own_filter + f], to);
        }
    }
  }
}

/// Filters of a block: those that waste the fewest, then as many as possible, because all of them share a slab.
int choose_filter_groups(const ConvProblem& p) {
  int best = 1;
  int64_t best_filters = INT64_MAX;
  for (const int groups : {8, 4, 2, 1}) {
    const int64_t filters = round_up(p.k, groups * kFilters);
    if (p.c * p.r * p.s * groups * kFilters * int64_t{sizeof(float)} > (48 << 10) && groups > 1) continue;
    if (filters < best_filters) best = groups, best_filters = filters;
  }
  return best;
}

}  // namespace

/// y = epilogue(x * weight); all tensors dense in the problem's layout. Throws where refuse_stem_cuda gives a reason.
void launch_stem_forward(const ConvProblem& p, const void* x, const void* weight, void* y, const CudaEpilogue& epilogue,
                         cudaStream_t stream) {
  if (const char* reason = refuse_stem_cuda(p))
    throw std::runtime_error("the CUDA stem kernel refuses " + describe(p) + ": " + reason +
                             "; the direct kernel serves any problem");
  StemBlocks blocks;
  blocks.rows = static_cast<int>(p.p()), blocks.columns = static_cast<int>(p.q());
  blocks.filter_groups = choose_filter_groups(p);
  blocks.filter_tiles = static_cast<int>(ceil_div(p.k, blocks.filters()));
  const StemTile tile = choose_stem_tile(p, kWarps / blocks.filter_groups * 32 * kPixels, kSlabBytes);
  blocks.tiles = p.n * tile.tiles_p * tile.tiles_q;
  // A block that does several tiles fetches its weights once; four blocks for each multiprocessor even out the end.
  const int64_t wanted = ceil_div(4 * int64_t{device_properties().sm_count}, blocks.filter_tiles);
  blocks.tiles_per_block = static_cast<int>(std::clamp<int64_t>(blocks.tiles / wanted, 1, 16));
  const dim3 grid(blocks_for(blocks.tiles, blocks.tiles_per_block), static_cast<unsigned>(blocks.filter_tiles));
  const size_t shared =
      p.c * p.r * p.s * blocks.filters() * sizeof(float) + tile.bytes(p) + 2 * blocks.filters() * sizeof(float);
  dispatch_element("stem convolution", p.dtype, [&](auto element) {
    using T = decltype(element);
    launch(FASTCONV_KERNEL(stem_forward<T>), grid, kStemThreads, shared, stream, p, tile, blocks,
           static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<T*>(y), epilogue,
           StemEpilogue(p, epilogue));
  });
}

FASTCONV_LAUNCHER("conv2d", "stem", launch_stem_forward);

}  // namespace fastconv::cuda
