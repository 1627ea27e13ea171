// Host functions of the pooling ops on any device: check the operands, describe the problem, allocate the result. What
// is left to a device (cpu.cpp, cuda.cpp) is a class with
//
//   max_pool(problem, x, y, offsets or null)             and max_indices, max_gather, max_backward
//   average(problem, count_include_pad, divisor_override or 0, x, y), average_backward
//   adaptive(problem, output size, x, y)                 and adaptive_backward: only sizes, layout and dtype count
//   global_average(problem, x, y)                        and global_average_backward: likewise
//
// All tensors that it gets are dense in the problem's layout, on one device, and none of them is empty, but for the
// operand of a global average.
#pragma once

#include <optional>
#include <tuple>
#include <utility>

#include "common/checks.h"
#include "pool/pool.h"

namespace fastconv {

/// Window, stride, padding and dilation, checked; shapes are still to come.
inline PoolProblem pool_problem(const char* op, const IntList& kernel, const IntList& stride, const IntList& padding,
                                const IntList& dilation, bool ceil_mode) {
  PoolProblem p{};
  const Size2 window = size2(op, "kernel", kernel, 1);
  p.r = window.h, p.s = window.w;
  p.stride = size2(op, "stride", stride, 1);
  p.padding = size2(op, "padding", padding, 0);
  p.dilation = size2(op, "dilation", dilation, 1);
  p.ceil_mode = ceil_mode;
  require(p.padding.h <= p.r / 2 && p.padding.w <= p.s / 2, op, ": padding is (", p.padding.h, ", ", p.padding.w,
          "), expected at most half of the kernel, (", p.r / 2, ", ", p.s / 2,
          "); pad the input itself with torch.nn.functional.pad for more");
  return p;
}

inline void set_input(const char* op, PoolProblem& p, int64_t n, int64_t c, int64_t h, int64_t w) {
  p.n = n, p.c = c, p.h = h, p.w = w;
  require(c > 0 && h > 0 && w > 0, op, ": input has shape (", n, ", ", c, ", ", h, ", ", w,
          "), expected channels, height and width of at least 1; only the batch may be empty");
  require(p.p() >= 1 && p.q() >= 1, op, ": the window spans ", p.dilation.h * (p.r - 1) + 1, " x ",
          p.dilation.w * (p.s - 1) + 1, ", more than the padded input, ", h + 2 * p.padding.h, " x ",
          w + 2 * p.padding.w, "; use a smaller kernel or dilation, or more padding");
  // A step beyond the padded input leaves one window, whatever its length; kernels size their copies by it.
  p.stride.h = min_of(p.stride.h, h + 2 * p.padding.h + 1);
  p.stride.w = min_of(p.stride.w, w + 2 * p.padding.w + 1);
}

inline torch::headeronly::ScalarType offset_type(const PoolProblem& p) {
  return offsets_fit_byte(p) ? torch::headeronly::ScalarType::Byte : torch::headeronly::ScalarType::Int;
}

/// The problem of an input of four dimensions.
inline void set_input(const char* op, PoolProblem& p, const Tensor& input) {
  require_rank(op, "input", input, 4);
  p.dtype = dtype_of(op, input);
  p.layout = layout_of(input);
  set_input(op, p, input.size(0), input.size(1), input.size(2), input.size(3));
}

/// The problem whose offsets these are: their shape and dtype, checked against the input's size.
inline void set_offsets(const char* op, PoolProblem& p, const Tensor& offsets, int64_t h, int64_t w) {
  require_rank(op, "offsets", offsets, 4);
  require(offsets.scalar_type() == offset_type(p), op, ": offsets have the wrong dtype for a window of ", p.r * p.s,
          " taps, expected ", offsets_fit_byte(p) ? "uint8" : "int32", "; pass what max_pool2d_with_offsets returned");
  p.layout = layout_of(offsets);
  // The offsets' own size tells whether ceil_mode was on.
  p.n = offsets.size(0), p.c = offsets.size(1), p.h = h, p.w = w;
  p.ceil_mode = p.p() != offsets.size(2) || p.q() != offsets.size(3);
  set_input(op, p, offsets.size(0), offsets.size(1), h, w);
  require_shape(op, "offsets", offsets, {p.n, p.c, p.p(), p.q()});
}

inline double checked_divisor(const char* op, const std::optional<int64_t>& divisor_override) {
  require(!divisor_override || *divisor_override != 0, op,
          ": divisor_override is 0, expected another number; pass None to divide by the window's size");
  return divisor_override ? static_cast<double>(*divisor_override) : 0;
}

/// A window that is the whole input is the global kernel's case.
inline bool is_global(const PoolProblem& p, double divisor_override) {
  return divisor_override == 0 && p.r == p.h && p.s == p.w && p.padding.h == 0 && p.padding.w == 0;
}

/// A 1 x 1 output may average nothing at all (the mean of no elements is NaN); other grids need elements.
inline void require_elements(const char* op, Size2 input, Size2 output) {
  require((input.h > 0 && input.w > 0) || (output.h == 1 && output.w == 1), op, ": the input's plane is ", input.h,
          " x ", input.w, ", expected a height and width of at least 1");
}

/// The short way leaves empty tensors to the long one: torch treats them case by case.
inline void require_filled(const Tensor& input) {
  require(input.numel() > 0, "fastconv: the input is empty; call the operator's default overload");
}

/// The pair at `index` of a window's numbers, which travel as one list.
inline IntList pair_of(const IntList& window, int64_t index, int64_t pairs) {
  require(std::ssize(window) == 2 * pairs, "fastconv: window has ", window.size(), " values, expected ", 2 * pairs);
  return {window.begin() + 2 * index, window.begin() + 2 * index + 2};
}

template <class Device>
struct PoolOps {
  // ---------------------------------------------------------------- max

