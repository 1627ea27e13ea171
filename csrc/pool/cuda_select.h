// Which kernel a pooling problem gets, and why. Host code: needs the pointers, because alignment decides.
#pragma once

#include <string>

#include "cuda_support/dtype.h"
#include "pool/pool.h"

namespace fastconv::cuda {

enum class PoolPath : int { rows, square, general };

struct PoolChoice {
  PoolPath path;
  int window;    // 2 or 3 where the kernel is unrolled for it, else 0
  bool vectors;  // threads access 16 bytes
  const char* reason;
};

inline const char* describe(PoolPath path) {
  return path == PoolPath::rows ? "rows" : path == PoolPath::square ? "square" : "general";
}

inline bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

/// Square, stride 2, no dilation, the same padding of 0 or 1 on both axes: 2 or 3, else 0.
inline int unrolled_window(const PoolProblem& p) {
  const bool same = p.r == p.s && p.stride.h == 2 && p.stride.w == 2 && p.dilation.h == 1 && p.dilation.w == 1 &&
                    p.padding.h == p.padding.w && p.padding.h <= 1;
  return same && (p.r == 2 || p.r == 3) ? static_cast<int>(p.r) : 0;
}

/// No window hangs over an edge.
inline bool windows_are_inside(const PoolProblem& p) {
  return p.padding.h == 0 && p.padding.w == 0 && (p.p() - 1) * p.stride.h + p.dilation.h * (p.r - 1) < p.h &&
         (p.q() - 1) * p.stride.w + p.dilation.w * (p.s - 1) < p.w;
}

/// NHWC: every pixel of every tensor starts on 16 bytes, and its offsets on as many bytes as a vector has channels.
inline bool channels_are_vectors(const PoolProblem& p, const void* wide, const void* narrow, const void* offsets) {
  const int64_t bytes = element_bytes(p.dtype), lanes = 16 / bytes;
  if (p.layout != Layout::nhwc || p.c % lanes) return false;
  return aligned(wide, 16) && aligned(narrow, 16) && aligned(offsets, offsets_fit_byte(p) ? lanes : 16);
}

/// NCHW: windows in pairs of columns (2 x 2 without padding, 3 x 3 with padding 1) over rows that are whole vectors;
/// `wide` is the tensor of the input's size, `narrow` that of the output's.
inline bool rows_are_vectors(const PoolProblem& p, const void* wide, const void* narrow, const void* offsets) {
  const int64_t bytes = element_bytes(p.dtype), lanes = 16 / bytes;
  const int window = unrolled_window(p);
  if (p.layout != Layout::nchw || !window || p.padding.w != window - 2) return false;
  return p.w % lanes == 0 && p.q() == p.w / 2 && aligned(wide, 16) && aligned(narrow, 8) && aligned(offsets, lanes / 2);
}

/// "square 3 with 16-byte vectors: NHWC, ..."
inline std::string describe(const PoolChoice& choice) {
  return std::string(describe(choice.path)) + (choice.window ? " " + std::to_string(choice.window) : "") +
         (choice.vectors ? " with 16-byte vectors: " : ": ") + choice.reason;
}

/// For the maximum (`wide` is x, `narrow` y) and its gradient (`wide` is grad_input, `narrow` grad).
inline PoolChoice choose_max(const PoolProblem& p, const void* wide, const void* narrow, const void* offsets) {
  const int window = unrolled_window(p);
  if (rows_are_vectors(p, wide, narrow, offsets))
    return {PoolPath::rows, window, true, "NCHW, rows of whole 16-byte vectors, and windows that pair their columns"};
  const bool vectors = channels_are_vectors(p, wide, narrow, offsets);
  if (window && vectors) return {PoolPath::square, window, true, "NHWC, pixels of whole 16-byte vectors"};
  if (window && p.layout == Layout::nchw && p.h * p.w <= INT32_MAX)
    return {PoolPath::square, window, false,
            "NCHW, rows or pointers not on 16 bytes: neighbouring threads take neighbouring outputs"};
  if (!window && vectors)
    return {PoolPath::general, 0, true, "not a 2 x 2 or 3 x 3 window of stride 2: a loop over the window"};
  if (!window) return {PoolPath::general, 0, false, "not a 2 x 2 or 3 x 3 window of stride 2, nor on 16 bytes"};
  if (p.layout == Layout::nchw) return {PoolPath::general, 0, false, "a plane of more than 2^31 elements"};
  return {PoolPath::general, 0, false, "NHWC, channels or pointers not on 16 bytes: one channel a thread"};
}

/// For the mean (`wide` is x, `narrow` y) and its gradient. `halving`: whole 2 x 2 windows and a divisor that is a
/// power of two.
inline PoolChoice choose_average(const PoolProblem& p, bool halving, const void* wide, const void* narrow) {
  const bool vectors = channels_are_vectors(p, wide, narrow, nullptr);
  if (halving && vectors) return {PoolPath::square, 2, true, "NHWC, pixels of whole 16-byte vectors"};
  if (halving && p.layout == Layout::nchw)
    return {PoolPath::square, 2, false, "NCHW: neighbouring threads take neighbouring outputs"};
  if (halving) return {PoolPath::general, 0, false, "NHWC, channels or pointers not on 16 bytes: one channel a thread"};
  if (vectors) return {PoolPath::general, 0, true, "not whole 2 x 2 windows divided by a power of two"};
  return {PoolPath::general, 0, false, "not whole 2 x 2 windows divided by a power of two, nor on 16 bytes"};
}

}  // namespace fastconv::cuda
