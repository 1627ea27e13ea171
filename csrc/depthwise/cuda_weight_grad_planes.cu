// Weight gradient in NCHW.
//
// A program has some channels (or a strip of rows of one) and a share of the images, and keeps its sums in registers
// over all of them: thread i always has the same channel, chunk of rows and pair of columns. While it works on one
// image, cp.async brings the next one's planes of x and of the gradient, each a contiguous range, to shared memory.
// In the end the threads of a channel add up in a fixed order and write partial[slot][channel][tap], slot being the
// share and the strip; a second pass (conv2d/cuda_slots.cuh) adds the slots.
#include "cuda_support/launch.h"
#include "cuda_support/reduce.cuh"
#include "depthwise/cuda_launch.h"
#include "depthwise/cuda_planes.cuh"

namespace fastconv::cuda {
namespace {

constexpr int kWarps = kPlaneThreads / 32;
/// Of one image; twice that is in use. Three blocks fit beside each other on an A100's multiprocessor.
constexpr int64_t kImageBytes = 20 << 10;

/// Which channels, rows and images a block has.
struct WeightGradBlocks {
  int channels = 1, strips = 1, strip_rows = 0, chunk_rows = 0;  // of a block; of a channel; of a strip; of an item
  int shares = 1, images_per_share = 1;
  int x_bytes = 0, grad_bytes = 0;  // of one image's staged range
  FastDivide chunks, columns;

  int slots() const { return shares * strips; }
};

WeightGradBlocks divide_weight_grad(const DepthwisePass& pass) {
  WeightGradBlocks blocks;
  const int64_t size = element_bytes(pass.dtype), columns = ceil_div(pass.w.out, 2), rows = pass.h.out;
  const int64_t x_row = pass.w.in * size, grad_row = pass.w.out * size;
  const int64_t image_bytes = x_row * pass.h.in + grad_row * rows;
  const int64_t wanted = 4 * int64_t{device_properties().sm_count};  // blocks
  const int64_t most = std::min({kImageBytes / image_bytes, kPlaneThreads / columns, pass.channels,
                                 ceil_div(pass.channels * pass.images, wanted)});
  blocks.channels = static_cast<int>(std::max<int64_t>(most, 1));
  const int64_t fit = (kImageBytes - pass.window * x_row) / (pass.step * x_row + grad_row);
  blocks.strips = image_bytes > kImageBytes ? static_cast<int>(ceil_div(rows, std::max<int64_t>(fit, 1))) : 1;
  blocks.strip_rows = static_cast<int>(ceil_div(rows, blocks.strips));
  blocks.strips = static_cast<int>(ceil_div(rows, blocks.strip_rows));
  const int overlap = ceil_div(pass.window, pass.step) - 1;
  blocks.chunk_rows = choose_chunk_rows(blocks.strip_rows, columns, blocks.channels, overlap);
  // Of several channels a thread must have one item, whose channel its sums belong to.
  if (blocks.channels > 1) {
    const int64_t chunks = std::min<int64_t>(rows, kPlaneThreads / (columns * blocks.channels));
    blocks.chunk_rows = std::max(blocks.chunk_rows, static_cast<int>(ceil_div(rows, chunks)));
  }
  blocks.chunks = FastDivide(ceil_div(blocks.strip_rows, blocks.chunk_rows));
  blocks.columns = FastDivide(columns);
  const int64_t groups = ceil_div(pass.channels, blocks.channels) * blocks.strips;
  const int64_t shares = std::clamp<int64_t>(ceil_div(wanted, groups), 1, std::min<int64_t>(pass.images, 1024));
  blocks.images_per_share = static_cast<int>(ceil_div(pass.images, shares));
  blocks.shares = static_cast<int>(ceil_div(pass.images, blocks.images_per_share));
  const int64_t x_rows =
      blocks.strips == 1 ? pass.h.in : min_of(pass.h.in, (blocks.strip_rows - 1) * pass.step + pass.window);
  blocks.x_bytes = static_cast<int>(round_up(blocks.channels * x_rows * x_row, 16) + 16);
  blocks.grad_bytes = static_cast<int>(round_up(blocks.channels * blocks.strip_rows * grad_row, 16) + 16);
  return blocks;
}

/// Adds the threads' sums per channel, in the same order every time. `threads` of a channel follow each other.
template <class Shape>
__device__ __forceinline__ void add_threads(const TapRegisters<Shape>& sum, float* shared, float* partial, int channels,
                                            int threads) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int r = 0; r < Shape::kWindow; ++r) {
    __syncthreads();
#pragma unroll
    for (int s = 0; s < Shape::kWindow; ++s) shared[s * kPlaneThreads + threadIdx.x] = sum[r * Shape::kWindow + s][0];
    __syncthreads();
    for (int i = warp; i < channels * Shape::kWindow; i += kWarps) {
      const int channel = i / Shape::kWindow, s = i % Shape::kWindow;
      float total = 0;
      for (int t = lane; t < threads; t += 32) total += shared[s * kPlaneThreads + channel * threads + t];
      total = warp_sum(total);
      if (lane == 0) partial[channel * Shape::kTaps + r * Shape::kWindow + s] = total;
    }
  }
}

