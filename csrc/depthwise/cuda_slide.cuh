// The inner loops of the depthwise kernels, the same for both layouts: a thread owns one or two columns and kVector
// channels and slides down the rows. Whatever it reads, it reads once: an input row is added to all windows that it is
// in.
//
// What is kept in registers over all steps (kLive: the windows that overlap one row):
//                 weights               sums                       rows
//   forward       kTaps * kVector       kLive * 2 * kVector
//   input grad    kTaps * kVector                                  kLive * kLive * kVector  (stride 2; stride 1 is a
//   weight grad                         kTaps * kVector            kLive * 2 * kVector       forward pass)
//
// The registers that hold sums and rows change roles at every step. The loops are unrolled kLive times so that the role
// is a constant (`phase`): shifting them along would cost as many moves as a fifth of the multiply-adds.
// Every loop asks for the next row before it works on the present one, so that memory's latency and the arithmetic
// overlap without help from other warps.
#pragma once

#include <bit>

#include "cuda_support/dtype.h"

namespace fastconv::cuda {

template <int kWindow_, int kStride_, int kVector_, int kColumns_ = 2>
struct SlideShape {
  static constexpr int kWindow = kWindow_, kStride = kStride_, kVector = kVector_;
  static constexpr int kTaps = kWindow * kWindow;
  static constexpr int kColumns = kColumns_;                         // outputs of a thread in a row
  static constexpr int kLive = (kWindow + kStride - 1) / kStride;    // output rows that an input row serves
  static constexpr int kReads = kStride * (kColumns - 1) + kWindow;  // input columns of kColumns outputs
  static_assert(kLive >= 2, "the loops rotate at least two rows");
};

/// kCount elements as they lie in memory, in as few registers as they need. The compiler gives every 16-bit variable
/// that lives around a loop a 32-bit register of its own: Vector<half, 4> would take four, this takes two.
template <class T, int kCount>
struct Packed {
  static constexpr int kBytes = sizeof(T) * kCount, kWords = (kBytes + 3) / 4;
  static_assert(kBytes == 2 || kBytes == 4 || kBytes == 8);
  uint32_t word[kWords];

  /// `from` is aligned to kBytes. If not `exists`, nothing is read and the elements are zeros.
  __device__ __forceinline__ void load(const T* from, bool exists) {
    if (exists) FASTCONV_EXPECT_ALIGNED(from, kBytes);
    if constexpr (kBytes == 2) {
      word[0] = exists ? *reinterpret_cast<const uint16_t*>(from) : 0;
    } else if constexpr (kBytes == 4) {
      word[0] = exists ? *reinterpret_cast<const uint32_t*>(from) : 0;
    } else {
      const uint2 both = exists ? *reinterpret_cast<const uint2*>(from) : uint2{0, 0};
      word[0] = both.x, word[1] = both.y;
    }
  }