  static Tensor max_pool2d(const Tensor& input, IntList kernel, IntList stride, IntList padding, IntList dilation,
                           bool ceil_mode) {
    const char* op = "max_pool2d";
    PoolProblem p = pool_problem(op, kernel, stride, padding, dilation, ceil_mode);
    set_input(op, p, input);
    const Tensor x = dense(input, p.layout);
    Tensor output = empty_output(input, p.n, p.c, p.p(), p.q(), p.layout);
    if (output.numel() != 0) Device::max_pool(p, x, output, nullptr);
    return output;
  }

  static std::tuple<Tensor, Tensor> max_pool2d_with_offsets(const Tensor& input, IntList kernel, IntList stride,
                                                            IntList padding, IntList dilation, bool ceil_mode) {
    const char* op = "max_pool2d_with_offsets";
    PoolProblem p = pool_problem(op, kernel, stride, padding, dilation, ceil_mode);
    set_input(op, p, input);
    require(p.r * p.s <= INT32_MAX, op, ": a window of ", p.r, " x ", p.s,
            " has more taps than int32 offsets can number; use a smaller kernel");
    const Tensor x = dense(input, p.layout);
    Tensor output = empty_output(input, p.n, p.c, p.p(), p.q(), p.layout);
    Tensor offsets = empty_output(input, offset_type(p), p.n, p.c, p.p(), p.q(), p.layout);
    if (output.numel() != 0) Device::max_pool(p, x, output, &offsets);
    return {output, offsets};
  }

  static Tensor max_pool2d_indices(const Tensor& offsets, IntList input_size, IntList kernel, IntList stride,
                                   IntList padding, IntList dilation) {
    const char* op = "max_pool2d_indices";
    PoolProblem p = pool_problem(op, kernel, stride, padding, dilation, false);
    const Size2 size = size2(op, "input_size", input_size, 1, INT64_MAX);
    set_offsets(op, p, offsets, size.h, size.w);
    const Tensor taps = dense(offsets, p.layout);
    Tensor indices = empty_output(offsets, torch::headeronly::ScalarType::Long, p.n, p.c, p.p(), p.q(), p.layout);
    if (indices.numel() != 0) Device::max_indices(p, taps, indices);
    return indices;
  }