template <class T, int kWindow, int kStride>
__global__ void __launch_bounds__(kPlaneThreads, kWindow == 7 ? 1 : 2)
    planes_weight_grad(DepthwisePass pass, WeightGradBlocks blocks, const T* grad_y, const T* x, float* partial) {
  using Shape = SlideShape<kWindow, kStride, 1>;
  FASTCONV_DYNAMIC_SHARED(shared);
  const int strip = static_cast<int>(blockIdx.x % blocks.strips), share = static_cast<int>(blockIdx.y);
  const int first_channel = static_cast<int>(blockIdx.x / blocks.strips) * blocks.channels;
  const int channels = min(blocks.channels, static_cast<int>(pass.channels) - first_channel);
  const int first_row = strip * blocks.strip_rows, last_row = min(first_row + blocks.strip_rows, pass.h.out);
  int x_begin = 0, x_end = pass.h.in;
  if (blocks.strips > 1) {
    x_end = max(0, min(x_end, (last_row - 1) * kStride - pass.h.pad + kWindow));
    x_begin = min(x_end, max(0, first_row * kStride - pass.h.pad));
  }
  const int x_plane = pass.h.in * pass.w.in, grad_plane = pass.h.out * pass.w.out;
  const int x_count = (channels - 1) * x_plane + (x_end - x_begin) * pass.w.in;
  const int grad_count = (channels - 1) * grad_plane + (last_row - first_row) * pass.w.out;
  const auto fetch = [&](int64_t image, int buffer, const T*& x_tile, const T*& grad_tile) {
    unsigned char* to = shared + buffer * (blocks.x_bytes + blocks.grad_bytes);
    const int64_t plane = image * pass.channels + first_channel;
    x_tile = stage(to, x + plane * x_plane + x_begin * pass.w.in, x_count);
    grad_tile = stage(to + blocks.x_bytes, grad_y + plane * grad_plane + first_row * pass.w.out, grad_count);
  };
  TapRegisters<Shape> sum = {};
  const int per_channel = static_cast<int>(blocks.chunks.divisor * blocks.columns.divisor);
  const int first_image = share * blocks.images_per_share;
  const int last_image = min(first_image + blocks.images_per_share, static_cast<int>(pass.images));
  const T *x_now, *grad_now;
  fetch(first_image, 0, x_now, grad_now);
  ptx::cp_async_commit_group();
  const auto work = [&](const T* x_at, const T* grad_at) {
    for (int index = threadIdx.x; index < channels * per_channel; index += kPlaneThreads) {
      uint32_t column = index;
      uint32_t chunk = blocks.columns.divide_keep_rest(column);
      const int channel = static_cast<int>(blocks.chunks.divide_keep_rest(chunk)), q = static_cast<int>(column) * 2;
      const int first = first_row + static_cast<int>(chunk) * blocks.chunk_rows;
      const int last = min(first + blocks.chunk_rows, last_row);
      const PlaneReader<T, Shape::kReads> read_x(x_at, channel * x_plane - x_begin * pass.w.in, pass.w.in, x_end,
                                                 q * kStride - pass.w.pad);
      const PlaneReader<T, 2> read_grad(grad_at, channel * grad_plane - first_row * pass.w.out, pass.w.out, last, q);
      slide_weight_grad<T, Shape>(sum, first, last, pass.h.pad, read_x, read_grad);
    }
  };
  for (int image = first_image; image < last_image; ++image) {
    const T *x_next = x_now, *grad_next = grad_now;
    if (image + 1 < last_image) fetch(image + 1, (image + 1 - first_image) % 2, x_next, grad_next);
    ptx::cp_async_commit_group();  // empty after the last image, so that the count below holds
    ptx::cp_async_wait_group<1>();
    __syncthreads();
    work(x_now, grad_now);
    x_now = x_next, grad_now = grad_next;
    __syncthreads();  // the buffer is free
  }
  ptx::cp_async_wait_group<0>();
  const int slot = share * blocks.strips + strip;
  partial += (int64_t{slot} * pass.channels + first_channel) * Shape::kTaps;
  // A single channel's items may be fewer or more than the threads; those without any have zeros.
  add_threads<Shape>(sum, reinterpret_cast<float*>(shared), partial, channels,
                     blocks.channels == 1 ? kPlaneThreads : per_channel);
}

}  // namespace

int planes_weight_grad_slots(const DepthwisePass& pass) { return divide_weight_grad(pass).slots(); }

int run_planes_weight_grad(const DepthwisePass& pass, const void* grad_y, const void* x, float* partial,
                           cudaStream_t stream) {
  const WeightGradBlocks blocks = divide_weight_grad(pass);
  const dim3 grid(blocks_for(ceil_div(pass.channels, blocks.channels) * blocks.strips, 1),
                  static_cast<unsigned>(blocks.shares));
  const size_t shared = std::max<size_t>(2 * (blocks.x_bytes + blocks.grad_bytes),
                                         static_cast<size_t>(pass.window) * kPlaneThreads * sizeof(float));
  dispatch_element("depthwise weight gradient", pass.dtype, [&](auto element) {
    using T = decltype(element);
    dispatch_window(pass.window, [&](auto window) {
      constexpr int kWindow = decltype(window)::value;
      const T *from = static_cast<const T*>(x), *grads = static_cast<const T*>(grad_y);
      if (pass.step == 1)
        launch(FASTCONV_KERNEL(planes_weight_grad<T, kWindow, 1>), grid, kPlaneThreads, shared, stream, pass, blocks,
               grads, from, partial);
      else
        launch(FASTCONV_KERNEL(planes_weight_grad<T, kWindow, 2>), grid, kPlaneThreads, shared, stream, pass, blocks,
               grads, from, partial);
    });
  });
  return blocks.slots();
}

}  // namespace fastconv::cuda
