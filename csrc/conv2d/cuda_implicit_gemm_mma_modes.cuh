// The modes of implicit_gemm_mma: which operands meet. See cuda_implicit_gemm_mma.cuh.
#pragma once

#include "conv2d/cuda_implicit_gemm_mma.cuh"

namespace fastconv::cuda {
namespace {

// ---------------------------------------------------------------- forward

template <bool kVector>
struct NhwcForward {
  static constexpr bool kHeld = !kVector, kNhwc = true;
  template <class T, int kRows, int kThreads>
  using Images = NhwcPixels<T, kRows, kThreads, kVector>;
  template <class T, int kRows, int kThreads>
  using Weights = FilterRows<T, kRows, kThreads, kVector, true>;
};

struct NchwPointwise {
  static constexpr bool kHeld = false, kNhwc = false;
  template <class T, int kRows, int kThreads>
  using Images = NchwPlanes<T, kRows, kThreads>;
  template <class T, int kRows, int kThreads>
  using Weights = FilterRows<T, kRows, kThreads, true, false>;
};

template <bool kVector>
struct NchwForward {
  static constexpr bool kHeld = true, kNhwc = false;
  template <class T, int kRows, int kThreads>
  using Images = NchwPixels<T, kRows, kThreads>;
  template <class T, int kRows, int kThreads>
  using Weights = FilterRows<T, kRows, kThreads, kVector, false>;
};

// ---------------------------------------------------------------- input gradient

template <bool kVector>
struct NhwcInputGrad {
  static constexpr bool kHeld = !kVector, kNhwc = true;
  template <class T, int kRows, int kThreads>
  using Images = NhwcPixels<T, kRows, kThreads, kVector>;
  template <class T, int kRows, int kThreads>
  using Weights = FilterColumns<T, kRows, kThreads, kVector>;
};

struct NchwPointwiseInputGrad {
  static constexpr bool kHeld = false, kNhwc = false;
  template <class T, int kRows, int kThreads>
  using Images = NchwPlanes<T, kRows, kThreads>;
  template <class T, int kRows, int kThreads>
  using Weights = FilterColumns<T, kRows, kThreads, true>;
};

struct NchwInputGrad {
  static constexpr bool kHeld = true, kNhwc = false;
  template <class T, int kRows, int kThreads>
  using Images = NchwPixels<T, kRows, kThreads>;
  template <class T, int kRows, int kThreads>
  using Weights = GatheredFilters<T, kRows, kThreads, false>;
};

/// For float32, which ldmatrix does not turn.
template <bool kVector>
struct NhwcGatheredInputGrad {
  static constexpr bool kHeld = true, kNhwc = true;
  template <class T, int kRows, int kThreads>
  using Images = NhwcPixels<T, kRows, kThreads, kVector>;
  template <class T, int kRows, int kThreads>
  using Weights = GatheredFilters<T, kRows, kThreads, true>;
};

}  // namespace
}  // namespace fastconv::cuda
