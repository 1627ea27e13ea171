// implicit_gemm_mma, weight gradient: the loop of cuda_implicit_gemm_mma_loop.cuh with pixels for depth.
//
// A layer has few tiles of weights and many pixels, so pixels are shared out until tiles x shares fill the chip. A
// block writes its sums in float32 to its share's part of a workspace; a second pass adds the shares in order.
#pragma once

#include <type_traits>

#include "conv2d/cuda_implicit_gemm_mma.cuh"
#include "conv2d/cuda_implicit_gemm_mma_weight_operands.cuh"
#include "conv2d/cuda_slots.cuh"

namespace fastconv::cuda {
namespace {

/// A warp's sums, straight from the registers: 8 neighbouring bytes a lane, 32 a row.
template <class T, class Tile, bool kNhwc>
__device__ __forceinline__ void store_partial(const MmaProduct& p, const WeightGradBlock& block,
                                              const typename Tile::Sums& sum, float* partial) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, taps = p.h.taps * p.w.taps;
  const int first_row = block.first_channel + warp / Tile::kWarpsAcross * Tile::kWarpRows + lane / 4;
  const int first_column = block.first_column + warp % Tile::kWarpsAcross * Tile::kWarpColumns + lane % 4 * 2;
  const int chunks = (p.depth + kChunk<T> - 1) / kChunk<T>;
#pragma unroll
  for (int n = 0; n < Tile::kFragmentColumns; ++n) {
    int column = first_column + n * 8, count = taps * p.depth - column;
    if constexpr (kNhwc) {  // out of the padding
      const int tap = column / kChunk<T> / chunks, channel = column - tap * chunks * kChunk<T>;
      column = tap * p.depth + channel, count = tap < taps ? p.depth - channel : 0;
    }
#pragma unroll
    for (int m = 0; m < Tile::kFragmentRows; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + m * 16 + half * 8;
        if (row >= p.channels) continue;
        float* to = partial + (int64_t{block.group} * p.channels + row) * taps * p.depth + column;
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (i < count) to[i] = sum[m][n][half * 2 + i];
      }
  }
}

template <class Math, class Tile, class Mode>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    implicit_gemm_mma_weight_grad(MmaProduct p, WeightGradShape shape, const typename Math::Number* grad_y,
                                  const typename Math::Number* x, float* partial) {
  using T = typename Math::Number;
  using Gradients = typename Mode::template Gradients<T, Tile::kRows, Tile::kThreads>;
  using Images = typename Mode::template Images<T, Tile::kColumns, Tile::kThreads>;
  FASTCONV_DYNAMIC_SHARED(ring);
  const WeightGradBlock block(p, Tile::kRows, Tile::kColumns, kSlice<T>, shape);
  typename Tile::Sums sum = {};
  {
    Gradients gradients(p, block, grad_y);
    Images images(p, block, x);
    multiply<Math, Tile>(gradients, images, block.slices, ptx::shared_address(ring), sum);
  }
  store_partial<T, Tile, Mode::kNhwc>(p, block, sum, partial + blockIdx.y * shape.weights);
}

/// Numbers of 16 bytes.
inline int64_t mma_chunk(const ConvProblem& p) { return 16 / element_bytes(p.dtype); }

/// Columns of the product: those of NHWC with their padding.
inline int64_t weight_columns(const ConvProblem& p) {
  const int64_t channels = p.layout == Layout::nhwc ? round_up(p.c_per_group(), mma_chunk(p)) : p.c_per_group();
  return channels * p.r * p.s;
}

inline int64_t weight_grad_slices(const ConvProblem& p) { return ceil_div(p.n * p.p() * p.q(), 4 * mma_chunk(p)); }

/// Shares fill the chip anyhow, so the tile is the one that wastes less.
inline MmaTileShape weight_grad_tile(const ConvProblem& p) {
  return choose_mma_tile(weight_columns(p), p.k_per_group(), p.groups, 1);
}

/// Shares of the pixels: as many as there is room for beside the tiles, two blocks of 128x128 or four of 64x64 on a
/// multiprocessor, but none of fewer than 8 slices: a block's start costs about as much.
inline int64_t weight_grad_shares(const ConvProblem& p) {
  const int64_t edge = mma_tile_edge(weight_grad_tile(p)), resident = edge == 128 ? 2 : 4;
  const int64_t tiles = ceil_div(weight_columns(p), edge) * ceil_div(p.k_per_group(), edge) * p.groups;
  const int64_t slices = weight_grad_slices(p), wanted = resident * device_properties().sm_count / tiles;
  const int64_t shares = max_of(1, min_of(wanted, slices / 8));
  return ceil_div(slices, ceil_div(slices, shares));
}

/// Float32 numbers, for the current device.
inline int64_t weight_grad_workspace(const ConvProblem& p) {
  return weight_grad_shares(p) * p.k * p.c_per_group() * p.r * p.s;
}

/// The first pass.
template <class Math, class Tile, class Mode>
void launch_weight_grad_tile(const ConvProblem& p, const void* grad_y, const void* x, float* partial,
                             cudaStream_t stream) {
  using T = typename Math::Number;
  WeightGradShape shape;
  const int64_t shares = weight_grad_shares(p);
  shape.column_tiles = static_cast<int>(ceil_div(weight_columns(p), Tile::kColumns));
  shape.slices_each = static_cast<int>(ceil_div(weight_grad_slices(p), shares));
  shape.weights = p.k * p.c_per_group() * p.r * p.s;
  const dim3 grid(blocks_for(ceil_div(p.k_per_group(), Tile::kRows) * shape.column_tiles, 1),
                  static_cast<unsigned>(shares), static_cast<unsigned>(p.groups));
  launch(FASTCONV_KERNEL(implicit_gemm_mma_weight_grad<Math, Tile, Mode>), grid, Tile::kThreads, Tile::kRingBytes,
         stream, MmaProduct(p, false), shape, static_cast<const T*>(grad_y), static_cast<const T*>(x), partial);
}

template <class Math, class Mode>
void launch_weight_grad_math(const ConvProblem& p, const void* grad_y, const void* x, float* partial,
                             cudaStream_t stream) {
  constexpr bool kHeld = Mode::kHeld || Math::kSplits;
  if (weight_grad_tile(p) == MmaTileShape::square128)
    launch_weight_grad_tile<Math, std::conditional_t<kHeld, Held128, Copied128>, Mode>(p, grad_y, x, partial, stream);
  else launch_weight_grad_tile<Math, std::conditional_t<kHeld, Held64, Copied64>, Mode>(p, grad_y, x, partial, stream);
}

/// 16-byte copies of neighbouring pixels of a channel, of either tensor.
struct NchwPointwiseWeightGrad {
  static constexpr bool kHeld = false, kNhwc = false;
  template <class T, int kRows, int kThreads>
  using Gradients = PlaneRows<T, kRows, kThreads, true>;
  template <class T, int kRows, int kThreads>
  using Images = PlaneRows<T, kRows, kThreads, false>;
};

/// Calls launch(mode): the mode in which most is copied 16 bytes at a time. Nhwc<true> copies both tensors so,
/// Nchw<true> the gradients.
template <template <bool> class Nhwc, template <bool> class Nchw, class Launch>
void for_weight_grad_mode(const ConvProblem& p, const void* grad_y, const void* x, const Launch& launch) {
  const bool gradient_planes = all_vectors(p, p.p() * p.q(), grad_y);
  if (p.layout == Layout::nhwc) {
    if (all_vectors(p, p.k_per_group(), grad_y) && all_vectors(p, p.c_per_group(), x)) launch(Nhwc<true>{});
    else launch(Nhwc<false>{});
  } else if (is_pointwise(p) && gradient_planes && all_vectors(p, p.h * p.w, x)) {
    launch(NchwPointwiseWeightGrad{});
  } else if (gradient_planes) {
    launch(Nchw<true>{});
  } else {
    launch(Nchw<false>{});
  }
}

/// The second.
inline void launch_add_weight_grads(const ConvProblem& p, const float* partial, void* grad_weight,
                                    cudaStream_t stream) {
  launch_add_slots(p.dtype, partial, grad_weight, static_cast<int>(weight_grad_shares(p)),
                   p.k * p.c_per_group() * p.r * p.s, stream);
}

}  // namespace
}  // namespace fastconv::cuda
