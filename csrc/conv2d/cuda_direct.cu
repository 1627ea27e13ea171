// Direct convolution: the definition, one thread per result, for any kernel size, stride, padding, dilation and groups.
//
// What a program computes: forward, one output element; input gradient, one input element (which gathers from the
// outputs that used it); weight gradient, one weight per block, its 256 threads sharing the pixels. Nothing is kept in
// shared memory: a window's inputs come from L1 and L2, where neighbouring threads find each other's. That makes this
// the slowest kernel and the plainest one: the others are compared with it, and it serves what they refuse.
//
// Neighbouring threads compute neighbouring elements of the result's memory, so that stores coalesce in both layouts.
#include "conv2d/cuda_epilogue.cuh"
#include "cuda_support/dtype.h"
#include "cuda_support/launch.h"
#include "cuda_support/launchers.h"
#include "cuda_support/reduce.cuh"

namespace fastconv::cuda {
namespace {

constexpr int kThreads = 256;

/// A position in a four-dimensional tensor.
struct Position {
  int64_t n, c, h, w;
};

/// The position of element `index` of a dense tensor of c channels and h x w pixels.
__device__ __forceinline__ Position position_of(int64_t index, Layout layout, int64_t c, int64_t h, int64_t w) {
  Position at;
  if (layout == Layout::nchw) {
    at.w = index % w, index /= w;
    at.h = index % h, index /= h;
    at.c = index % c, at.n = index / c;
  } else {
    at.c = index % c, index /= c;
    at.w = index % w, index /= w;
    at.h = index % h, at.n = index / h;
  }
  return at;
}

__device__ __forceinline__ int64_t thread_index() { return int64_t{blockIdx.x} * kThreads + threadIdx.x; }

template <class T>
__global__ void __launch_bounds__(kThreads)
    direct_forward(ConvProblem p, const T* x, const T* weight, T* y, CudaEpilogue epilogue) {
  const int64_t index = thread_index(), rows = p.p(), columns = p.q();
  if (index >= p.n * p.k * rows * columns) return;
  const Position at = position_of(index, p.layout, p.k, rows, columns);
  const Strides4 xs = p.input_strides(), ws = p.weight_strides();
  const int64_t depth = p.c_per_group();
  const T* image = x + at.n * xs.n + at.c / p.k_per_group() * depth * xs.c;
  const T* filter = weight + at.c * ws.n;
  float sum = 0;
  for (int64_t r = 0; r < p.r; ++r) {
    const int64_t h = at.h * p.stride.h - p.padding.top + r * p.dilation.h;
    if (h < 0 || h >= p.h) continue;
    for (int64_t s = 0; s < p.s; ++s) {
      const int64_t w = at.w * p.stride.w - p.padding.left + s * p.dilation.w;
      if (w < 0 || w >= p.w) continue;
      const T* pixel = image + h * xs.h + w * xs.w;
      const T* tap = filter + r * ws.h + s * ws.w;
      for (int64_t c = 0; c < depth; ++c) sum = fmaf(to_float(pixel[c * xs.c]), to_float(tap[c * ws.c]), sum);
    }
  }
  y[index] = finish<T>(epilogue, sum, at.c, index);
}

/// The output row (or column) whose window has its tap `tap` on input row `at`; -1 if there is none.
__device__ __forceinline__ int64_t output_of(int64_t at, int64_t padding, int64_t tap, int64_t dilation, int64_t stride,
                                             int64_t outputs) {
  const int64_t distance = at + padding - tap * dilation;
  if (distance < 0 || distance % stride != 0) return -1;
  const int64_t output = distance / stride;
  return output < outputs ? output : -1;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    direct_input_grad(ConvProblem p, const T* grad_y, const T* weight, T* grad_x) {
  const int64_t index = thread_index();
  if (index >= p.n * p.c * p.h * p.w) return;
  const Position at = position_of(index, p.layout, p.c, p.h, p.w);
  const Strides4 ys = p.output_strides(), ws = p.weight_strides();
  const int64_t filters = p.k_per_group(), group = at.c / p.c_per_group(), rows = p.p(), columns = p.q();
  const T* image = grad_y + at.n * ys.n + group * filters * ys.c;
  const T* plane = weight + group * filters * ws.n + at.c % p.c_per_group() * ws.c;
  float sum = 0;
  for (int64_t r = 0; r < p.r; ++r) {
    const int64_t row = output_of(at.h, p.padding.top, r, p.dilation.h, p.stride.h, rows);
    if (row < 0) continue;
    for (int64_t s = 0; s < p.s; ++s) {
      const int64_t column = output_of(at.w, p.padding.left, s, p.dilation.w, p.stride.w, columns);
      if (column < 0) continue;
      const T* pixel = image + row * ys.h + column * ys.w;
      const T* tap = plane + r * ws.h + s * ws.w;
      for (int64_t k = 0; k < filters; ++k) sum = fmaf(to_float(pixel[k * ys.c]), to_float(tap[k * ws.n]), sum);
    }
  }
  grad_x[index] = from_float<T>(sum);
}

/// One block per weight: thread t takes pixels t, t + 256, ... of the batch, and the 256 sums meet in a fixed order.
template <class T>
__global__ void __launch_bounds__(kThreads)
    direct_weight_grad(ConvProblem p, const T* grad_y, const T* x, T* grad_weight) {
  const Position at = position_of(blockIdx.x, p.layout, p.c_per_group(), p.r, p.s);  // n: the filter
  const Strides4 xs = p.input_strides(), ys = p.output_strides();
  const int64_t rows = p.p(), columns = p.q();
  const int64_t channel = at.n / p.k_per_group() * p.c_per_group() + at.c;
  const int64_t down = at.h * p.dilation.h - p.padding.top, right = at.w * p.dilation.w - p.padding.left;
  float sum = 0;
  for (int64_t pixel = threadIdx.x; pixel < p.n * rows * columns; pixel += kThreads) {
    const int64_t q = pixel % columns, row = pixel / columns % rows, n = pixel / columns / rows;
    const int64_t h = row * p.stride.h + down, w = q * p.stride.w + right;
    if (h < 0 || h >= p.h || w < 0 || w >= p.w) continue;
    sum = fmaf(to_float(grad_y[n * ys.n + at.n * ys.c + row * ys.h + q * ys.w]),
               to_float(x[n * xs.n + channel * xs.c + h * xs.h + w * xs.w]), sum);
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) grad_weight[blockIdx.x] = from_float<T>(sum);
}

}  // namespace

/// y = epilogue(x * weight); all tensors dense in the problem's layout.
void launch_direct_forward(const ConvProblem& p, const void* x, const void* weight, void* y,
                           const CudaEpilogue& epilogue, cudaStream_t stream) {
  dispatch_element("direct convolution", p.dtype, [&](auto element) {
    using T = decltype(element);
    launch(FASTCONV_KERNEL(direct_forward<T>), blocks_for(p.n * p.k * p.p() * p.q(), kThreads), kThreads, 0, stream, p,
           static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<T*>(y), epilogue);
  });
}

void launch_direct_input_grad(const ConvProblem& p, const void* grad_y, const void* weight, void* grad_x,
                              cudaStream_t stream) {
  dispatch_element("direct convolution", p.dtype, [&](auto element) {
    using T = decltype(element);
    launch(FASTCONV_KERNEL(direct_input_grad<T>), blocks_for(p.n * p.c * p.h * p.w, kThreads), kThreads, 0, stream, p,
           static_cast<const T*>(grad_y), static_cast<const T*>(weight), static_cast<T*>(grad_x));
  });
}

void launch_direct_weight_grad(const ConvProblem& p, const void* grad_y, const void* x, void* grad_weight,
                               cudaStream_t stream) {
  dispatch_element("direct convolution", p.dtype, [&](auto element) {
    using T = decltype(element);
    launch(FASTCONV_KERNEL(direct_weight_grad<T>), blocks_for(p.k * p.c_per_group() * p.r * p.s, 1), kThreads, 0,
           stream, p, static_cast<const T*>(grad_y), static_cast<const T*>(x), static_cast<T*>(grad_weight));
  });
}

FASTCONV_LAUNCHER("conv2d", "direct", launch_direct_forward);
FASTCONV_LAUNCHER("conv2d_input_grad", "direct", launch_direct_input_grad);
FASTCONV_LAUNCHER("conv2d_weight_grad", "direct", launch_direct_weight_grad);

}  // namespace fastconv::cuda
