// Problems and launch shapes as text, for error messages.
#pragma once

#include <string>

#include "common/problem.h"
#include "cuda_support/cuda.h"

namespace fastconv::cuda {

inline std::string describe(const dim3& size) {
  return "(" + std::to_string(size.x) + ", " + std::to_string(size.y) + ", " + std::to_string(size.z) + ")";
}

inline const char* describe(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "float32";
    case DType::f64:
      return "float64";
    case DType::f16:
      return "float16";
    case DType::bf16:
      return "bfloat16";
  }
  return "unknown dtype";
}

inline const char* describe(Layout layout) { return layout == Layout::nchw ? "NCHW" : "NHWC"; }

inline std::string describe_sizes(int64_t n, int64_t c, int64_t h, int64_t w) {
  return std::to_string(n) + "x" + std::to_string(c) + "x" + std::to_string(h) + "x" + std::to_string(w);
}

inline std::string describe_window(int64_t r, int64_t s, Size2 stride, Size2 dilation) {
  return std::to_string(r) + "x" + std::to_string(s) + " stride " + std::to_string(stride.h) + "," +
         std::to_string(stride.w) + " dilation " + std::to_string(dilation.h) + "," + std::to_string(dilation.w);
}

inline std::string describe(const ConvProblem& p) {
  return "convolution " + describe_sizes(p.n, p.c, p.h, p.w) + " -> " + std::to_string(p.k) + " channels, " +
         describe_window(p.r, p.s, p.stride, p.dilation) + " padding " + std::to_string(p.padding.top) + "," +
         std::to_string(p.padding.left) + "," + std::to_string(p.padding.bottom) + "," +
         std::to_string(p.padding.right) + " groups " + std::to_string(p.groups) + ", " + describe(p.dtype) + " " +
         describe(p.layout);
}

inline std::string describe(const PoolProblem& p) {
  return "pooling " + describe_sizes(p.n, p.c, p.h, p.w) + ", " + describe_window(p.r, p.s, p.stride, p.dilation) +
         " padding " + std::to_string(p.padding.h) + "," + std::to_string(p.padding.w) + ", " + describe(p.dtype) +
         " " + describe(p.layout);
}

/// " for convolution ..." if the argument is a problem or has a describe() of its own, else nothing.
inline std::string describe_argument(const ConvProblem& problem) { return " for " + describe(problem); }
inline std::string describe_argument(const PoolProblem& problem) { return " for " + describe(problem); }
template <class T>
std::string describe_argument(const T& argument) {
  if constexpr (requires { argument.describe(); }) return " for " + std::string(argument.describe());
  else return "";
}

}  // namespace fastconv::cuda
