// implicit_gemm_mma: convolution as a product of matrices on tensor cores (mma.sync, sm_80).
//
// A kernel is a loop (cuda_implicit_gemm_mma_loop.cuh), two operands for it (_operands.cuh, _gather.cuh) and an end
// (_output.cuh); a Mode says which (_modes.cuh). In NHWC rows of the product are pixels and columns are channels; in
// NCHW the operands change sides, so that columns are pixels: either way columns are neighbours in the result's memory.
#pragma once

#include <type_traits>

#include "conv2d/cuda_implicit_gemm_mma_gather.cuh"
#include "conv2d/cuda_implicit_gemm_mma_output.cuh"
#include "conv2d/cuda_implicit_gemm_mma_select.h"
#include "cuda_support/describe.h"
#include "cuda_support/device.h"
#include "cuda_support/launch.h"

namespace fastconv::cuda {
namespace {

// A Mode has kNhwc, kHeld (numbers pass through registers), and operands Images and Weights<T, kRows, kThreads>.

template <class T, class Tile, class Mode>
struct MmaSides {
  using Images = typename Mode::template Images<T, Mode::kNhwc ? Tile::kRows : Tile::kColumns, Tile::kThreads>;
  using Weights = typename Mode::template Weights<T, Mode::kNhwc ? Tile::kColumns : Tile::kRows, Tile::kThreads>;
};

template <class Math, class Tile, class Mode>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    implicit_gemm_mma(MmaProduct p, const typename Math::Number* x, const typename Math::Number* weight,
                      typename Math::Number* y, float* partial, CudaEpilogue epilogue, FlatEpilogue end) {
  using T = typename Math::Number;
  static_assert(Tile::kThreads / 32 * kBufferWords * 4 <= Tile::kRingBytes, "the buffers of the end lie in the ring");
  using Images = typename MmaSides<T, Tile, Mode>::Images;
  using Weights = typename MmaSides<T, Tile, Mode>::Weights;
  FASTCONV_DYNAMIC_SHARED(ring);
  FASTCONV_SHARED(table, ChannelTable<Weights::kRows>);
  MmaBlock block(p, Images::kRows, Weights::kRows);
  const int taps = block.h.taps * block.w.taps, chunks = (p.depth + kChunk<T> - 1) / kChunk<T>;
  block.share_slices(Mode::kNhwc ? (taps * chunks + 3) / 4 : (taps * p.depth + kSlice<T> - 1) / kSlice<T>, p.shares);
  table.fill(epilogue, p, block);
  typename Tile::Sums sum = {};
  {
    Images images(p, block, x);
    Weights weights(p, block, weight);
    const uint32_t at = ptx::shared_address(ring);
    if constexpr (Mode::kNhwc) multiply<Math, Tile>(images, weights, block.slices, at, sum);
    else multiply<Math, Tile>(weights, images, block.slices, at, sum);
  }
  float* buffer = reinterpret_cast<float*>(ring) + threadIdx.x / 32 * kBufferWords;
  if (p.shares == 1) store_tile<T, Tile, Mode::kNhwc>(p, block, end, y, sum, buffer, table);
  else store_tile<float, Tile, Mode::kNhwc>(p, block, {}, partial + block.share * p.results, sum, buffer, PlainTable{});
}

/// Tensors, dense in the problem's layout: of the forward pass x, weight, y; of the input gradient grad_y, weight,
/// grad_x.
struct MmaTensors {
  const void *read, *weight;
  void* written;
  CudaEpilogue epilogue;
  float* workspace = nullptr;  // sums of each share
};

template <class Math, class Tile, class Mode>
void launch_mma_tile(const ConvProblem& p, MmaProduct product, const MmaTensors& tensors, cudaStream_t stream) {
  using T = typename Math::Number;
  using Sides = MmaSides<T, Tile, Mode>;
  const int64_t pixel_tiles = ceil_div(product.pixels, Sides::Images::kRows);
  product.channel_tiles = static_cast<int>(ceil_div(product.channels, Sides::Weights::kRows));
  const dim3 grid(blocks_for(pixel_tiles * product.channel_tiles, 1),
                  static_cast<unsigned>(product.phases() * product.shares), static_cast<unsigned>(p.groups));
  launch(FASTCONV_KERNEL(implicit_gemm_mma<Math, Tile, Mode>), grid, Tile::kThreads, Tile::kRingBytes, stream, product,
         static_cast<const T*>(tensors.read), static_cast<const T*>(tensors.weight), static_cast<T*>(tensors.written),
         tensors.workspace, tensors.epilogue, FlatEpilogue(tensors.epilogue));
}

template <class Math, class Mode>
void launch_mma_math(const ConvProblem& p, const MmaProduct& product, const MmaTensors& tensors, cudaStream_t stream) {
  constexpr bool kHeld = Mode::kHeld || Math::kSplits;
  if (choose_mma_tile(product.pixels, product.channels, p.groups * product.phases(), device_properties().sm_count) ==
      MmaTileShape::square128)
    launch_mma_tile<Math, std::conditional_t<kHeld, Held128, Copied128>, Mode>(p, product, tensors, stream);
  else launch_mma_tile<Math, std::conditional_t<kHeld, Held64, Copied64>, Mode>(p, product, tensors, stream);
}

/// For 16-bit numbers.
template <class Mode>
void launch_mma(const ConvProblem& p, const MmaProduct& product, const MmaTensors& tensors, cudaStream_t stream) {
  if (p.dtype == DType::f16) launch_mma_math<HalfMath<half>, Mode>(p, product, tensors, stream);
  else launch_mma_math<HalfMath<bfloat16>, Mode>(p, product, tensors, stream);
}

inline void require_mma_serves(const ConvProblem& p, const char* reason) {
  if (reason != nullptr)
    throw std::runtime_error("the implicit GEMM on tensor cores refuses " + describe(p) + ": " + reason +
                             "; the direct kernel serves it");
}

/// A product of matrices as they lie in memory: pixels of a plane, in a row.
inline bool is_pointwise(const ConvProblem& p) {
  return p.r == 1 && p.s == 1 && p.stride.h == 1 && p.stride.w == 1 && p.p() == p.h && p.q() == p.w &&
         p.padding.top == 0 && p.padding.left == 0;
}

/// True if 16 bytes from each of these addresses on, in steps of so many numbers, are aligned.
template <class... Pointers>
bool all_vectors(const ConvProblem& p, int64_t step, const Pointers*... pointers) {
  return (is_aligned(pointers, step, element_bytes(p.dtype), 16) && ...);
}

}  // namespace
}  // namespace fastconv::cuda
