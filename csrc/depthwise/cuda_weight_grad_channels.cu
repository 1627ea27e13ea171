// Weight gradient in NHWC.
//
// A program has up to 64 vectors of channels and a share of the items (chunks of rows in one or two columns of an
// image). A thread keeps the sums of its channels in registers over all its items; the threads that have the same
// channels add up in a fixed order and write partial[slot][channel][tap], and a second pass (conv2d/cuda_slots.cuh)
// adds the slots.
#include "cuda_support/launch.h"
#include "depthwise/cuda_channels.cuh"
#include "depthwise/cuda_launch.h"

namespace fastconv::cuda {
namespace {

template <class T, int kWindow, int kStride, int kV>
__global__ void __launch_bounds__(kChannelThreads, channel_blocks_per_sm(kWindow))
    channels_weight_grad(DepthwisePass pass, ChannelBlocks blocks, const T* grad_y, const T* x, float* partial) {
  using Shape = SlideShape<kWindow, kStride, kV, channel_columns(kWindow, kStride)>;
  FASTCONV_SHARED(shared, float[kWindow * kV * kChannelThreads]);
  const int vector = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x), channel = vector * kV;
  const int channels = static_cast<int>(pass.channels);
  const int64_t x_image = int64_t{pass.h.in} * pass.w.in * channels;
  const int64_t grad_image = int64_t{pass.h.out} * pass.w.out * channels;
  TapRegisters<Shape> sum = {};
  if (vector < blocks.vectors) {
    const int64_t first = int64_t{blockIdx.x} * blockDim.y * blocks.per_thread + threadIdx.y;
    for (int i = 0; i < blocks.per_thread; ++i) {
      const int64_t index = first + int64_t{i} * blockDim.y;
      if (index >= blocks.items) break;
      const ChannelItem item(static_cast<uint32_t>(index), blocks, pass.h.out);
      const int column = item.column * Shape::kColumns;
      const ChannelReader<T, kV, Shape::kReads> read_x(x + item.image * x_image + channel, channels, pass.w.in,
                                                       rows_read(pass.h, item.last, kStride, kWindow),
                                                       column * kStride - pass.w.pad);
      const ChannelReader<T, kV, Shape::kColumns> read_grad(grad_y + item.image * grad_image + channel, channels,
                                                            pass.w.out, item.last, column);
      slide_weight_grad<T, Shape>(sum, item.first, item.last, pass.h.pad, read_x, read_grad);
    }
  }
  // A row of taps at a time: [tap of the row][thread.y][channel of the tile].
  const unsigned width = blocks.tile * kV, thread = threadIdx.y * blockDim.x + threadIdx.x;
  const unsigned threads = blockDim.x * blockDim.y, first_channel = static_cast<int>(blockIdx.y) * width;
  partial += (int64_t{blockIdx.x} * channels + first_channel) * Shape::kTaps;
#pragma unroll
  for (int r = 0; r < kWindow; ++r) {
    __syncthreads();
#pragma unroll
    for (int s = 0; s < kWindow; ++s)
#pragma unroll
      for (int v = 0; v < kV; ++v) shared[s * kV * threads + thread * kV + v] = sum[r * kWindow + s][v];
    __syncthreads();
    for (unsigned i = thread; i < static_cast<unsigned>(kWindow * width); i += threads) {
      const unsigned s = i / width, own = i % width;
      float total = 0;
#pragma unroll 1
      for (unsigned y = 0; y < blockDim.y; ++y) total += shared[s * kV * threads + y * width + own];
      if (first_channel + own < static_cast<unsigned>(channels)) partial[own * Shape::kTaps + r * kWindow + s] = total;
    }
  }
}

ChannelBlocks divide_weight_grad(const DepthwisePass& pass, int kV) {
  const int64_t columns = ceil_div(pass.w.out, channel_columns(pass.window, pass.step));
  ChannelBlocks blocks = divide_channels(pass.images, pass.channels, pass.h.out, columns, kV);
  // Few shares, so that the second pass has little to read: two waves of two blocks for each multiprocessor.
  const int64_t lanes = kChannelThreads / blocks.tile;
  const int64_t shares = ceil_div(4 * int64_t{device_properties().sm_count}, blocks.tiles);
  blocks.per_thread = static_cast<int>(ceil_div(blocks.items, lanes * shares));
  blocks.item_blocks = static_cast<unsigned>(ceil_div(blocks.items, lanes * blocks.per_thread));
  return blocks;
}

template <class T, int kWindow, int kV>
void run_vectors(const DepthwisePass& pass, const T* grad_y, const T* x, float* partial, cudaStream_t stream) {
  const ChannelBlocks blocks = divide_weight_grad(pass, kV);
  if (pass.step == 1)
    launch(FASTCONV_KERNEL(channels_weight_grad<T, kWindow, 1, kV>), blocks.grid(), blocks.block(), 0, stream, pass,
           blocks, grad_y, x, partial);
  else
    launch(FASTCONV_KERNEL(channels_weight_grad<T, kWindow, 2, kV>), blocks.grid(), blocks.block(), 0, stream, pass,
           blocks, grad_y, x, partial);
}

/// Calls body(element, window, vector length) with the ones that serve the problem; whether the pointers are aligned
/// is not known when the workspace is sized, so `aligned` comes from the caller.
template <class Body>
void dispatch_kernel(const DepthwisePass& pass, bool aligned, const Body& body) {
  dispatch_element("depthwise weight gradient", pass.dtype, [&](auto element) {
    using T = decltype(element);
    dispatch_window(pass.window, [&](auto window) {
      constexpr int kV = kChannelVector<T, decltype(window)::value>;
      if (aligned && pass.channels % kV == 0) body(element, window, std::integral_constant<int, kV>{});
      else body(element, window, std::integral_constant<int, 1>{});
    });
  });
}

}  // namespace

/// The most that run_channels_weight_grad writes, whatever the alignment of its pointers.
int channels_weight_grad_slots(const DepthwisePass& pass) {
  unsigned slots = 0;
  for (const bool aligned : {false, true})
    dispatch_kernel(pass, aligned, [&](auto, auto, auto vector) {
      slots = std::max(slots, divide_weight_grad(pass, vector.value).item_blocks);
    });
  return static_cast<int>(slots);
}

/// Returns the slots that it wrote.
int run_channels_weight_grad(const DepthwisePass& pass, const void* grad_y, const void* x, float* partial,
                             cudaStream_t stream) {
  int slots = 0;
  const bool aligned = is_aligned(x, 0, 1, 8) && is_aligned(grad_y, 0, 1, 8);
  dispatch_kernel(pass, aligned, [&](auto element, auto window, auto vector) {
    using T = decltype(element);
    run_vectors<T, window.value, vector.value>(pass, static_cast<const T*>(grad_y), static_cast<const T*>(x), partial,
                                               stream);
    slots = static_cast<int>(divide_weight_grad(pass, vector.value).item_blocks);
  });
  return slots;
}

}  // namespace fastconv::cuda
