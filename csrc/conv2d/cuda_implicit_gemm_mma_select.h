// Which convolutions the implicit GEMM on tensor cores serves, why not the others, and with which tile. Needs neither
// CUDA nor torch.
#pragma once

#include "common/problem.h"
#include "conv2d/candidates.h"

namespace fastconv {

/// Null if csrc/conv2d/cuda_implicit_gemm_mma*.cu serve a problem of these sizes in this pass, else the reason.
inline const char* refuse_mma_sizes(const ConvProblem& p, ConvPass pass) {
  constexpr int64_t kInt = 0x7fffffff;
  if (p.n < 1 || p.c < 1 || p.k < 1 || p.p() < 1 || p.q() < 1) return "it needs at least one output";
  if (p.groups > 65535) return "it needs at most 65535 groups";
  if (p.weight_is_nchw && p.layout == Layout::nhwc) return "it needs weights in the layout of the images";
  if (p.layout == Layout::nchw && max_of(p.r, p.s) > 15) return "in NCHW it needs a window of at most 15x15";
  // A position and its offset inside an image are 32 bits wide, with room for the padding around it.
  const int64_t h = p.h + p.padding.top + p.padding.bottom + p.stride.h;
  const int64_t w = p.w + p.padding.left + p.padding.right + p.stride.w;
  if (max_of(h, w) > kInt / 2 || h > kInt / w || h * w > kInt / max_of(p.c, p.k))
    return "it needs padded images of fewer than 2^31 elements";
  if (p.k * p.c_per_group() > kInt / (p.r * p.s)) return "it needs fewer than 2^31 weights";
  const int64_t grid_pixels =
      pass == ConvPass::input_grad ? ceil_div(p.h, p.stride.h) * ceil_div(p.w, p.stride.w) : p.p() * p.q();
  if (grid_pixels > (kInt - 256) / p.n) return "it needs fewer than 2^31 pixels in a batch; split the batch";
  if (pass == ConvPass::input_grad && p.stride.h * p.stride.w > 65535)
    return "it needs strides whose product is at most 65535";
  return nullptr;
}

inline const char* refuse_implicit_gemm_mma_cuda(const ConvProblem& p, ConvPass pass) {
  if (p.dtype != DType::f16 && p.dtype != DType::bf16) return "it needs float16 or bfloat16";
  return refuse_mma_sizes(p, pass);
}

/// For both forms of TF32, which multiply float32.
inline const char* refuse_implicit_gemm_tf32_cuda(const ConvProblem& p, ConvPass pass) {
  return p.dtype != DType::f32 ? "it needs float32" : refuse_mma_sizes(p, pass);
}

/// Chosen by name alone: whether float32 may be rounded is torch's setting, which Python reads
/// (fastconv/_precision.py).
inline const char* avoid_implicit_gemm_tf32_cuda(const ConvProblem&, ConvPass) {
  return "it rounds float32 to 10 bits of mantissa; torch's settings choose it";
}
inline const char* avoid_implicit_gemm_3xtf32_cuda(const ConvProblem&, ConvPass) {
  return "its products leave out up to 3 * 2^-22, and infinite numbers become NaN";
}

/// Null if it is worth choosing when nobody asks for it by name, else what does better.
inline const char* avoid_implicit_gemm_mma_cuda(const ConvProblem& p, ConvPass) {
  if (max_of(p.c_per_group(), p.k_per_group()) < 4) return "fewer than 4 channels are mostly padding in a tile";
  if (p.groups > 1 && min_of(p.c_per_group(), p.k_per_group()) < 16)
    return "groups of fewer than 16 channels are mostly padding in a tile";
  return nullptr;
}

/// The tiles of the product that kernels are compiled for: rows and columns that a block computes.
enum class MmaTileShape { square128, square64 };

constexpr int64_t mma_tile_edge(MmaTileShape shape) { return shape == MmaTileShape::square128 ? 128 : 64; }

/// The tile that finishes first: a multiprocessor computes its share of the tiles one after another, edges count as
/// whole tiles. 64x64 reads twice the bytes for a product and pays its start and end on a quarter of the sums: taken as
/// 1.4 times the time for the same area (an estimate; the ratio must be measured).
inline MmaTileShape choose_mma_tile(int64_t pixels, int64_t channels, int64_t batches, int64_t multiprocessors) {
  const auto cost = [&](MmaTileShape shape, int64_t percent) {
    const int64_t edge = mma_tile_edge(shape);
    const int64_t tiles = ceil_div(pixels, edge) * ceil_div(channels, edge) * batches;
    return ceil_div(tiles, multiprocessors) * edge * edge * percent;
  };
  return cost(MmaTileShape::square128, 100) <= cost(MmaTileShape::square64, 140) ? MmaTileShape::square128
                                                                                 : MmaTileShape::square64;
}

/// Shares of the depth (split-K): 1 unless half of the multiprocessors or more would have no tile; then as many as find
/// one, but none of fewer than 8 slices, whose product would take less time than a block's start and end.
inline int64_t choose_mma_shares(int64_t pixels, int64_t channels, int64_t depth, int64_t batches,
                                 int64_t multiprocessors) {
  const int64_t edge = mma_tile_edge(choose_mma_tile(pixels, channels, batches, multiprocessors));
  const int64_t tiles = ceil_div(pixels, edge) * ceil_div(channels, edge) * batches;
  return max_of(1, min_of(16, min_of(multiprocessors / tiles, depth / 32 / 8)));
}

}  // namespace fastconv
