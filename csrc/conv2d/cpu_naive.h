// The first rung of the ladder: the formula as loops, one output at a time. It reads any strides and any taps, so it is
// the reference that every other kernel is compared with.
#pragma once

#include "common/parallel.h"
#include "common/simd/simd.h"
#include "conv2d/gemm_conv.h"

namespace fastconv {
namespace {

FASTCONV_INLINE bool inside(int64_t index, int64_t size) {
  return static_cast<uint64_t>(index) < static_cast<uint64_t>(size);
}

template <class T>
acc_t<T> finish_scalar(const Epilogue& e, acc_t<T> sum, int64_t channel, int64_t y_index) {
  using Acc = acc_t<T>;
  if (e.scale) sum *= static_cast<const Acc*>(e.scale)[channel];
  if (e.shift) sum += static_cast<const Acc*>(e.shift)[channel];
  if (e.residual) sum += simd::widen(static_cast<const T*>(e.residual)[y_index]);
  return simd::activate<Acc>(simd::broadcast<Acc>(sum), e.activation)[0];
}

template <class T>
void convolve_naive(const GemmConv& p) {
  using Acc = acc_t<T>;
  parallel_for(0, p.n * p.groups * p.m, 1, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t n = plane / (p.groups * p.m), channel = plane % (p.groups * p.m), g = channel / p.m;
      const T* x = static_cast<const T*>(p.x) + n * p.x_strides.n + g * p.c * p.x_strides.c;
      const T* weight =
          static_cast<const T*>(p.weight) + g * p.weight_group_stride + (channel % p.m) * p.weight_m_stride;
      for (int64_t i = 0; i < p.i; ++i)
        for (int64_t j = 0; j < p.j; ++j) {
          Acc sum = 0;
          for (int64_t c = 0; c < p.c; ++c)
            for (int64_t t = 0; t < p.tap_count; ++t) {
              const int64_t row = i * p.step.h + p.taps[t].dh, column = j * p.step.w + p.taps[t].dw;
              if (!inside(row, p.h) || !inside(column, p.w)) continue;
              sum += simd::widen(x[c * p.x_strides.c + row * p.x_strides.h + column * p.x_strides.w]) *
                     simd::widen(weight[c * p.weight_c_stride + p.taps[t].weight_offset_elems]);
            }
          const int64_t y_index =
              p.y_offset + n * p.y_strides.n + channel * p.y_strides.c + i * p.y_strides.h + j * p.y_strides.w;
          static_cast<T*>(p.y)[y_index] = simd::narrow<T>(finish_scalar<T>(p.epilogue, sum, channel, y_index));
        }
    }
  });
}

template <class T>
void weight_grad_naive(const GemmWeightGrad& p) {
  using Acc = acc_t<T>;
  const int64_t per_row = p.c * p.tap_count;
  parallel_for(0, p.groups * p.m * per_row, 1, [&](int64_t begin, int64_t end) {
    for (int64_t element = begin; element < end; ++element) {
      const int64_t channel = element / per_row, g = channel / p.m, column_index = element % per_row;
      const int64_t c = p.layout == Layout::nchw ? column_index / p.tap_count : column_index % p.c;
      const int64_t t = p.layout == Layout::nchw ? column_index % p.tap_count : column_index / p.c;
      const T* x = static_cast<const T*>(p.x) + (g * p.c + c) * p.x_strides.c;
      const T* grad = static_cast<const T*>(p.grad_y) + channel * p.grad_y_strides.c;
      Acc sum = 0;
      for (int64_t n = 0; n < p.n; ++n)
        for (int64_t i = 0; i < p.i; ++i)
          for (int64_t j = 0; j < p.j; ++j) {
            const int64_t row = i * p.step.h + p.taps[t].dh, column = j * p.step.w + p.taps[t].dw;
            if (!inside(row, p.h) || !inside(column, p.w)) continue;
            sum += simd::widen(x[n * p.x_strides.n + row * p.x_strides.h + column * p.x_strides.w]) *
                   simd::widen(grad[n * p.grad_y_strides.n + i * p.grad_y_strides.h + j * p.grad_y_strides.w]);
          }
      static_cast<T*>(p.grad_weight)[element] = simd::narrow<T>(sum);
    }
  });
}

}  // namespace
}  // namespace fastconv
