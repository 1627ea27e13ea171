// Which convolutions csrc/conv2d/cuda_implicit_gemm_fp32*.cu serve, and with which tiles: host side, without torch or
// CUDA.
#pragma once

#include "conv2d/candidates.h"

namespace fastconv {

/// Null if the kernels serve the problem, else the reason.
inline const char* refuse_implicit_gemm_fp32(const ConvProblem& p, ConvPass) {
  constexpr int64_t kInt = 0x7fffffff, kRoom = 1 << 16;
  if (p.dtype != DType::f32) return "it computes in float32 and serves float32 alone";
  if (p.weight_is_nchw && p.layout == Layout::nhwc) return "it needs weights in the layout of the images";
  if (p.r > 32 || p.s > 32) return "it needs a window of at most 32x32";
  const int64_t h = p.h + p.padding.top + p.padding.bottom, w = p.w + p.padding.left + p.padding.right;
  // Positions are 32 bits wide; offsets are not.
  if (h > kInt - kRoom || w > kInt - kRoom || p.n * max_of(p.h * p.w, p.p() * p.q()) > kInt - kRoom)
    return "it needs fewer than 2^31 pixels";
  if (max_of(p.c_per_group(), p.k_per_group()) * p.r * p.s > kInt - kRoom)
    return "it needs windows of fewer than 2^31 elements";
  if (p.r * p.dilation.h > kInt - kRoom || p.s * p.dilation.w > kInt - kRoom)
    return "it needs windows that span fewer than 2^31 pixels";
  return nullptr;
}

/// The sides of the products of a pass: each group, and each phase of an input gradient, has one of its own.
struct GemmExtent {
  int64_t rows, columns, depth, products;
};

/// The largest product; phases differ by a row or column of pixels and by their taps.
inline GemmExtent gemm_extent(const ConvProblem& p, ConvPass pass) {
  const int64_t window = p.r * p.s, outputs = p.n * p.p() * p.q();
  if (pass == ConvPass::weight_grad) return {p.k_per_group(), p.c_per_group() * window, outputs, p.groups};
  GemmExtent e{outputs, p.k_per_group(), p.c_per_group() * window, p.groups};
  if (pass == ConvPass::input_grad) {
    const int64_t phases_h = min_of(p.stride.h, p.h), phases_w = min_of(p.stride.w, p.w);
    e.rows = p.n * ceil_div(p.h, p.stride.h) * ceil_div(p.w, p.stride.w);
    e.columns = p.c_per_group();
    e.depth = p.k_per_group() * max_of(1, window / (phases_h * phases_w));
    e.products = p.groups * phases_h * phases_w;
  }
  if (p.layout == Layout::nchw) return {e.columns, e.rows, e.depth, e.products};
  return e;
}

/// Why `direct` should have a problem that the kernels serve.
inline const char* avoid_implicit_gemm_fp32(const ConvProblem& p, ConvPass pass) {
  const GemmExtent e = gemm_extent(p, pass);
  // direct has two loads for a multiply-add, and so at best an eighth of the rate.
  if (16 * min_of(e.rows, 64) * min_of(e.columns, 64) < 64 * 64)
    return "a group would fill less than a sixteenth of the smallest tile, 64x64";
  return nullptr;
}

enum class GemmTile : int64_t { large, wide_pixels, small };  // 128x128, 128 pixels x 64 channels, 64x64

struct GemmTiling {
  GemmTile tile = GemmTile::small;
  int64_t rows = 64, columns = 64;  // of a tile
  int64_t row_tiles = 0, column_tiles = 0;
  int64_t splits = 1;  // of the depth, each with results of its own, which a second pass adds
};

inline constexpr int64_t kGemmDepth = 8;  // of a stage: what is brought to shared memory at once

/// Clock cycles of a pass, guessed: no GPU was at hand. Smaller tiles load more for each multiply-add. A multiprocessor
/// has 128 lanes and room for 512 threads; with fewer it waits more for memory and barriers: 256 keep 5/6 of the lanes
/// busy, 128 5/8. A block costs 2000 cycles before and after its loop. A second pass costs a launch, and its reads at
/// 13 bytes a cycle for each multiprocessor (an H100's memory).
inline double gemm_cycles(const GemmExtent& e, const GemmTiling& t, int64_t multiprocessors) {
  const double load = t.rows + t.columns == 256 ? 1.0 : t.rows + t.columns == 192 ? 1.1 : 1.25;
  const int64_t blocks = t.row_tiles * t.column_tiles * e.products * t.splits, area = t.rows * t.columns;
  const int64_t rounds = ceil_div(blocks, multiprocessors);
  const double threads = static_cast<double>(min_of(512, rounds * area / 64));
  const double lanes = 128 * 1.25 * threads / (threads + 128);
  const double depth = static_cast<double>(round_up(ceil_div(e.depth, t.splits), kGemmDepth));
  const double loop = load * static_cast<double>(rounds * area) / lanes * depth;
  if (t.splits == 1) return loop + 2000;
  const double moved = 4.0 * static_cast<double>(e.rows * e.columns * e.products * (t.splits + 1));
  return loop + 6000 + moved / (13.0 * static_cast<double>(multiprocessors));
}

inline GemmTiling choose_gemm_tiling(const ConvProblem& p, ConvPass pass, int64_t multiprocessors) {
  const GemmExtent e = gemm_extent(p, pass);
  const bool rows_are_pixels = pass != ConvPass::weight_grad && p.layout == Layout::nhwc;
  const int64_t stages = ceil_div(max_of(e.depth, 1), kGemmDepth);
  GemmTiling best;
  double least = 0;
  for (const GemmTile tile : {GemmTile::large, GemmTile::wide_pixels, GemmTile::small}) {
    GemmTiling t{tile};
    t.rows = tile == GemmTile::large || (tile == GemmTile::wide_pixels && rows_are_pixels) ? 128 : 64;
    t.columns = tile == GemmTile::large || (tile == GemmTile::wide_pixels && !rows_are_pixels) ? 128 : 64;
    t.row_tiles = ceil_div(e.rows, t.rows), t.column_tiles = ceil_div(e.columns, t.columns);
    const int64_t tiles = max_of(1, t.row_tiles * t.column_tiles * e.products);
    for (int64_t waves = 0; waves <= 8; ++waves) {  // none: no splits
      // At least 8 stages each, and as even as whole stages allow.
      const int64_t wanted = max_of(1, min_of(waves * multiprocessors / tiles, min_of(stages / 8, 65535)));
      t.splits = ceil_div(stages, ceil_div(stages, wanted));
      const double cycles = gemm_cycles(e, t, multiprocessors);
      if (least == 0 || cycles < least) best = t, least = cycles;
    }
  }
  return best;
}

}  // namespace fastconv
