// Max pooling's gradient: picks the kernel.
#include "cuda_support/launchers.h"
#include "pool/cuda_max_backward.cuh"
#include "pool/cuda_pool.h"
#include "pool/cuda_select.h"

namespace fastconv::cuda {
namespace {

template <int N, class T, class Offset>
void backward_general(const PoolProblem& p, const T* grad, const Offset* offsets, T* grad_input, cudaStream_t stream) {
  const PoolShape g(p);
  const Covering rows(p.r, p.p(), p.padding.h, p.stride.h, p.dilation.h);
  const Covering columns(p.s, p.q(), p.padding.w, p.stride.w, p.dilation.w);
  for_each_slice(outer_items(p), p.h, p.w, inner_channels(p) / N, [&](int64_t first, const Units& units) {
    launch(FASTCONV_KERNEL(max_backward_general_kernel<Offset, N, T>), grid_of(units), kUnitThreads, 0, stream, g,
           units, rows, columns, grad + first * g.output_outer, offsets + first * g.output_outer,
           grad_input + first * g.input_outer);
  });
}

template <int N, int kWindow, int kPad, class T>
void backward_square(const PoolProblem& p, const T* grad, const uint8_t* offsets, T* grad_input, cudaStream_t stream) {
  const PoolShape g(p);
  const bool paired = N == 1 && p.w % 2 == 0 && aligned(grad_input, 2 * sizeof(T));
  for_each_slice(outer_items(p), ceil_div(p.h, 2 * square_rows(N)), ceil_div(p.w, 2), inner_channels(p) / N,
                 [&](int64_t first, const Units& units) {
                   launch(FASTCONV_KERNEL(max_backward_square_kernel<N, kWindow, kPad, T>), grid_of(units),
                          kUnitThreads, 0, stream, g, units, paired, grad + first * g.output_outer,
                          offsets + first * g.output_outer, grad_input + first * g.input_outer);
                 });
}

template <int kWindow, class T>
void backward_rows(const PoolProblem& p, const T* grad, const uint8_t* offsets, T* grad_input, cudaStream_t stream) {
  const PoolShape g(p);
  for_each_slice(outer_items(p), ceil_div(p.h, 2), p.w / kVectorElements<T>, 1, [&](int64_t first, const Units& units) {
    launch(FASTCONV_KERNEL(max_backward_rows_kernel<kWindow, T>), grid_of(units), kUnitThreads, 0, stream, g, units,
           grad + first * g.output_outer, offsets + first * g.output_outer, grad_input + first * g.input_outer);
  });
}

template <int N, class T>
void backward_square(const PoolProblem& p, const T* grad, const uint8_t* offsets, T* grad_input, cudaStream_t stream) {
  if (p.r == 2 && p.padding.h == 0) return backward_square<N, 2, 0>(p, grad, offsets, grad_input, stream);
  if (p.r == 2) return backward_square<N, 2, 1>(p, grad, offsets, grad_input, stream);
  if (p.padding.h == 0) return backward_square<N, 3, 0>(p, grad, offsets, grad_input, stream);
  return backward_square<N, 3, 1>(p, grad, offsets, grad_input, stream);
}

template <class T>
void backward(const PoolProblem& p, const T* grad, const void* offsets, T* grad_input, cudaStream_t stream) {
  constexpr int kLanes = kVectorElements<T>;
  if (!offsets_fit_byte(p))
    return backward_general<1>(p, grad, static_cast<const int32_t*>(offsets), grad_input, stream);
  const auto* bytes = static_cast<const uint8_t*>(offsets);
  const PoolChoice choice = choose_max(p, grad_input, grad, offsets);
  switch (choice.path) {
    case PoolPath::rows:
      if (choice.window == 2) return backward_rows<2>(p, grad, bytes, grad_input, stream);
      return backward_rows<3>(p, grad, bytes, grad_input, stream);
    case PoolPath::square:
      if (choice.vectors) return backward_square<kLanes>(p, grad, bytes, grad_input, stream);
      return backward_square<1>(p, grad, bytes, grad_input, stream);
    case PoolPath::general:
      if (choice.vectors) return backward_general<kLanes>(p, grad, bytes, grad_input, stream);
      return backward_general<1>(p, grad, bytes, grad_input, stream);
  }
  throw std::logic_error("max_pool2d_backward: unknown kernel");
}

}  // namespace

void launch_max_pool2d_backward(const PoolProblem& p, const void* grad, const void* offsets, void* grad_input,
                                cudaStream_t stream) {
  dispatch_element("max_pool2d_backward", p.dtype, [&](auto element) {
    using T = decltype(element);
    backward(p, static_cast<const T*>(grad), offsets, static_cast<T*>(grad_input), stream);
  });
}

FASTCONV_LAUNCHER("max_pool2d_backward", "windows", launch_max_pool2d_backward);

}  // namespace fastconv::cuda
