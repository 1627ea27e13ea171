// Which depthwise problems the CUDA kernels of this folder serve, and why not the others: host side, without torch.
#pragma once

#include "common/problem.h"

namespace fastconv {

/// The most shared memory that a block of the NCHW kernels asks for when one row strip of a plane is that large.
inline constexpr int64_t kDepthwiseSharedBytes = 64 << 10;

/// Null if csrc/depthwise/cuda_*.cu serve the problem (all three passes), else the reason; csrc/conv2d/cuda_direct.cu
/// serves the rest.
inline const char* refuse_depthwise_cuda(const ConvProblem& p) {
  constexpr int64_t kInt = 0x7fffffff;
  if (p.dtype == DType::f64) return "it computes in float32 and would round float64";
  if (!p.is_depthwise()) return "it needs groups == in_channels, and more than one";
  if (p.k != p.c) return "it needs as many output channels as input channels";
  if (p.r != p.s || (p.r != 3 && p.r != 5 && p.r != 7)) return "it needs a window of 3x3, 5x5 or 7x7";
  if (p.stride.h != p.stride.w || p.stride.h < 1 || p.stride.h > 2) return "it needs stride 1 or 2 in both directions";
  if (p.dilation.h != 1 || p.dilation.w != 1) return "it needs dilation 1";
  if (p.n < 1 || p.p() < 1 || p.q() < 1) return "it needs at least one output";
  if (p.n * p.c > kInt) return "it needs fewer than 2^31 planes";
  // Offsets inside an image are 32 bits wide, and a step beyond the last row must still fit.
  const int64_t h = max_of(p.h, p.p() * p.stride.h) + 16, w = max_of(p.w, p.q() * p.stride.w) + 16;
  if (h * w > kInt / p.c) return "it needs images of fewer than 2^31 elements";
  if (p.layout == Layout::nhwc && p.c > 65535 * 64) return "it needs fewer than 2^22 channels";  // blocks along y
  if (p.n * h * w > 8 * kInt) return "it needs fewer than 2^31 strips of pixels";
  if (p.layout == Layout::nchw && (max_of(p.w, p.q()) * 2 * p.r + 64) * element_bytes(p.dtype) > kDepthwiseSharedBytes)
    return "it needs a strip of rows of a plane to fit into shared memory";
  return nullptr;
}

}  // namespace fastconv
