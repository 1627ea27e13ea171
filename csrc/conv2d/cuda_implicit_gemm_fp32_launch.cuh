// The host side of cuda_implicit_gemm_fp32.cuh: which of its kernels runs a pass of a problem, and with what.
#pragma once

#include "conv2d/cuda_implicit_gemm_fp32.cuh"
#include "cuda_support/device.h"
#include "cuda_support/launchers.h"

namespace fastconv::cuda {
namespace {

GemmTiling implicit_gemm_fp32_tiling(const ConvProblem& p, ConvPass pass) {
  if (const char* reason = refuse_implicit_gemm_fp32(p, pass))
    throw std::runtime_error("the CUDA kernel implicit_gemm_fp32 refuses " + describe(p) + ": " + reason +
                             "; the direct kernel serves any problem");
  return choose_gemm_tiling(p, pass, device_properties().sm_count);
}

/// float32 numbers in the results of a pass.
int64_t result_elements(const ConvProblem& p, ConvPass pass) {
  return pass == ConvPass::forward      ? p.n * p.k * p.p() * p.q()
         : pass == ConvPass::input_grad ? p.n * p.c * p.h * p.w
                                        : p.k * p.c_per_group() * p.r * p.s;
}

/// float32 numbers that a pass needs as a workspace.
int64_t workspace_elements(const ConvProblem& p, ConvPass pass) {
  const int64_t splits = implicit_gemm_fp32_tiling(p, pass).splits;
  return splits == 1 ? 0 : splits * result_elements(p, pass);
}

/// Tiles and splits for the tests: 1000000 * rows + 1000 * columns + splits.
int64_t describe_tiling(const ConvProblem& p, ConvPass pass) {
  const GemmTiling t = implicit_gemm_fp32_tiling(p, pass);
  return 1000000 * t.rows + 1000 * t.columns + t.splits;
}

/// Whether a tensor can be copied four elements at a time: those that are neighbours in the product are neighbours in
/// memory, and every four start at a multiple of 16 bytes.
template <ConvPass kPass, Layout kLayout>
bool has_vectors(const ImplicitGemm& gemm, GemmTensor tensor, const void* data) {
  const ConvProblem& p = gemm.p;
  const int64_t window = p.r * p.s;
  const bool one_pixel = window == 1 && p.stride.h == 1 && p.stride.w == 1 && p.padding.top == 0 &&
                         p.padding.left == 0 && p.padding.bottom == 0 && p.padding.right == 0;
  int64_t together = 1;
  if (tensor == GemmTensor::weight) {
    const bool as_numbered = window == 1 || !p.weight_is_nchw || kLayout == Layout::nchw;
    if (kPass == ConvPass::forward) together = kLayout == Layout::nhwc ? gemm.image_channels : p.c_per_group() * window;
    else together = kLayout == Layout::nhwc || window == 1 ? gemm.grid_channels : 1;
    if (!as_numbered) together = 1;
  } else if (kLayout == Layout::nhwc) {
    together = tensor == GemmTensor::image ? gemm.image_channels : gemm.grid_channels;
  } else if (tensor == GemmTensor::grid || one_pixel) {
    together = p.p() * p.q();
  }
  return is_aligned(data, together, sizeof(float), 16);
}

template <ConvPass kPass, Layout kLayout, int kRowVector, int kColumnVector>
void launch_tiles(const ImplicitGemm& gemm, const GemmTiling& tiling, const SimtTensors& at,
                  const SimtEpilogue& epilogue, cudaStream_t stream) {
  constexpr bool kRowsArePixels = GemmSides<kPass, kLayout>::kRows == GemmAxis::pixels;
  const int64_t tiles = tiling.row_tiles * tiling.column_tiles * gemm.groups * gemm.phases_h * gemm.phases_w;
  const dim3 grid(blocks_for(tiles, 1), static_cast<unsigned>(tiling.splits));
  const auto start = [&]<class Tile>(Tile) {
    launch(FASTCONV_KERNEL(implicit_gemm_fp32<kPass, kLayout, Tile, kRowVector, kColumnVector>), grid, Tile::kThreads,
           0, stream, gemm, at, epilogue);
  };
  if (tiling.tile == GemmTile::large) start(SimtTile<128, 128>{});
  else if (tiling.tile == GemmTile::small) start(SimtTile<64, 64>{});
  else start(SimtTile<kRowsArePixels ? 128 : 64, kRowsArePixels ? 64 : 128>{});
}

/// Chooses how to copy. Four columns at a time only with four rows at a time: what is left over is rare.
template <ConvPass kPass, Layout kLayout>
void launch_copies(const ImplicitGemm& gemm, const GemmTiling& tiling, const SimtTensors& at,
                   const SimtEpilogue& epilogue, cudaStream_t stream) {
  using Sides = GemmSides<kPass, kLayout>;
  const bool rows = has_vectors<kPass, kLayout>(gemm, Sides::kRowsTensor, at.rows);
  const bool columns = has_vectors<kPass, kLayout>(gemm, Sides::kColumnsTensor, at.columns);
  if (rows && columns) return launch_tiles<kPass, kLayout, 4, 4>(gemm, tiling, at, epilogue, stream);
  // In NCHW the columns of these are pixels or taps of an image: single elements, but for windows of one pixel.
  if constexpr (kLayout == Layout::nchw && kPass != ConvPass::input_grad)
    if (rows) return launch_tiles<kPass, kLayout, 4, 1>(gemm, tiling, at, epilogue, stream);
  launch_tiles<kPass, kLayout, 1, 1>(gemm, tiling, at, epilogue, stream);
}

/// The product of a pass, in `splits` parts. `image`, `grid` and `weight` are those of cuda_implicit_gemm.cuh; the one
/// that is computed is `result`, and null.
template <ConvPass kPass>
void launch_product(const ConvProblem& p, const GemmTiling& tiling, const void* image, const void* grid,
                    const void* weight, float* result, const SimtEpilogue& epilogue, cudaStream_t stream) {
  const ImplicitGemm gemm = implicit_gemm(p, kPass);
  const auto in_layout = [&]<Layout kLayout>() {
    using Sides = GemmSides<kPass, kLayout>;
    const auto data = [&](GemmTensor tensor) {
      return static_cast<const float*>(tensor == GemmTensor::image  ? image
                                       : tensor == GemmTensor::grid ? grid
                                                                    : weight);
    };
    const auto group = [&](GemmTensor tensor) {
      return tensor == GemmTensor::image  ? gemm.image_group()
             : tensor == GemmTensor::grid ? gemm.grid_group()
                                          : gemm.weight_group();
    };
    const SimtTensors at{data(Sides::kRowsTensor),
                         data(Sides::kColumnsTensor),
                         result,
                         group(Sides::kRowsTensor),
                         group(Sides::kColumnsTensor),
                         group(Sides::kResult),
                         result_elements(p, kPass),
                         static_cast<uint32_t>(tiling.row_tiles),
                         static_cast<uint32_t>(tiling.column_tiles)};
    launch_copies<kPass, kLayout>(gemm, tiling, at, epilogue, stream);
  };
  if (p.layout == Layout::nchw) in_layout.template operator()<Layout::nchw>();
  else in_layout.template operator()<Layout::nhwc>();
}

template <bool kHasEpilogue>
void launch_add_splits(const ConvProblem& p, const GemmTiling& tiling, ConvPass pass, const float* workspace,
                       void* result, const SimtEpilogue& epilogue, cudaStream_t stream) {
  const int64_t elements = result_elements(p, pass), channels = pass == ConvPass::forward ? p.k : p.c;
  const int64_t channel_elements = p.layout == Layout::nhwc ? 1 : elements / (p.n * channels);
  launch(FASTCONV_KERNEL(add_splits<kHasEpilogue>), blocks_for(elements, kFinishThreads), kFinishThreads, 0, stream,
         workspace, static_cast<float*>(result), static_cast<int>(tiling.splits), elements, channel_elements, channels,
         epilogue);
}

}  // namespace
}  // namespace fastconv::cuda