  static Tensor max_pool2d_gather(const Tensor& input, const Tensor& offsets, IntList kernel, IntList stride,
                                  IntList padding, IntList dilation) {
    const char* op = "max_pool2d_gather";
    PoolProblem p = pool_problem(op, kernel, stride, padding, dilation, false);
    require_rank(op, "input", input, 4);
    require_same_device(op, input, "offsets", offsets);
    p.dtype = dtype_of(op, input);
    set_offsets(op, p, offsets, input.size(2), input.size(3));
    require_shape(op, "input", input, {p.n, p.c, p.h, p.w});
    const Tensor x = dense(input, p.layout), taps = dense(offsets, p.layout);
    Tensor output = empty_output(input, p.n, p.c, p.p(), p.q(), p.layout);
    if (output.numel() != 0) Device::max_gather(p, x, taps, output);
    return output;
  }

  static Tensor max_pool2d_backward(const Tensor& grad_output, const Tensor& offsets, IntList input_size,
                                    IntList kernel, IntList stride, IntList padding, IntList dilation) {
    const char* op = "max_pool2d_backward";
    PoolProblem p = pool_problem(op, kernel, stride, padding, dilation, false);
    require_rank(op, "grad_output", grad_output, 4);
    require_same_device(op, grad_output, "offsets", offsets);
    p.dtype = dtype_of(op, grad_output);
    const Size2 size = size2(op, "input_size", input_size, 1, INT64_MAX);
    set_offsets(op, p, offsets, size.h, size.w);
    require_shape(op, "grad_output", grad_output, {p.n, p.c, p.p(), p.q()});
    const Tensor grad = dense(grad_output, p.layout), taps = dense(offsets, p.layout);
    Tensor grad_input = empty_output(grad_output, p.n, p.c, p.h, p.w, p.layout);
    if (grad_input.numel() != 0) Device::max_backward(p, grad, taps, grad_input);
    return grad_input;
  }

  // ---------------------------------------------------------------- average

  static Tensor avg_pool2d(const Tensor& input, IntList kernel, IntList stride, IntList padding, bool ceil_mode,
                           bool count_include_pad, std::optional<int64_t> divisor_override) {
    const char* op = "avg_pool2d";
    PoolProblem p = pool_problem(op, kernel, stride, padding, {1, 1}, ceil_mode);
    const double divisor = checked_divisor(op, divisor_override);
    set_input(op, p, input);
    const Tensor x = dense(input, p.layout);
    Tensor output = empty_output(input, p.n, p.c, p.p(), p.q(), p.layout);
    if (output.numel() == 0) return output;
    if (is_global(p, divisor)) Device::global_average(p, x, output);
    else Device::average(p, count_include_pad, divisor, x, output);
    return output;
  }

  static Tensor avg_pool2d_backward(const Tensor& grad_output, IntList input_size, IntList kernel, IntList stride,
                                    IntList padding, bool ceil_mode, bool count_include_pad,
                                    std::optional<int64_t> divisor_override) {
    const char* op = "avg_pool2d_backward";
    PoolProblem p = pool_problem(op, kernel, stride, padding, {1, 1}, ceil_mode);
    const double divisor = checked_divisor(op, divisor_override);
    require_rank(op, "grad_output", grad_output, 4);
    p.dtype = dtype_of(op, grad_output);
    p.layout = layout_of(grad_output);
    const Size2 size = size2(op, "input_size", input_size, 1, INT64_MAX);
    set_input(op, p, grad_output.size(0), grad_output.size(1), size.h, size.w);
    require_shape(op, "grad_output", grad_output, {p.n, p.c, p.p(), p.q()});
    const Tensor grad = dense(grad_output, p.layout);
    Tensor grad_input = empty_output(grad_output, p.n, p.c, p.h, p.w, p.layout);
    if (grad_input.numel() == 0) return grad_input;
    if (is_global(p, divisor)) Device::global_average_backward(p, grad, grad_input);
    else Device::average_backward(p, count_include_pad, divisor, grad, grad_input);
    return grad_input;
  }

  /// Of an adaptive pool only the sizes count.
  static PoolProblem adaptive_problem(const char* op, const Tensor& tensor, const char* name) {
    require_rank(op, name, tensor, 4);
    PoolProblem p{};
    p.dtype = dtype_of(op, tensor);
    p.layout = layout_of(tensor);
    p.n = tensor.size(0), p.c = tensor.size(1);
    return p;
  }

