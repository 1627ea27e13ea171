// Stem convolution, weight gradient: at most 4 input channels, any window up to 11x11, any stride up to 4.
//
// A program (256 threads) has up to 64 filters and a share of the tiles of outputs. It brings the gradient of a tile's
// pixels, [pixel][filter] in float32, and the slab of inputs to shared memory; a thread owns 8 filters x 8 taps in
// registers and walks over the pixels: 8 gradients (two 16-byte loads) and 8 inputs for 64 multiply-adds. Few taps and
// filters leave threads over: then several teams share the pixels. In the end the teams add up in turn and the block
// writes partial[slot][weight]; a second pass (cuda_slots.cuh) adds the slots.
#include "conv2d/cuda_slots.cuh"
#include "conv2d/cuda_stem.cuh"
#include "conv2d/cuda_stem_refuse.h"
#include "cuda_support/launchers.h"

namespace fastconv::cuda {
namespace {

constexpr int kFilters = 8, kTaps = 8;  // of a thread
constexpr int kPixels = 128;            // of a tile
constexpr int64_t kSlabBytes = 32 << 10;

struct StemGradBlocks {
  int filter_groups = 1, filter_tiles = 1, tap_groups = 1;
  int teams = 1;        // of filter_groups * tap_groups threads
  int pixel_words = 8;  // of a pixel's gradients in shared memory
  int tiles_per_block = 1, slots = 1;
  int64_t tiles = 0;

  int filters() const { return filter_groups * kFilters; }
};

/// The gradients of a tile's pixels, zeros for those outside the output and for filters that do not exist.
template <class T>
__device__ __forceinline__ void fill_gradients(const ConvProblem& p, const StemTile& tile, int pixel_words, int filters,
                                               const T* image, int row, int column, int first_filter, float* to) {
  const int rows = static_cast<int>(p.p()), columns = static_cast<int>(p.q()), all = static_cast<int>(p.k);
  const int pixels = tile.rows * tile.columns;
  for (int i = threadIdx.x; i < pixels * filters; i += kStemThreads) {
    const int filter = p.layout == Layout::nchw ? i / pixels : i % filters;
    const int pixel = p.layout == Layout::nchw ? i % pixels : i / filters;
    uint32_t across = pixel;
    const int at_row = row + static_cast<int>(tile.by_columns.divide_keep_rest(across));
    const int at_column = column + static_cast<int>(across), k = first_filter + filter;
    float value = 0;
    if (at_row < rows && at_column < columns && k < all) {
      const int at = at_row * columns + at_column;
      value = to_float(image[p.layout == Layout::nchw ? k * (rows * columns) + at : at * all + k]);
    }
    to[pixel * pixel_words + filter] = value;
  }
}

template <class T>
__global__ void __launch_bounds__(kStemThreads, 2)
    stem_weight_grad(ConvProblem p, StemTile tile, StemGradBlocks blocks, const T* grad_y, const T* x, float* partial) {
  FASTCONV_DYNAMIC_SHARED(shared);
  const int taps = static_cast<int>(p.c * p.r * p.s), filters = blocks.filter_groups * kFilters;
  const int pixels = tile.rows * tile.columns;
  float* gradients = reinterpret_cast<float*>(shared);
  float* slab = gradients + kPixels * blocks.pixel_words;
  int* offsets = reinterpret_cast<int*>(slab + static_cast<int>(p.c) * tile.slab_rows * tile.row_words);
  fill_tap_offsets(p, tile, offsets);
  __syncthreads();
  const int first_filter = static_cast<int>(blockIdx.y) * filters;
  const int members = blocks.filter_groups * blocks.tap_groups, team = static_cast<int>(threadIdx.x) / members;
  const int member = static_cast<int>(threadIdx.x) % members;
  const int own_filter = member % blocks.filter_groups * kFilters, own_tap = member / blocks.filter_groups * kTaps;
  int own_offset[kTaps];
#pragma unroll
  for (int t = 0; t < kTaps; ++t) own_offset[t] = own_tap + t < taps ? offsets[own_tap + t] : 0;
  float sum[kFilters][kTaps] = {};
  for (int step = 0; step < blocks.tiles_per_block; ++step) {
    const int64_t index = int64_t{blockIdx.x} * blocks.tiles_per_block + step;
    if (index >= blocks.tiles) break;
    const int64_t image = index / (tile.tiles_p * tile.tiles_q);
    const int in_image = static_cast<int>(index % (tile.tiles_p * tile.tiles_q));
    const int row = in_image / tile.tiles_q * tile.rows, column = in_image % tile.tiles_q * tile.columns;
    __syncthreads();  // the last tile is no longer read
    fill_slab(p, tile, x + image * (p.c * p.h * p.w), row, column, slab);
    fill_gradients(p, tile, blocks.pixel_words, filters, grad_y + image * (p.k * p.p() * p.q()), row, column,
                   first_filter, gradients);
    __syncthreads();
    if (team >= blocks.teams) continue;
    for (int pixel = team; pixel < pixels; pixel += blocks.teams) {
      const float* from = slab + pixel_offset(p, tile, pixel);
      const float* grads = gradients + pixel * blocks.pixel_words + own_filter;
      const Vector<float, 4> low = load_vector<4>(grads), high = load_vector<4>(grads + 4);
#pragma unroll
      for (int t = 0; t < kTaps; ++t) {
        const float value = from[own_offset[t]];
#pragma unroll
        for (int f = 0; f < kFilters; ++f) sum[f][t] = fmaf(f < 4 ? low[f] : high[f - 4], value, sum[f][t]);
      }
    }
  }
  // The teams in turn, so that the order of the sum is always the same; the tile's memory is free by now.
  float* total = reinterpret_cast<float*>(shared);  // [filter][tap]
  const int all_taps = blocks.tap_groups * kTaps;
  for (int turn = 0; turn < blocks.teams; ++turn) {
    __syncthreads();
    if (team != turn) continue;
#pragma unroll
    for (int f = 0; f < kFilters; ++f)
#pragma unroll
      for (int t = 0; t < kTaps; ++t) {
        float& to = total[(own_filter + f) * all_taps + own_tap + t];
        to = turn == 0 ? sum[f][t] : to + sum[f][t];
      }
  }
  __syncthreads();
  // In the weight's own order, which is the problem's layout.
  const Strides4 ws = p.weight_strides();
  const int window = static_cast<int>(p.r * p.s), across = static_cast<int>(p.s);
  for (int i = threadIdx.x; i < filters * taps; i += kStemThreads) {
    const int filter = i / taps, tap = i % taps;
    if (first_filter + filter >= p.k) continue;
    const int64_t at =
        (first_filter + filter) * ws.n + tap / window * ws.c + tap % window / across * ws.h + tap % across * ws.w;
    partial[blockIdx.x * (p.k * taps) + at] = total[filter * all_taps + tap];
  }
}

/// The tile and the division of the work; all that the workspace's size depends on.
struct StemGradPlan {
  StemTile tile;
  StemGradBlocks blocks;
  size_t shared_bytes;

