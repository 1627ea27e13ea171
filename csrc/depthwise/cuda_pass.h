// A forward pass or an input gradient as one thing: windows of `reach` rows and columns of the tensor that is read,
// `step` apart, each of which gives one output (or one cell of 2 x 2 elements, cuda_slide.cuh) of the tensor written.
#pragma once

#include <stdexcept>
#include <string>

#include "conv2d/cuda_flat_epilogue.cuh"
#include "cuda_support/describe.h"
#include "cuda_support/fast_divide.h"
#include "depthwise/cuda_refuse.h"
#include "depthwise/cuda_slide.cuh"

namespace fastconv::cuda {

/// Position i of an axis reads elements i * step - pad to i * step - pad + reach - 1, of which [0, in) exist.
struct PassAxis {
  int in = 0, out = 0;  // elements of the tensors read and written
  int positions = 0;    // windows
  int pad = 0;          // may be negative
  int origin = 0;       // of cells: the first element of cell 0, -1 or 0
};

struct DepthwisePass {
  PassAxis h, w;
  int window = 3, step = 1, reach = 3;
  bool cells = false;  // a position is a cell: the input gradient of stride 2
  bool flip = false;   // the taps are used in reverse
  int64_t images = 0, channels = 0;
  DType dtype = DType::f32;

  std::string describe() const {
    return std::string(cells || flip ? "input gradient of " : "") + "depthwise " + std::to_string(window) + "x" +
           std::to_string(window) + (cells ? " stride 2, " : ", step " + std::to_string(step) + ", ") +
           describe_sizes(images, channels, h.in, w.in) + " -> " + std::to_string(h.out) + "x" + std::to_string(w.out) +
           " " + cuda::describe(dtype);
  }
};

inline int narrow(int64_t value) { return static_cast<int>(value); }

inline DepthwisePass forward_pass(const ConvProblem& p) {
  DepthwisePass pass;
  pass.h = {narrow(p.h), narrow(p.p()), narrow(p.p()), narrow(p.padding.top), 0};
  pass.w = {narrow(p.w), narrow(p.q()), narrow(p.q()), narrow(p.padding.left), 0};
  pass.window = pass.reach = narrow(p.r);
  pass.step = narrow(p.stride.h);
  pass.images = p.n, pass.channels = p.c, pass.dtype = p.dtype;
  return pass;
}

/// Along one axis, for input elements `in` and outputs `out` of the forward pass.
inline PassAxis input_grad_axis(int64_t in, int64_t out, int64_t pad, int window, int stride) {
  if (stride == 1) return {narrow(out), narrow(in), narrow(in), narrow(window - 1 - pad), 0};
  // Cell i of the definition in cuda_slide.cuh starts at element 2i + shift - pad; count from the first that has any.
  const int shift = cell_shift(window), live = (window + 1) / 2;
  const int64_t first = (pad - shift - (pad < shift)) / 2;  // rounded down
  const int64_t origin = 2 * first + shift - pad;
  return {narrow(out), narrow(in), narrow(ceil_div(in - origin, 2)), narrow(live - 1 - shift - first), narrow(origin)};
}

inline DepthwisePass input_grad_pass(const ConvProblem& p) {
  DepthwisePass pass = forward_pass(p);
  const int stride = pass.step;
  pass.h = input_grad_axis(p.h, p.p(), p.padding.top, pass.window, stride);
  pass.w = input_grad_axis(p.w, p.q(), p.padding.left, pass.window, stride);
  pass.step = 1;
  pass.cells = stride == 2, pass.flip = stride == 1;
  if (pass.cells) pass.reach = (pass.window + 1) / 2;
  return pass;
}

__device__ __forceinline__ float scale_of(const CudaEpilogue& epilogue, int channel) {
  return epilogue.scale.data != nullptr ? epilogue.scale.at(channel) : 1.0f;
}
__device__ __forceinline__ float shift_of(const CudaEpilogue& epilogue, int channel) {
  return epilogue.shift.data != nullptr ? epilogue.shift.at(channel) : 0.0f;
}

inline void require_depthwise(const ConvProblem& p) {
  if (const char* reason = refuse_depthwise_cuda(p))
    throw std::runtime_error("depthwise CUDA kernel refuses " + describe(p) + ": " + reason +
                             "; the direct kernel serves any problem");
}

/// Calls body(integral constant) for the window, which refuse_depthwise_cuda limits to these.
template <class Body>
void dispatch_window(int window, const Body& body) {
  switch (window) {
    case 3:
      return body(std::integral_constant<int, 3>{});
    case 5:
      return body(std::integral_constant<int, 5>{});
    case 7:
      return body(std::integral_constant<int, 7>{});
  }
  throw std::logic_error("depthwise window " + std::to_string(window) + ", expected 3, 5 or 7");
}

}  // namespace fastconv::cuda
