// Average and adaptive pooling and their gradients: pick the kernel.
#include <cmath>
#include <cstdio>

#include "cuda_support/launchers.h"
#include "pool/cuda_average.cuh"
#include "pool/cuda_pool.h"
#include "pool/cuda_select.h"

namespace fastconv::cuda {
namespace {

AverageGrid grid(const PoolProblem& p, const AverageLine& rows, const AverageLine& columns, double divisor) {
  const int64_t pixel = inner_channels(p), input_row = p.w * pixel, output_row = columns.positions * pixel;
  return {rows,       columns,         static_cast<int>(pixel),     input_row,
          output_row, p.h * input_row, rows.positions * output_row, static_cast<float>(divisor)};
}

AverageGrid regular_grid(const PoolProblem& p, bool count_include_pad, double divisor) {
  return grid(p, AverageLine::regular(p.h, p.p(), p.r, p.stride.h, p.padding.h, count_include_pad),
              AverageLine::regular(p.w, p.q(), p.s, p.stride.w, p.padding.w, count_include_pad), divisor);
}

AverageGrid adaptive_grid(const PoolProblem& p, int64_t rows, int64_t columns) {
  return grid(p, AverageLine::adapting(p.h, rows), AverageLine::adapting(p.w, columns), 0);
}

/// Every window a whole 2 x 2 of the input, and the divisor, 4 or the override, a power of two.
bool is_halving(const PoolProblem& p, double divisor) {
  int exponent;
  const double mantissa = std::frexp(divisor == 0 ? 4 : divisor, &exponent);
  return unrolled_window(p) == 2 && windows_are_inside(p) && (mantissa == 0.5 || mantissa == -0.5);
}

template <int N, class T>
void average(const PoolProblem& p, const AverageGrid& g, bool square, const T* x, T* y, cudaStream_t stream) {
  for_each_slice(outer_items(p), g.rows.positions, g.columns.positions, inner_channels(p) / N,
                 [&](int64_t first, const Units& units) {
                   const auto kernel = square ? FASTCONV_KERNEL(average_square_kernel<N, T>)
                                              : FASTCONV_KERNEL(average_general_kernel<N, T>);
                   launch(kernel, grid_of(units), kUnitThreads, 0, stream, g, units, x + first * g.input_outer,
                          y + first * g.output_outer);
                 });
}

template <int N, class T>
void average_backward(const PoolProblem& p, const AverageGrid& g, bool square, const T* grad, T* grad_input,
                      cudaStream_t stream) {
  const int64_t rows = square ? ceil_div(p.h, 2) : p.h, columns = square ? ceil_div(p.w, 2) : p.w;
  for_each_slice(outer_items(p), rows, columns, inner_channels(p) / N, [&](int64_t first, const Units& units) {
    const auto kernel = square ? FASTCONV_KERNEL(average_backward_square_kernel<N, T>)
                               : FASTCONV_KERNEL(average_backward_general_kernel<N, T>);
    launch(kernel, grid_of(units), kUnitThreads, 0, stream, g, units, grad + first * g.output_outer,
           grad_input + first * g.input_outer);
  });
}

/// body(T{}, N): the element and how many channels a thread takes.
template <class Body>
void for_vectors(const char* op, const PoolProblem& p, bool vectors, const Body& body) {
  dispatch_element(op, p.dtype, [&](auto element) {
    using T = decltype(element);
    if (vectors) body(T{}, std::integral_constant<int, kVectorElements<T>>{});
    else body(T{}, std::integral_constant<int, 1>{});
  });
}

/// The unrolled kernels multiply.
AverageGrid grid_for(const PoolChoice& choice, AverageGrid g) {
  if (choice.path == PoolPath::square) g.divisor = g.divisor == 0 ? 0.25f : 1 / g.divisor;
  return g;
}

void forward(const char* op, const PoolProblem& p, const AverageGrid& g, bool halving, const void* x, void* y,
             cudaStream_t stream) {
  const PoolChoice choice = choose_average(p, halving, x, y);
  for_vectors(op, p, choice.vectors, [&](auto element, auto lanes) {
    using T = decltype(element);
    average<lanes.value>(p, grid_for(choice, g), choice.path == PoolPath::square, static_cast<const T*>(x),
                         static_cast<T*>(y), stream);
  });
}

void backward(const char* op, const PoolProblem& p, const AverageGrid& g, bool halving, const void* grad,
              void* grad_input, cudaStream_t stream) {
  const PoolChoice choice = choose_average(p, halving, grad_input, grad);
  for_vectors(op, p, choice.vectors, [&](auto element, auto lanes) {
    using T = decltype(element);
    average_backward<lanes.value>(p, grid_for(choice, g), choice.path == PoolPath::square, static_cast<const T*>(grad),
                                  static_cast<T*>(grad_input), stream);
  });
}

}  // namespace

void launch_avg_pool2d(const PoolProblem& p, bool count_include_pad, double divisor_override, const void* x, void* y,
                       cudaStream_t stream) {
  forward("avg_pool2d", p, regular_grid(p, count_include_pad, divisor_override), is_halving(p, divisor_override), x, y,
          stream);
}

void launch_avg_pool2d_backward(const PoolProblem& p, bool count_include_pad, double divisor_override, const void* grad,
                                void* grad_input, cudaStream_t stream) {
  backward("avg_pool2d_backward", p, regular_grid(p, count_include_pad, divisor_override),
           is_halving(p, divisor_override), grad, grad_input, stream);
}

void launch_adaptive_avg_pool2d(const PoolProblem& p, int64_t rows, int64_t columns, const void* x, void* y,
                                cudaStream_t stream) {
  forward("adaptive_avg_pool2d", p, adaptive_grid(p, rows, columns), false, x, y, stream);
}

void launch_adaptive_avg_pool2d_backward(const PoolProblem& p, int64_t rows, int64_t columns, const void* grad,
                                         void* grad_input, cudaStream_t stream) {
  backward("adaptive_avg_pool2d_backward", p, adaptive_grid(p, rows, columns), false, grad, grad_input, stream);
}

void explain_avg_pool2d(const PoolProblem& p, double divisor_override, const void* wide, const void* narrow, void* text,
                        int64_t bytes) {
  const std::string reason = describe(choose_average(p, is_halving(p, divisor_override), wide, narrow));
  std::snprintf(static_cast<char*>(text), static_cast<size_t>(bytes), "%s", reason.c_str());
}

FASTCONV_LAUNCHER("avg_pool2d", "windows", launch_avg_pool2d);
FASTCONV_LAUNCHER("avg_pool2d_backward", "windows", launch_avg_pool2d_backward);
FASTCONV_LAUNCHER("explain_avg_pool2d", "windows", explain_avg_pool2d);
FASTCONV_LAUNCHER("adaptive_avg_pool2d", "windows", launch_adaptive_avg_pool2d);
FASTCONV_LAUNCHER("adaptive_avg_pool2d_backward", "windows", launch_adaptive_avg_pool2d_backward);

}  // namespace fastconv::cuda