  static Tensor adaptive_avg_pool2d(const Tensor& input, IntList output_size) {
    const char* op = "adaptive_avg_pool2d";
    PoolProblem p = adaptive_problem(op, input, "input");
    p.h = input.size(2), p.w = input.size(3);
    const Size2 out = size2(op, "output_size", output_size, 0, INT64_MAX);
    require_elements(op, {p.h, p.w}, out);
    const Tensor x = dense(input, p.layout);
    Tensor output = empty_output(input, p.n, p.c, out.h, out.w, p.layout);
    if (output.numel() == 0) return output;
    if (out.h == 1 && out.w == 1) Device::global_average(p, x, output);
    else Device::adaptive(p, out, x, output);
    return output;
  }

  static Tensor adaptive_avg_pool2d_backward(const Tensor& grad_output, IntList input_size) {
    const char* op = "adaptive_avg_pool2d_backward";
    PoolProblem p = adaptive_problem(op, grad_output, "grad_output");
    const Size2 in = size2(op, "input_size", input_size, 0, INT64_MAX);
    const Size2 out{grad_output.size(2), grad_output.size(3)};
    p.h = in.h, p.w = in.w;
    require_elements(op, in, out);
    const Tensor grad = dense(grad_output, p.layout);
    Tensor grad_input = empty_output(grad_output, p.n, p.c, in.h, in.w, p.layout);
    if (grad_input.numel() == 0) return grad_input;
    if (grad.numel() == 0) torch::stable::zero_(grad_input);
    else if (out.h == 1 && out.w == 1) Device::global_average_backward(p, grad, grad_input);
    else Device::adaptive_backward(p, out, grad, grad_input);
    return grad_input;
  }

  // ---------------------------------------------------------------- the short way

  static Tensor max_pool2d_eager(const Tensor& input, IntList window, bool ceil_mode) {
    require_filled(input);
    const auto pair = [&](int64_t index) { return pair_of(window, index, 4); };
    return max_pool2d(input, pair(0), pair(1), pair(2), pair(3), ceil_mode);
  }

  static Tensor avg_pool2d_eager(const Tensor& input, IntList window, bool ceil_mode, bool count_include_pad,
                                 std::optional<int64_t> divisor_override) {
    require_filled(input);
    const auto pair = [&](int64_t index) { return pair_of(window, index, 3); };
    return avg_pool2d(input, pair(0), pair(1), pair(2), ceil_mode, count_include_pad, divisor_override);
  }

  static Tensor adaptive_avg_pool2d_eager(const Tensor& input, IntList output_size) {
    require_filled(input);
    return adaptive_avg_pool2d(input, std::move(output_size));
  }

  template <class Library>
  static void add_to(Library& m) {
    m.impl("max_pool2d", TORCH_BOX(&PoolOps::max_pool2d));
    m.impl("max_pool2d.eager", TORCH_BOX(&PoolOps::max_pool2d_eager));
    m.impl("max_pool2d_with_offsets", TORCH_BOX(&PoolOps::max_pool2d_with_offsets));
    m.impl("max_pool2d_indices", TORCH_BOX(&PoolOps::max_pool2d_indices));
    m.impl("max_pool2d_gather", TORCH_BOX(&PoolOps::max_pool2d_gather));
    m.impl("max_pool2d_backward", TORCH_BOX(&PoolOps::max_pool2d_backward));
    m.impl("avg_pool2d", TORCH_BOX(&PoolOps::avg_pool2d));
    m.impl("avg_pool2d.eager", TORCH_BOX(&PoolOps::avg_pool2d_eager));
    m.impl("avg_pool2d_backward", TORCH_BOX(&PoolOps::avg_pool2d_backward));
    m.impl("adaptive_avg_pool2d", TORCH_BOX(&PoolOps::adaptive_avg_pool2d));
    m.impl("adaptive_avg_pool2d.eager", TORCH_BOX(&PoolOps::adaptive_avg_pool2d_eager));
    m.impl("adaptive_avg_pool2d_backward", TORCH_BOX(&PoolOps::adaptive_avg_pool2d_backward));
  }
};

}  // namespace fastconv
