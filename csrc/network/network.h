// A program: the layers of a fused network as steps on places in memory, each a row of numbers in one int64 tensor.
// fastconv/_network_program.py writes it, cpu.cpp carries it out; the two must agree on what is here.
#pragma once

#include <cstdint>

namespace fastconv {

enum class StepKind : int64_t { convolve, max_pool, average_pool, adaptive_average_pool, to_nhwc, to_nchw };

/// No place, no tensor.
inline constexpr int64_t kNothing = INT64_MAX;
/// What the program begins with: so that another tensor of integers is not taken for one. The number counts versions.
inline constexpr int64_t kProgramMark = 0x66636e01;
/// Numbers of a step after the fields below.
inline constexpr int64_t kStepNumbers = 18;

/// Where an activation lies: an offset into the workspace in bytes, or -1 - i for the i-th of the call's inputs and
/// outputs; and how many bytes further on.
struct Place {
  int64_t base, offset;
};

/// Activations are dense, in NHWC but for what the two copies read or write. weight, shift and packed number the call's
/// constants.
struct Step {
  StepKind kind;
  Place input, output, residual;
  int64_t weight, shift, packed;
  /// convolve: n, c, h, w, k, r, s, stride (2), padding (4), dilation (2), groups, activation, weight_is_nchw
  /// max_pool: n, c, h, w, r, s, stride (2), padding (2), dilation (2), ceil_mode
  /// average_pool: the same, count_include_pad, divisor_override or 0
  /// adaptive_average_pool: n, c, h, w, rows and columns of the result
  /// to_nhwc, to_nchw: n, c, h, w
  int64_t numbers[kStepNumbers];
};

}  // namespace fastconv
