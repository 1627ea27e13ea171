// The bias gradient: the sum of the output gradient over each channel's pixels. Bound by memory: every element is read
// once and K numbers are written.
//
// Two passes in a fixed order, so that the bits do not depend on which block comes first. Pass 1: block (channels,
// split) sums its split of the pixels (NHWC) or images (NCHW) and writes partial[split][channel]. Pass 2: a thread per
// channel adds the splits.
#include <algorithm>

#include "cuda_support/device.h"
#include "cuda_support/dtype.h"
#include "cuda_support/launch.h"
#include "cuda_support/launchers.h"
#include "cuda_support/reduce.cuh"

namespace fastconv::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kChannels = 64;  // of one block in NHWC: 128 bytes of fp16 per pixel

/// (N, K, P, Q): block.x is the channel, block.y the split of the images.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_planes(const T* grad, float* partial, int64_t images, int64_t channels,
                                                       int64_t plane, int64_t images_per_split) {
  const int64_t channel = blockIdx.x, first = blockIdx.y * images_per_split;
  const int64_t last = min_of(images, first + images_per_split);
  float sum = 0;
  for (int64_t n = first; n < last; ++n) {
    const T* from = grad + (n * channels + channel) * plane;
    for (int64_t i = threadIdx.x; i < plane; i += kThreads) sum += to_float(from[i]);
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) partial[blockIdx.y * channels + channel] = sum;
}

/// (N, P, Q, K): 64 neighbouring threads read 64 neighbouring channels of a pixel, 4 pixels at a time.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_pixels(const T* grad, float* partial, int64_t pixels, int64_t channels, int64_t pixels_per_split) {
  constexpr int kRows = kThreads / kChannels;
  FASTCONV_SHARED(sums, float[kRows][kChannels]);
  const int lane = threadIdx.x % kChannels, row = threadIdx.x / kChannels;
  const int64_t channel = int64_t{blockIdx.x} * kChannels + lane, first = blockIdx.y * pixels_per_split;
  const int64_t last = min_of(pixels, first + pixels_per_split);
  float sum = 0;
  if (channel < channels)
    for (int64_t pixel = first + row; pixel < last; pixel += kRows) sum += to_float(grad[pixel * channels + channel]);
  sums[row][lane] = sum;
  __syncthreads();
  if (row != 0 || channel >= channels) return;
  for (int other = 1; other < kRows; ++other) sum += sums[other][lane];
  partial[blockIdx.y * channels + channel] = sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    add_splits(const float* partial, T* grad_bias, int64_t channels, int64_t splits) {
  const int64_t channel = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (channel >= channels) return;
  float sum = 0;
  for (int64_t split = 0; split < splits; ++split) sum += partial[split * channels + channel];
  grad_bias[channel] = from_float<T>(sum);
}

/// Blocks of pass 1 along the channels, and the units (images or pixels) that the other axis splits.
struct Split {
  int64_t channel_blocks, units, per_split, splits;

  Split(int64_t n, int64_t k, int64_t plane, Layout layout) {
    channel_blocks = layout == Layout::nchw ? k : ceil_div(k, kChannels);
    units = layout == Layout::nchw ? n : n * plane;
    // Four blocks for each multiprocessor hide the latency of memory; a split of few pixels is all overhead.
    const int64_t wanted = ceil_div(4 * device_properties().sm_count, channel_blocks);
    const int64_t least = layout == Layout::nchw ? ceil_div(4096, std::max<int64_t>(plane, 1)) : 256;
    per_split = std::max(least, ceil_div(units, std::min<int64_t>(wanted, 1024)));
    splits = ceil_div(units, per_split);
  }
};

}  // namespace

/// float32 numbers that launch_bias_grad needs as a workspace.
int64_t bias_grad_workspace(int64_t n, int64_t k, int64_t plane, Layout layout) {
  return Split(n, k, plane, layout).splits * k;
}

/// grad is (n, k, plane pixels), dense in `layout`; none of the three is 0.
void launch_bias_grad(const void* grad, void* grad_bias, float* workspace, int64_t n, int64_t k, int64_t plane,
                      Layout layout, DType dtype, cudaStream_t stream) {
  const Split split(n, k, plane, layout);
  const dim3 grid(blocks_for(split.channel_blocks, 1), static_cast<unsigned>(split.splits));
  dispatch_element("bias gradient", dtype, [&](auto element) {
    using T = decltype(element);
    if (layout == Layout::nchw)
      launch(FASTCONV_KERNEL(sum_planes<T>), grid, kThreads, 0, stream, static_cast<const T*>(grad), workspace, n, k,
             plane, split.per_split);
    else
      launch(FASTCONV_KERNEL(sum_pixels<T>), grid, kThreads, 0, stream, static_cast<const T*>(grad), workspace,
             n * plane, k, split.per_split);
    launch(FASTCONV_KERNEL(add_splits<T>), blocks_for(k, kThreads), kThreads, 0, stream,
           static_cast<const float*>(workspace), static_cast<T*>(grad_bias), k, split.splits);
  });
}

FASTCONV_LAUNCHER("conv2d_bias_grad", "rows", launch_bias_grad);
FASTCONV_LAUNCHER("conv2d_bias_grad_workspace", "rows", bias_grad_workspace);

}  // namespace fastconv::cuda
