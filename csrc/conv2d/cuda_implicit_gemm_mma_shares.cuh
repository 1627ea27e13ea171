// Split-K of implicit_gemm_mma: where a layer has fewer tiles than the chip has multiprocessors, blocks share the depth
// of a tile. Each writes its sums in float32, and a second pass adds them, always in the same order, and finishes.
#pragma once

#include "conv2d/cuda_implicit_gemm_mma.cuh"

namespace fastconv::cuda {
namespace {

inline int64_t mma_shares(const ConvProblem& p, const MmaProduct& product) {
  // A second pass numbers the results with 32 bits.
  if (product.results > 0x7fff0000) return 1;
  const int64_t depth = int64_t{product.depth} * p.r * p.s / product.phases();
  return choose_mma_shares(product.pixels, product.channels, depth, p.groups * product.phases(),
                           device_properties().sm_count);
}

/// Float32 numbers, for the current device; 0 where depth is not shared.
inline int64_t mma_workspace(const ConvProblem& p, bool input_grad) {
  require_mma_serves(p, refuse_implicit_gemm_mma_cuda(p, input_grad ? ConvPass::input_grad : ConvPass::forward));
  const MmaProduct product(p, input_grad);
  const int64_t shares = mma_shares(p, product);
  return shares > 1 ? shares * product.results : 0;
}

template <class T>
__global__ void __launch_bounds__(256)
    add_mma_shares(const float* partial, int shares, uint32_t results, FastDivide by_channel, FastDivide by_all,
                   CudaEpilogue epilogue, FlatEpilogue end, T* y) {
  const uint32_t at = blockIdx.x * 256 + threadIdx.x;
  if (at >= results) return;
  float sum = 0;
#pragma unroll 4
  for (int share = 0; share < shares; ++share) sum += partial[int64_t{share} * results + at];
  uint32_t channel = by_channel.divide(at);  // the channel's number, plus those of the images before
  by_all.divide_keep_rest(channel);
  if (epilogue.scale.data != nullptr) sum *= epilogue.scale.at(channel);
  if (epilogue.shift.data != nullptr) sum += epilogue.shift.at(channel);
  y[at] = end.finish<T>(sum, at);
}

inline void launch_add_mma_shares(const ConvProblem& p, const MmaProduct& product, const MmaTensors& tensors,
                                  cudaStream_t stream) {
  const int64_t channels = p.groups * product.channels;
  const FastDivide by_channel(product.written.channel), by_all(channels);
  const auto run = [&](auto element) {
    using T = decltype(element);
    launch(FASTCONV_KERNEL(add_mma_shares<T>), blocks_for(product.results, 256), 256, 0, stream, tensors.workspace,
           product.shares, static_cast<uint32_t>(product.results), by_channel, by_all, tensors.epilogue,
           FlatEpilogue(tensors.epilogue), static_cast<T*>(tensors.written));
  };
  if (p.dtype == DType::f16) run(half{});
  else run(bfloat16{});
}

}  // namespace
}  // namespace fastconv::cuda
