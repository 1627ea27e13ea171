// Division by a number that the host knows and the compiler does not: a multiplication, an addition and a shift.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda_support/cuda.h"

namespace fastconv::cuda {

/// Exact for dividends and divisors in [0, 2^31), divisor not 0. The GPU has no integer division: the compiler's
/// sequence takes about 20 instructions for 32 bits and 70 for 64.
///
/// With l = ceil(log2 d) and m = floor(2^32 (2^l - d) / d) + 1, n / d = (mulhi(n, m) + n) >> l (Granlund and
/// Montgomery, "Division by Invariant Integers using Multiplication", 1994, figure 4.1); for n < 2^31 the sum fits.
struct FastDivide {
  uint32_t divisor = 1, multiplier = 1, shift = 0;

  FastDivide() = default;
  explicit FastDivide(int64_t value) {
    if (value < 1 || value > 0x7fffffff)
      throw std::runtime_error("FastDivide by " + std::to_string(value) +
                               ", expected 1 to 2147483647; use 64-bit "
                               "arithmetic for tensors that large");
    divisor = static_cast<uint32_t>(value);
    while ((uint64_t{1} << shift) < divisor) ++shift;
    multiplier = static_cast<uint32_t>((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor) / divisor + 1);
  }

  __device__ __forceinline__ uint32_t divide(uint32_t dividend) const {
    return (__umulhi(dividend, multiplier) + dividend) >> shift;
  }
  /// The quotient; `dividend` becomes the remainder.
  __device__ __forceinline__ uint32_t divide_keep_rest(uint32_t& dividend) const {
    const uint32_t quotient = divide(dividend);
    dividend -= quotient * divisor;
    return quotient;
  }
};

}  // namespace fastconv::cuda
