// What every kernel of local response normalisation computes: a window's divisor, its powers, and the three results.
#pragma once

#include "cuda_support/units.cuh"
#include "norm/norm.h"

namespace fastconv::cuda {

/// The window that the unrolled kernels know: five channels, two on each side (AlexNet's).
inline constexpr int kSide = 2, kWindow = 2 * kSide + 1;

/// kAnyExponent false: d^-3/4, the exponent that networks use, by reciprocal square roots; true: d^-beta by powf.
template <bool kAnyExponent>
struct Response {
  float exponent, k, scale, slope;  // slope = 2 * scale * beta
  int channels, before, after;

  explicit Response(const NormProblem& p)
      : exponent(static_cast<float>(-p.beta)),
        k(static_cast<float>(p.k)),
        scale(static_cast<float>(p.scale)),
        slope(static_cast<float>(2 * p.scale * p.beta)),
        channels(static_cast<int>(p.c)),
        before(static_cast<int>(min_of(p.before(), p.c))),
        after(static_cast<int>(min_of(p.after(), p.c))) {}

  std::string describe() const {
    return "local response normalisation over " + std::to_string(before + 1 + after) + " of " +
           std::to_string(channels) + " channels";
  }

  /// d^-beta and 1 / d.
  __device__ __forceinline__ void powers(float d, float& power, float& inverse) const {
    if constexpr (kAnyExponent) {
      power = powf(d, exponent);
      inverse = 1.0f / d;
    } else {
      const float root = rsqrtf(d), fourth = root * rsqrtf(root);
      // 0 and infinity are their own square roots, which the product above would make NaN.
      power = root * (root == 0 || root == INFINITY ? root : fourth);
      inverse = root * root;
    }
  }

  __device__ __forceinline__ float divisor(float squares) const { return fmaf(scale, squares, k); }

  __device__ __forceinline__ float forward(float x, float squares) const {
    float power, inverse;
    powers(divisor(squares), power, inverse);
    return x * power;
  }
  /// `products`: the sum of x * tangent over the window.
  __device__ __forceinline__ float jvp(float x, float tangent, float squares, float products) const {
    float power, inverse;
    powers(divisor(squares), power, inverse);
    return power * (tangent - slope * x * products * inverse);
  }
  /// What an element gives itself, and its share for every x in its window.
  __device__ __forceinline__ void backward(float grad, float x, float squares, float& direct, float& share) const {
    float power, inverse;
    powers(divisor(squares), power, inverse);
    direct = grad * power;
    share = direct * x * inverse;
  }
  __device__ __forceinline__ float combine(float direct, float x, float shares) const {
    return direct - slope * x * shares;
  }
};

/// Sums over the unrolled window whose first element is a[0].
__device__ __forceinline__ float window_product(const float* a, const float* b) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kWindow; ++i) sum = fmaf(a[i], b[i], sum);
  return sum;
}
__device__ __forceinline__ float window_sum(const float* a) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kWindow; ++i) sum += a[i];
  return sum;
}

}  // namespace fastconv::cuda