  explicit StemGradPlan(const ConvProblem& p) {
    const int64_t taps = p.c * p.r * p.s;
    tile = choose_stem_tile(p, kPixels, kSlabBytes);
    blocks.tap_groups = static_cast<int>(ceil_div(taps, kTaps));
    const int64_t most = std::max<int64_t>(1, std::min<int64_t>(8, kStemThreads / blocks.tap_groups));
    blocks.filter_tiles = static_cast<int>(ceil_div(ceil_div(p.k, kFilters), most));
    blocks.filter_groups = static_cast<int>(ceil_div(ceil_div(p.k, kFilters), blocks.filter_tiles));
    blocks.teams = std::min(kStemThreads / (blocks.filter_groups * blocks.tap_groups), kPixels);
    blocks.pixel_words = blocks.filters() + 4;  // 16-byte aligned, and neighbouring pixels in different banks
    blocks.tiles = p.n * tile.tiles_p * tile.tiles_q;
    const int64_t wanted = ceil_div(2 * int64_t{device_properties().sm_count}, blocks.filter_tiles);
    blocks.tiles_per_block = static_cast<int>(ceil_div(blocks.tiles, wanted));
    blocks.slots = static_cast<int>(ceil_div(blocks.tiles, blocks.tiles_per_block));
    const int64_t walk = kPixels * blocks.pixel_words * int64_t{sizeof(float)} + tile.bytes(p);
    const int64_t sums = int64_t{blocks.filters()} * blocks.tap_groups * kTaps * int64_t{sizeof(float)};
    shared_bytes = static_cast<size_t>(std::max(walk, sums));
  }
};

void require_stem(const ConvProblem& p) {
  if (const char* reason = refuse_stem_cuda(p))
    throw std::runtime_error("the CUDA stem kernel refuses " + describe(p) + ": " + reason +
                             "; the direct kernel serves any problem");
}

}  // namespace

/// float32 numbers that launch_stem_weight_grad needs as a workspace.
int64_t stem_weight_grad_workspace(const ConvProblem& p) {
  require_stem(p);
  return StemGradPlan(p).blocks.slots * p.k * p.c * p.r * p.s;
}

void launch_stem_weight_grad(const ConvProblem& p, const void* grad_y, const void* x, void* grad_weight,
                             float* workspace, cudaStream_t stream) {
  require_stem(p);
  const StemGradPlan plan(p);
  const dim3 grid(static_cast<unsigned>(plan.blocks.slots), static_cast<unsigned>(plan.blocks.filter_tiles));
  dispatch_element("stem weight gradient", p.dtype, [&](auto element) {
    using T = decltype(element);
    launch(FASTCONV_KERNEL(stem_weight_grad<T>), grid, kStemThreads, plan.shared_bytes, stream, p, plan.tile,
           plan.blocks, static_cast<const T*>(grad_y), static_cast<const T*>(x), workspace);
  });
  launch_add_slots(p.dtype, workspace, grad_weight, plan.blocks.slots, p.k * p.c * p.r * p.s, stream);
}

FASTCONV_LAUNCHER("conv2d_weight_grad", "stem", launch_stem_weight_grad);
FASTCONV_LAUNCHER("conv2d_weight_grad_workspace", "stem", stem_weight_grad_workspace);

}  // namespace fastconv::cuda
