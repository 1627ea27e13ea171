// Depthwise convolution in NHWC: forward with its epilogue, and the input gradient.
//
// A program (128 threads) has up to 64 vectors of channels and some items; a thread slides down a chunk of rows in two
// columns (cuda_slide.cuh), straight from global memory. A block turns the weights of its channels from [channel][tap]
// into rows of taps in shared memory once, from where each thread takes them into registers.
#include "cuda_support/launch.h"
#include "depthwise/cuda_channels.cuh"
#include "depthwise/cuda_launch.h"

namespace fastconv::cuda {
namespace {

/// The table in shared memory: a row of `width` channels for each tap, and one of shifts. The epilogue's scale goes
/// into the weights: one multiplication fewer per output, and one vector fewer in registers.
template <class Shape, class T>
__device__ __forceinline__ void fill_table(float* table, int width, const T* weight, int first, int channels, bool flip,
                                           const CudaEpilogue& epilogue) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  for (int i = thread; i < min(width, channels - first) * Shape::kTaps; i += threads) {
    const int channel = i / Shape::kTaps, tap = i % Shape::kTaps;
    const float value = to_float(weight[int64_t{first} * Shape::kTaps + i]);
    table[(flip ? Shape::kTaps - 1 - tap : tap) * width + channel] = value * scale_of(epilogue, first + channel);
  }
  for (int i = thread; i < min(width, channels - first); i += threads)
    table[Shape::kTaps * width + i] = shift_of(epilogue, first + i);
  __syncthreads();
}

template <class Shape>
__device__ __forceinline__ void load_weights(TapRegisters<Shape>& to, const float* table, int width) {
#pragma unroll
  for (int tap = 0; tap < Shape::kTaps; ++tap) {
    const Vector<float, Shape::kVector> row = load_vector<Shape::kVector>(table + tap * width);
#pragma unroll
    for (int v = 0; v < Shape::kVector; ++v) to[tap][v] = row[v];
  }
}

/// sum + shift + residual, activated, for the vector at `index` of the output; the scale is in the weights.
template <class T, int kV>
__device__ __forceinline__ Vector<T, kV> finish_vector(const FlatEpilogue& output, const float* shifts,
                                                       const float (&sum)[kV], int64_t index) {
  const Vector<float, kV> shift = load_vector<kV>(shifts);
  float result[kV];
#pragma unroll
  for (int v = 0; v < kV; ++v) result[v] = sum[v] + shift[v];
  if (output.residual != nullptr) {
    const Vector<T, kV> residual = load_vector<kV>(static_cast<const T*>(output.residual) + index);
#pragma unroll
    for (int v = 0; v < kV; ++v) result[v] += to_float(residual[v]);
  }
#pragma unroll
  for (int v = 0; v < kV; ++v) result[v] = output.clamp(result[v]);
  if (output.is_tanh) {  // one branch for the vector
#pragma unroll
    for (int v = 0; v < kV; ++v) result[v] = tanhf(result[v]);
  }
  return from_float<T>(result);
}

template <class T, int kWindow, int kStride, int kV>
__global__ void __launch_bounds__(kChannelThreads, channel_blocks_per_sm(kWindow))
    channels_forward(DepthwisePass pass, ChannelBlocks blocks, const T* x, const T* weight, T* y, CudaEpilogue epilogue,
                     FlatEpilogue output) {
  using Shape = SlideShape<kWindow, kStride, kV, channel_columns(kWindow, kStride)>;
  FASTCONV_DYNAMIC_SHARED(shared);
  float* table = reinterpret_cast<float*>(shared);
  const int width = blocks.tile * kV, channels = static_cast<int>(pass.channels);
  fill_table<Shape>(table, width, weight, static_cast<int>(blockIdx.y) * width, channels, pass.flip, epilogue);
  const int vector = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x), channel = vector * kV;
  if (vector >= blocks.vectors) return;
  table += threadIdx.x * kV;
  TapRegisters<Shape> taps;
  load_weights<Shape>(taps, table, width);
  const int64_t in_image = int64_t{pass.h.in} * pass.w.in * channels;
  const int64_t out_image = int64_t{pass.h.out} * pass.w.out * channels;
  const int64_t first = int64_t{blockIdx.x} * blockDim.y * blocks.per_thread + threadIdx.y;
  for (int i = 0; i < blocks.per_thread; ++i) {
    const int64_t index = first + int64_t{i} * blockDim.y;
    if (index >= blocks.items) return;
    const ChannelItem item(static_cast<uint32_t>(index), blocks, pass.h.positions);
    const int column = item.column * Shape::kColumns;
    const ChannelReader<T, kV, Shape::kReads> read(x + item.image * in_image + channel, channels, pass.w.in,
                                                   rows_read(pass.h, item.last, kStride, kWindow),
                                                   column * kStride - pass.w.pad);
    const int64_t image_at = item.image * out_image + channel;
    slide_forward<T, Shape>(taps, item.first, item.last, pass.h.pad, read, [&](int p, const auto& sum) {
#pragma unroll
      for (int q = 0; q < Shape::kColumns; ++q) {
        if (column + q >= pass.w.out) continue;
        const int64_t at = image_at + (p * pass.w.out + column + q) * channels;
        store_vector(y + at, finish_vector<T, kV>(output, table + Shape::kTaps * width, sum[q], at));
      }
    });
  }
}

