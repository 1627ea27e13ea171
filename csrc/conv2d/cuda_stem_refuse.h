// Which convolutions the CUDA stem kernels serve, and why not the others: host side, without torch.
#pragma once

#include "common/problem.h"

namespace fastconv {

/// Null if csrc/conv2d/cuda_stem*.cu serve the problem (all three passes), else the reason.
inline const char* refuse_stem_cuda(const ConvProblem& p) {
  constexpr int64_t kInt = 0x7fffffff;
  if (p.dtype == DType::f64) return "it computes in float32 and would round float64";
  if (p.groups != 1) return "it needs groups == 1";
  if (p.c > 4) return "it needs at most 4 input channels";
  if (p.c < 1 || p.k < 1) return "it needs at least one channel";
  if (p.dilation.h != 1 || p.dilation.w != 1) return "it needs dilation 1";
  if (p.r > 11 || p.s > 11) return "it needs a window of at most 11x11";
  if (p.stride.h > 4 || p.stride.w > 4) return "it needs strides of at most 4";
  if (p.n < 1 || p.p() < 1 || p.q() < 1) return "it needs at least one output";
  // Offsets inside an image are 32 bits wide, with room for the padding around it.
  const int64_t h = max_of(p.h, p.p() * p.stride.h) + 64, w = max_of(p.w, p.q() * p.stride.w) + 64;
  if (h * w > kInt / max_of(p.c, p.k)) return "it needs images of fewer than 2^31 elements";
  return nullptr;
}

/// The same for csrc/conv2d/cuda_stem_mma.cu (forward).
inline const char* refuse_stem_mma_cuda(const ConvProblem& p) {
  if (p.dtype != DType::f16 && p.dtype != DType::bf16) return "it needs float16 or bfloat16";
  return refuse_stem_cuda(p);
}

}  // namespace fastconv