  __device__ __forceinline__ float at(int i) const {
    if constexpr (sizeof(T) == 4) return __uint_as_float(word[i]);
    else return to_float(std::bit_cast<Vector<T, 2>>(word[i / 2])[i % 2]);
  }
};

template <class T, int kCount>
__device__ __forceinline__ void to_float(const Packed<T, kCount>& from, float (&to)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = from.at(i);
}

/// w[tap][channel]
template <class Shape>
using TapRegisters = float[Shape::kTaps][Shape::kVector];

/// Rows first to last - 1 of the output. load(h, row) fills row[kReads] with the input columns of row h, zeros outside
/// the image; emit(p, sums) takes sums[kColumns][kVector] of output row p.
///
/// Step p reads the input rows p * stride - pad + j; such a row is tap j + stride * m of output row p - m.
template <class T, class Shape, class Load, class Emit>
__device__ __forceinline__ void slide_forward(const TapRegisters<Shape>& weight, int first, int last, int pad,
                                              const Load& load, const Emit& emit) {
  constexpr int kLive = Shape::kLive, kStride = Shape::kStride, kWindow = Shape::kWindow;
  float sum[kLive][Shape::kColumns][Shape::kVector] = {};
  Packed<T, Shape::kVector> row[Shape::kReads];
  int h = first * kStride - pad;
  load(h, row);
  const int end = last + kLive - 1;
  for (int base = first; base < end; base += kLive) {
#pragma unroll
    for (int phase = 0; phase < kLive; ++phase) {
      if (base + phase >= end) break;
#pragma unroll
      for (int j = 0; j < kStride; ++j) {
        Packed<T, Shape::kVector> next[Shape::kReads];
        load(++h, next);
#pragma unroll
        for (int i = 0; i < Shape::kReads; ++i) {
          float x[Shape::kVector];
          to_float(row[i], x);
#pragma unroll
          for (int column = 0; column < Shape::kColumns; ++column) {
            const int s = i - column * kStride;
            if (s < 0 || s >= kWindow) continue;
#pragma unroll
            for (int m = 0; j + kStride * m < kWindow; ++m) {
              float (&to)[Shape::kVector] = sum[(phase - m + kLive) % kLive][column];
              const int tap = (j + kStride * m) * kWindow + s;
#pragma unroll
              for (int v = 0; v < Shape::kVector; ++v)
                to[v] = tap == 0 ? weight[0][v] * x[v] : fmaf(weight[tap][v], x[v], to[v]);  // tap 0 starts the sum
            }
          }
          row[i] = next[i];
        }
      }
      const int p = base + phase - (kLive - 1);
      if (p >= first) emit(p, sum[(phase + 1) % kLive]);
    }
  }
}

/// The gradient of stride 2's input in cells of 2 x 2 elements: cell (i, j) holds the elements whose row plus padding
/// is 2i + shift and 2i + shift + 1, and likewise its columns. It needs kLive x kLive outputs, and each of its four
/// elements uses the taps of its own parity: all phases of the usual formulation at once, every output read once.
///
/// `shift` is the parity for which the "same" padding (window / 2) starts cells at even elements, so that pairs of
/// columns can be stored as one.
__host__ __device__ constexpr int cell_shift(int window) { return window / 2 % 2; }

/// Rows first to last - 1 of cells; cell row i reads the output rows i - pad to i - pad + kLive - 1. load(p, row) fills
/// row[kLive] with the columns of output row p, zeros outside; emit(i, sums) takes sums[2][2][kVector] of cell row i.
template <class T, class Shape, class Load, class Emit>
__device__ __forceinline__ void slide_input_grad(const TapRegisters<Shape>& weight, int first, int last, int pad,
                                                 const Load& load, const Emit& emit) {
  constexpr int kLive = Shape::kLive, kWindow = Shape::kWindow, kV = Shape::kVector;
  constexpr int kShift = cell_shift(kWindow);
  static_assert(Shape::kStride == 2 && kWindow % 2 == 1);
  float rows[kLive][kLive][kV];
  Packed<T, kV> next[kLive];
  const int newest = kLive - 1 - pad;  // of cell 0
#pragma unroll
  for (int up = kLive - 1; up > 0; --up) {
    load(first + newest - up, next);
#pragma unroll
    for (int i = 0; i < kLive; ++i) to_float(next[i], rows[kLive - up][i]);
  }
  load(first + newest, next);
  for (int base = first; base < last; base += kLive) {
#pragma unroll
    for (int phase = 0; phase < kLive; ++phase) {
      const int cell = base + phase;
      if (cell >= last) break;
#pragma unroll
      for (int i = 0; i < kLive; ++i) to_float(next[i], rows[phase][i]);
      load(cell + 1 + newest, next);
      float sum[2][2][kV] = {};
#pragma unroll
      for (int r = 0; r < kWindow; ++r) {
        // Element a of the cell has tap r on output row cell + (kShift + a - r) / 2, `up` rows above the newest.
        const int a = (r + kShift) % 2, up = kShift - (kShift + a - r) / 2;
#pragma unroll
        for (int s = 0; s < kWindow; ++s) {
          const int b = (s + kShift) % 2, left = kShift - (kShift + b - s) / 2;
#pragma unroll
          for (int v = 0; v < kV; ++v)
            sum[a][b][v] =
                fmaf(weight[r * kWindow + s][v], rows[(phase - up + kLive) % kLive][kLive - 1 - left][v], sum[a][b][v]);
        }
      }
      emit(cell, sum);
    }
  }
}

/// Adds what output rows first to last - 1 contribute to the weight gradient: sum[tap] += grad * x.
/// load_x(h, row) is that of slide_forward; load_grad(p, row) fills row[kColumns], zeros outside these rows.
///
/// The last round of kLive steps runs to its end, on zeros: with an exit after each step the compiler kept two copies
/// of all sums and spilled one of them.
template <class T, class Shape, class LoadX, class LoadGrad>
__device__ __forceinline__ void slide_weight_grad(TapRegisters<Shape>& sum, int first, int last, int pad,
                                                  const LoadX& load_x, const LoadGrad& load_grad) {
  constexpr int kLive = Shape::kLive, kStride = Shape::kStride, kWindow = Shape::kWindow, kV = Shape::kVector;
  float grad[kLive][Shape::kColumns][kV] = {};
  Packed<T, kV> row[Shape::kReads], next_grad[Shape::kColumns];
  int h = first * kStride - pad;
  load_x(h, row);
  load_grad(first, next_grad);
  const int end = last + kLive - 1;
  for (int base = first; base < end; base += kLive) {
#pragma unroll
    for (int phase = 0; phase < kLive; ++phase) {
#pragma unroll
      for (int column = 0; column < Shape::kColumns; ++column) to_float(next_grad[column], grad[phase][column]);
      load_grad(base + phase + 1, next_grad);
#pragma unroll
      for (int j = 0; j < kStride; ++j) {
        Packed<T, kV> next[Shape::kReads];
        load_x(++h, next);
#pragma unroll
        for (int i = 0; i < Shape::kReads; ++i) {
          float x[kV];
          to_float(row[i], x);
#pragma unroll
          for (int column = 0; column < Shape::kColumns; ++column) {
            const int s = i - column * kStride;
            if (s < 0 || s >= kWindow) continue;
#pragma unroll
            for (int m = 0; j + kStride * m < kWindow; ++m) {
              const float (&from)[kV] = grad[(phase - m + kLive) % kLive][column];
              float (&to)[kV] = sum[(j + kStride * m) * kWindow + s];
#pragma unroll
              for (int v = 0; v < kV; ++v) to[v] = fmaf(from[v], x[v], to[v]);
            }
          }
          row[i] = next[i];
        }
      }
    }
  }
}

}  // namespace fastconv::cuda