template <class T, int kWindow, int kV>
__global__ void __launch_bounds__(kChannelThreads, channel_blocks_per_sm(kWindow))
    channels_input_grad(DepthwisePass pass, ChannelBlocks blocks, const T* grad_y, const T* weight, T* grad_x) {
  using Shape = SlideShape<kWindow, 2, kV>;
  FASTCONV_DYNAMIC_SHARED(shared);
  float* table = reinterpret_cast<float*>(shared);
  const int width = blocks.tile * kV, channels = static_cast<int>(pass.channels);
  fill_table<Shape>(table, width, weight, static_cast<int>(blockIdx.y) * width, channels, false, CudaEpilogue{});
  const int vector = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x), channel = vector * kV;
  if (vector >= blocks.vectors) return;
  TapRegisters<Shape> taps;
  load_weights<Shape>(taps, table + threadIdx.x * kV, width);
  const int64_t in_image = int64_t{pass.h.in} * pass.w.in * channels;
  const int64_t out_image = int64_t{pass.h.out} * pass.w.out * channels;
  const int64_t first = int64_t{blockIdx.x} * blockDim.y * blocks.per_thread + threadIdx.y;
  for (int i = 0; i < blocks.per_thread; ++i) {
    const int64_t index = first + int64_t{i} * blockDim.y;
    if (index >= blocks.items) return;
    const ChannelItem item(static_cast<uint32_t>(index), blocks, pass.h.positions);
    const ChannelReader<T, kV, Shape::kLive> read(grad_y + item.image * in_image + channel, channels, pass.w.in,
                                                  rows_read(pass.h, item.last, 1, Shape::kLive),
                                                  item.column - pass.w.pad);
    T* image = grad_x + item.image * out_image + channel;
    const int column = pass.w.origin + 2 * item.column;
    slide_input_grad<T, Shape>(taps, item.first, item.last, pass.h.pad, read, [&](int cell, const auto& sum) {
#pragma unroll
      for (int a = 0; a < 2; ++a) {
        const int h = pass.h.origin + 2 * cell + a;
        if (static_cast<unsigned>(h) >= static_cast<unsigned>(pass.h.out)) continue;
#pragma unroll
        for (int b = 0; b < 2; ++b)
          if (static_cast<unsigned>(column + b) < static_cast<unsigned>(pass.w.out))
            store_vector(image + (h * pass.w.out + column + b) * channels, from_float<T>(sum[a][b]));
      }
    });
  }
}

template <class T, int kWindow, int kV>
void run_vectors(const DepthwisePass& pass, const T* x, const T* weight, T* y, const CudaEpilogue& epilogue,
                 cudaStream_t stream) {
  const int64_t columns = ceil_div(pass.w.positions, pass.cells ? 1 : channel_columns(kWindow, pass.step));
  const ChannelBlocks blocks = divide_channels(pass.images, pass.channels, pass.h.positions, columns, kV);
  const size_t shared = size_t{kWindow * kWindow + 1} * blocks.tile * kV * sizeof(float);
  if (pass.cells)
    launch(FASTCONV_KERNEL(channels_input_grad<T, kWindow, kV>), blocks.grid(), blocks.block(), shared, stream, pass,
           blocks, x, weight, y);
  else if (pass.step == 1)
    launch(FASTCONV_KERNEL(channels_forward<T, kWindow, 1, kV>), blocks.grid(), blocks.block(), shared, stream, pass,
           blocks, x, weight, y, epilogue, FlatEpilogue(epilogue));
  else
    launch(FASTCONV_KERNEL(channels_forward<T, kWindow, 2, kV>), blocks.grid(), blocks.block(), shared, stream, pass,
           blocks, x, weight, y, epilogue, FlatEpilogue(epilogue));
}

}  // namespace

void run_channels(const DepthwisePass& pass, const void* x, const void* weight, void* y, const CudaEpilogue& epilogue,
                  cudaStream_t stream) {
  dispatch_element("depthwise convolution", pass.dtype, [&](auto element) {
    using T = decltype(element);
    dispatch_window(pass.window, [&](auto window) {
      constexpr int kWindow = decltype(window)::value, kV = kChannelVector<T, kWindow>, kSize = sizeof(T);
      const T *from = static_cast<const T*>(x), *filters = static_cast<const T*>(weight);
      const bool vectors = is_aligned(x, pass.channels, kSize, kV * kSize) &&
                           is_aligned(y, pass.channels, kSize, kV * kSize) &&
                           is_aligned(epilogue.residual, pass.channels, kSize, kV * kSize);
      if (vectors) run_vectors<T, kWindow, kV>(pass, from, filters, static_cast<T*>(y), epilogue, stream);
      else run_vectors<T, kWindow, 1>(pass, from, filters, static_cast<T*>(y), epilogue, stream);
    });
  });
}

}  // namespace fastconv::cuda
