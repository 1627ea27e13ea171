// Staging, for NCHW: the rows that a strip of the output needs, copied into L1 with their padding, widened to the
// accumulator type, and split by column modulo the stride. Row kernels then see one case only: no borders, and
// consecutive output columns read consecutive elements, whatever the stride, dilation and padding.
#pragma once

#include "depthwise/cpu_pass.h"

// Two-operand shuffle with literal indices; gcc has clang's spelling only from version 12 on.
#if defined(__clang__)
#define FASTCONV_SHUFFLE(T, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FASTCONV_SHUFFLE(T, a, b, ...) __builtin_shuffle(a, b, (simd::Mask<T>){__VA_ARGS__})
#endif

namespace fastconv {
namespace {

/// Elements 0, 2, 4, ... of a followed by b.
template <class T>
FASTCONV_INLINE simd::Vec<T> even_elements(simd::Vec<T> a, simd::Vec<T> b) {
  if constexpr (simd::kLanes<T> == 2) return FASTCONV_SHUFFLE(T, a, b, 0, 2);
  if constexpr (simd::kLanes<T> == 4) return FASTCONV_SHUFFLE(T, a, b, 0, 2, 4, 6);
  if constexpr (simd::kLanes<T> == 8) return FASTCONV_SHUFFLE(T, a, b, 0, 2, 4, 6, 8, 10, 12, 14);
  if constexpr (simd::kLanes<T> == 16)
    return FASTCONV_SHUFFLE(T, a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
/// Elements 1, 3, 5, ... of a followed by b.
template <class T>
FASTCONV_INLINE simd::Vec<T> odd_elements(simd::Vec<T> a, simd::Vec<T> b) {
  if constexpr (simd::kLanes<T> == 2) return FASTCONV_SHUFFLE(T, a, b, 1, 3);
  if constexpr (simd::kLanes<T> == 4) return FASTCONV_SHUFFLE(T, a, b, 1, 3, 5, 7);
  if constexpr (simd::kLanes<T> == 8) return FASTCONV_SHUFFLE(T, a, b, 1, 3, 5, 7, 9, 11, 13, 15);
  if constexpr (simd::kLanes<T> == 16)
    return FASTCONV_SHUFFLE(T, a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
/// a0, b0, a1, b1, ...: the first half, and the second.
template <class T>
FASTCONV_INLINE simd::Vec<T> interleave_low(simd::Vec<T> a, simd::Vec<T> b) {
  if constexpr (simd::kLanes<T> == 2) return FASTCONV_SHUFFLE(T, a, b, 0, 2);
  if constexpr (simd::kLanes<T> == 4) return FASTCONV_SHUFFLE(T, a, b, 0, 4, 1, 5);
  if constexpr (simd::kLanes<T> == 8) return FASTCONV_SHUFFLE(T, a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  if constexpr (simd::kLanes<T> == 16)
    return FASTCONV_SHUFFLE(T, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
template <class T>
FASTCONV_INLINE simd::Vec<T> interleave_high(simd::Vec<T> a, simd::Vec<T> b) {
  if constexpr (simd::kLanes<T> == 2) return FASTCONV_SHUFFLE(T, a, b, 1, 3);
  if constexpr (simd::kLanes<T> == 4) return FASTCONV_SHUFFLE(T, a, b, 2, 6, 3, 7);
  if constexpr (simd::kLanes<T> == 8) return FASTCONV_SHUFFLE(T, a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  if constexpr (simd::kLanes<T> == 16)
    return FASTCONV_SHUFFLE(T, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

/// The shape of a staged row. Column u of the padded row is at (u % phases) * phase_pitch + u / phases.
struct StageShape {
  int64_t phases;       // the column stride of the pass
  int64_t lead;         // padded columns before column 0 of the plane; negative if columns are skipped
  int64_t length;       // elements per phase that kernels may read
  int64_t phase_pitch;  // a vector store may run over `length` by less than one vector
  int64_t pitch;        // between rows

  FASTCONV_INLINE StageShape(int64_t phases, AxisReach reach, int64_t columns, int64_t lanes)
      : phases(phases), lead(-reach.first) {
    length = max_of(columns, lanes) + (reach.last - reach.first) / phases;
    phase_pitch = round_up(length, lanes) + lanes;
    pitch = phases * phase_pitch;
  }
  FASTCONV_INLINE int64_t column(int64_t offset) const {
    return (offset + lead) % phases * phase_pitch + (offset + lead) / phases;
  }
};

template <class Acc>
FASTCONV_INLINE void zero_elements(Acc* target, int64_t count) {
  for (int64_t i = 0; i < count; i += simd::kLanes<Acc>) simd::store<Acc>(target + i, simd::zero<Acc>());
}

// The padding left and right of a row is the same for every row and plane, so it is zeroed once, when the buffer is
// new; the functions below write nothing else than the row's own columns, and zeros for the rest of a vector.

template <class T>
FASTCONV_INLINE void stage_row_of_one_phase(const StageShape& shape, const T* row, int64_t width, acc_t<T>* target) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  const int64_t skipped = max_of(0, -shape.lead);
  target += shape.lead + skipped;
  row += skipped;
  width = min_of(width - skipped, shape.length - shape.lead - skipped);
  if (width < kLane) {
    if (width > 0) simd::store<Acc>(target, simd::load_first(row, width));
    return;
  }
  for (int64_t i = 0; i + kLane < width; i += kLane) simd::store<Acc>(target + i, simd::load(row + i));
  simd::store<Acc>(target + width - kLane, simd::load(row + width - kLane));
}

template <class T>
FASTCONV_INLINE void stage_row_of_two_phases(const StageShape& shape, const T* row, int64_t width, acc_t<T>* target) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  // Column 2t of the plane is padded column 2t + lead, so the parity of `lead` says which phase the even ones join.
  const int64_t odd = shape.lead & 1, count = min_of(shape.length - shape.lead / 2, (width + 1) / 2);
  Acc* even_target = target + odd * shape.phase_pitch + shape.lead / 2;
  Acc* odd_target = target + (1 - odd) * shape.phase_pitch + (shape.lead + 1) / 2;
  for (int64_t t = 0; t < count; t += kLane) {
    const int64_t left = width - 2 * t;
    const bool whole = left >= 2 * kLane;
    const auto a = whole ? simd::load(row + 2 * t) : simd::load_first(row + 2 * t, min_of(left, kLane));
    const auto b = whole ? simd::load(row + 2 * t + kLane)
                         : simd::load_first(row + 2 * t + min_of(left, kLane), max_of(left - kLane, 0));
    simd::store<Acc>(even_target + t, even_elements<Acc>(a, b));
    simd::store<Acc>(odd_target + t, odd_elements<Acc>(a, b));
  }
}

template <class T>
void stage_row_of_many_phases(const StageShape& shape, const T* row, int64_t width, acc_t<T>* target) {
  for (int64_t phase = 0; phase < shape.phases; ++phase)
    for (int64_t i = 0; i < shape.length; ++i) {
      const int64_t column = i * shape.phases + phase - shape.lead;
      target[phase * shape.phase_pitch + i] = inside(column, width) ? simd::widen(row[column]) : acc_t<T>(0);
    }
}

/// Rows [first, first + count) of a plane, zeros where it has none. `target` was zeros, or held another plane of this
/// size. With `same_rows`, that plane's rows lay where these lie, and rows outside the plane are still zeros.
template <class T>
FASTCONV_INLINE void stage_rows(const StageShape& shape, const T* plane, Size2 size, int64_t first, int64_t count,
                                bool same_rows, acc_t<T>* target) {
  const int64_t begin = min_of(max_of(first, 0), first + count), end = max_of(begin, min_of(size.h, first + count));
  if (!same_rows) {
    zero_elements(target, (begin - first) * shape.pitch);
    zero_elements(target + (end - first) * shape.pitch, (first + count - end) * shape.pitch);
  }
  target += (begin - first) * shape.pitch;
  const T* row = plane + begin * size.w;
  if (shape.phases == 1) {
    for (int64_t i = begin; i < end; ++i, row += size.w, target += shape.pitch)
      stage_row_of_one_phase<T>(shape, row, size.w, target);
  } else if (shape.phases == 2) {
    for (int64_t i = begin; i < end; ++i, row += size.w, target += shape.pitch)
      stage_row_of_two_phases<T>(shape, row, size.w, target);
  } else {
    for (int64_t i = begin; i < end; ++i, row += size.w, target += shape.pitch)
      stage_row_of_many_phases<T>(shape, row, size.w, target);
  }
}

}  // namespace
}  // namespace fastconv
