#if defined(__x86_64__)

#include "common/simd/target_avx512_bf16.h"
#include "conv2d/cpu_pairs_channels.h"
#include "conv2d/cpu_pairs_pixels.h"
#include "conv2d/cpu_pairs_weight_grad.h"

namespace fastconv {
namespace {

inline constexpr PairKernels kPairKernels = {
    [](const GemmConv* products, int64_t count, Layout layout) {
      for (int64_t i = 0; i < count; ++i)
        layout == Layout::nchw ? convolve_pairs_pixels(products[i]) : convolve_pairs_channels(products[i]);
    },
    &weight_grad_pairs,
};

}  // namespace

const PairKernels* conv2d_pairs_avx512_bf16() { return &kPairKernels; }

}  // namespace fastconv

#endif
