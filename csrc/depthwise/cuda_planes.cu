// Depthwise convolution in NCHW: forward with its epilogue, and the input gradient.
//
// A program (256 threads) brings planes to shared memory (cuda_planes.cuh) and computes all their outputs; a thread
// slides down a chunk of rows in two columns (cuda_slide.cuh). Weights, at most 49 numbers, stay in its registers.
#include "cuda_support/launch.h"
#include "depthwise/cuda_launch.h"
#include "depthwise/cuda_planes.cuh"

namespace fastconv::cuda {
namespace {

/// The channel's weights, times `scale`: one multiplication fewer per output.
template <class Shape, class T>
__device__ __forceinline__ void load_weights(TapRegisters<Shape>& to, const T* weight, int channel, bool flip,
                                             float scale) {
  const T* filter = weight + int64_t{channel} * Shape::kTaps;
#pragma unroll
  for (int tap = 0; tap < Shape::kTaps; ++tap)
    to[tap][0] = to_float(filter[flip ? Shape::kTaps - 1 - tap : tap]) * scale;
}

/// Writes two neighbouring elements, `column` and the next, of a row of `width`. pairs: both exist and are aligned.
template <class T>
__device__ __forceinline__ void store_pair(T* row, int column, int width, bool pairs, T left, T right) {
  if (pairs) {
    Vector<T, 2> both;
    both[0] = left, both[1] = right;
    store_vector(row + column, both);
    return;
  }
  if (column >= 0 && column < width) row[column] = left;
  if (column + 1 < width) row[column + 1] = right;
}

/// Brings the rows that a block reads of its planes to shared memory, and returns where they are.
template <class T>
__device__ __forceinline__ const T* stage_planes(unsigned char* shared, const T* x, const PlaneRange& range,
                                                 const DepthwisePass& pass) {
  const int in_plane = pass.h.in * pass.w.in;
  const int count = (range.planes - 1) * in_plane + (range.read_end - range.read_begin) * pass.w.in;
  const T* tile = stage(shared, x + range.first_plane * in_plane + range.read_begin * pass.w.in, count);
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<0>();
  __syncthreads();
  return tile;
}

template <class T, int kWindow, int kStride>
__global__ void __launch_bounds__(kPlaneThreads)
    planes_forward(DepthwisePass pass, PlaneBlocks blocks, bool pairs, const T* x, const T* weight, T* y,
                   CudaEpilogue epilogue, FlatEpilogue output) {
  using Shape = SlideShape<kWindow, kStride, 1>;
  FASTCONV_DYNAMIC_SHARED(shared);
  const PlaneRange range(blocks, pass);
  const int in_plane = pass.h.in * pass.w.in;
  const T* tile = stage_planes(shared, x, range, pass);
  const int items = range.planes * static_cast<int>(blocks.chunks.divisor * blocks.columns.divisor);
  for (int index = threadIdx.x; index < items; index += kPlaneThreads) {
    const PlaneItem item(index, blocks, range);
    TapRegisters<Shape> taps;
    load_weights<Shape>(taps, weight, item.channel, pass.flip, scale_of(epilogue, item.channel));
    const float shift = shift_of(epilogue, item.channel);
    const int column = item.column * Shape::kColumns;
    const PlaneReader<T, Shape::kReads> read(tile, item.plane * in_plane - range.read_begin * pass.w.in, pass.w.in,
                                             range.read_end, column * kStride - pass.w.pad);
    const int64_t plane_at = (range.first_plane + item.plane) * (int64_t{pass.h.out} * pass.w.out);
    slide_forward<T, Shape>(taps, item.first, item.last, pass.h.pad, read, [&](int p, const auto& sum) {
      const int64_t at = plane_at + p * pass.w.out;
      const T left = output.finish<T>(sum[0][0] + shift, at + column);
      const T right = output.finish<T>(sum[1][0] + shift, at + min(column + 1, pass.w.out - 1));
      store_pair(y + at, column, pass.w.out, pairs, left, right);
    });
  }
}

template <class T, int kWindow>
__global__ void __launch_bounds__(kPlaneThreads)
    planes_input_grad(DepthwisePass pass, PlaneBlocks blocks, bool pairs, const T* grad_y, const T* weight, T* grad_x) {
  using Shape = SlideShape<kWindow, 2, 1>;
  FASTCONV_DYNAMIC_SHARED(shared);
  const PlaneRange range(blocks, pass);
  const int in_plane = pass.h.in * pass.w.in;
  const T* tile = stage_planes(shared, grad_y, range, pass);
  const int items = range.planes * static_cast<int>(blocks.chunks.divisor * blocks.columns.divisor);
  for (int index = threadIdx.x; index < items; index += kPlaneThreads) {
    const PlaneItem item(index, blocks, range);
    TapRegisters<Shape> taps;
    load_weights<Shape>(taps, weight, item.channel, false, 1.0f);
    const PlaneReader<T, Shape::kLive> read(tile, item.plane * in_plane - range.read_begin * pass.w.in, pass.w.in,
                                            range.read_end, item.column - pass.w.pad);
    T* plane = grad_x + (range.first_plane + item.plane) * (int64_t{pass.h.out} * pass.w.out);
    const int column = pass.w.origin + 2 * item.column;
    slide_input_grad<T, Shape>(taps, item.first, item.last, pass.h.pad, read, [&](int cell, const auto& sum) {
#pragma unroll
      for (int a = 0; a < 2; ++a) {
        const int h = pass.h.origin + 2 * cell + a;
        if (static_cast<unsigned>(h) < static_cast<unsigned>(pass.h.out))
          store_pair(plane + int64_t{h} * pass.w.out, column, pass.w.out, pairs, from_float<T>(sum[a][0][0]),
                     from_float<T>(sum[a][1][0]));
      }
    });
  }
}

}  // namespace

void run_planes(const DepthwisePass& pass, const void* x, const void* weight, void* y, const CudaEpilogue& epilogue,
                cudaStream_t stream) {
  const int64_t size = element_bytes(pass.dtype), row_bytes = pass.w.in * size;
  const int columns = pass.cells ? pass.w.positions : static_cast<int>(ceil_div(pass.w.positions, 2));
  const PlaneBlocks blocks = divide_planes(pass, columns, row_bytes, kPlaneBytes);
  const int64_t shared = blocks.planes * staged_rows(pass, blocks) * row_bytes + 16;
  const bool pairs = pass.w.out % 2 == 0 && pass.w.origin == 0 && is_aligned(y, 2, size, 2 * size);
  dispatch_element("depthwise convolution", pass.dtype, [&](auto element) {
    using T = decltype(element);
    dispatch_window(pass.window, [&](auto window) {
      constexpr int kWindow = decltype(window)::value;
      const T *from = static_cast<const T*>(x), *filters = static_cast<const T*>(weight);
      T* to = static_cast<T*>(y);
      if (pass.cells)
        launch(FASTCONV_KERNEL(planes_input_grad<T, kWindow>), blocks.grid(), kPlaneThreads, shared, stream, pass,
               blocks, pairs, from, filters, to);
      else if (pass.step == 1)
        launch(FASTCONV_KERNEL(planes_forward<T, kWindow, 1>), blocks.grid(), kPlaneThreads, shared, stream, pass,
               blocks, pairs, from, filters, to, epilogue, FlatEpilogue(epilogue));
      else
        launch(FASTCONV_KERNEL(planes_forward<T, kWindow, 2>), blocks.grid(), kPlaneThreads, shared, stream, pass,
               blocks, pairs, from, filters, to, epilogue, FlatEpilogue(epilogue));
    });
  });
}

}  // namespace fastconv::cuda
