// Local response normalisation and its derivatives: pick the kernel.
#include <cstdio>

#include "cuda_support/launchers.h"
#include "norm/cuda_any.cuh"
#include "norm/cuda_channels.cuh"
#include "norm/cuda_norm.h"
#include "norm/cuda_walk.cuh"

namespace fastconv::cuda {
namespace {

/// How a problem is spread over threads. Lanes: elements that a thread loads as one.
struct NormChoice {
  enum class Path : int { channels, walk, any } path;
  bool vectors;
  const char* reason;
};

constexpr int kWalkLanes = 4;  // 8 bytes of fp16: with 16 the windows of eight pixels would fill the registers

bool all_aligned(std::initializer_list<const void*> pointers, int64_t bytes) {
  for (const void* pointer : pointers)
    if (!is_aligned(pointer, 0, 1, bytes)) return false;
  return true;
}

NormChoice choose(const NormProblem& p, std::initializer_list<const void*> pointers) {
  using Path = NormChoice::Path;
  const int64_t bytes = element_bytes(p.dtype);
  if (p.size != kWindow) return {Path::any, false, "not a window of five channels"};
  if (p.plane > INT32_MAX || p.c > INT32_MAX) return {Path::any, false, "2^31 pixels or channels"};
  if (p.beta != 0.75) return {Path::any, false, "an exponent other than 3/4"};
  if (p.layout == Layout::nchw) {
    if (p.plane % kWalkLanes == 0 && all_aligned(pointers, kWalkLanes * bytes))
      return {Path::walk, true, "NCHW, planes of whole vectors of pixels"};
    return {Path::walk, false,
            "NCHW, planes or pointers not on vectors: neighbouring threads take neighbouring pixels"};
  }
  if (p.c % (16 / bytes) == 0 && all_aligned(pointers, 16))
    return {Path::channels, true, "NHWC, pixels of whole 16-byte vectors"};
  return {Path::any, false, "NHWC, channels or pointers not on 16 bytes"};
}

/// Channels that a thread walks: many, because its ends are read twice; fewer where that leaves the device idle.
int64_t channels_each(const NormProblem& p, int64_t lanes) {
  constexpr int64_t kEnough = 128 * 1024;  // threads: half of an H100
  int64_t each = 32;
  while (each > 8 && p.n * (p.plane / lanes) * ceil_div(p.c, each) < kEnough) each /= 2;
  return each;
}

/// kernel(response, units, pointers...), a unit an image's pixel's vector of channels; units per `first` images.
template <class T, class Kernel, class... Pointers>
void launch_channels(const NormProblem& p, Kernel kernel, cudaStream_t stream, Pointers... pointers) {
  for_each_slice(p.n, 1, p.plane, p.c / kVectorElements<T>, [&](int64_t first, const Units& units) {
    const int64_t before = first * p.c * p.plane;
    launch(kernel, grid_of(units), kUnitThreads, 0, stream, Response<false>(p), units, (pointers + before)...);
  });
}

template <int N, class Kernel, class... Pointers>
void launch_walk(const NormProblem& p, Kernel kernel, cudaStream_t stream, Pointers... pointers) {
  const int64_t each = channels_each(p, N);
  for_each_slice(p.n, ceil_div(p.c, each), p.plane / N, 1, [&](int64_t first, const Units& units) {
    const int64_t before = first * p.c * p.plane;
    launch(kernel, grid_of(units), kUnitThreads, 0, stream, Response<false>(p), units, static_cast<int>(each),
           static_cast<int>(p.plane), (pointers + before)...);
  });
}

template <class Kernel, class... Pointers>
void launch_any(const NormProblem& p, Kernel kernel, cudaStream_t stream, Pointers... pointers) {
  const bool channels_first = p.layout == Layout::nchw;
  for_each_slice(
      p.n, channels_first ? p.c : 1, p.plane, channels_first ? 1 : p.c, [&](int64_t first, const Units& units) {
        const int64_t before = first * p.c * p.plane;
        launch(kernel, grid_of(units), kUnitThreads, 0, stream, Response<true>(p), units, (pointers + before)...);
      });
}

}  // namespace

// The three launchers differ in the kernels' names and in the pointers.
#define FASTCONV_RESPONSE_KERNELS(suffix, ...)                                                                      \
  using Path = NormChoice::Path;                                                                                    \
  if (choice.path == Path::channels)                                                                                \
    return launch_channels<T>(p, FASTCONV_KERNEL(response_channels##suffix##kernel<kVectorElements<T>, T>), stream, \
                              __VA_ARGS__);                                                                         \
  if (choice.path == Path::walk && choice.vectors)                                                                  \
    return launch_walk<kWalkLanes>(p, FASTCONV_KERNEL(response_walk##suffix##kernel<kWalkLanes, T>), stream,        \
                                   __VA_ARGS__);                                                                    \
  if (choice.path == Path::walk)                                                                                    \
    return launch_walk<1>(p, FASTCONV_KERNEL(response_walk##suffix##kernel<1, T>), stream, __VA_ARGS__);            \
  launch_any(p, FASTCONV_KERNEL(response_any##suffix##kernel<T>), stream, __VA_ARGS__)

void launch_local_response_norm(const NormProblem& p, const void* x, void* y, cudaStream_t stream) {
  const NormChoice choice = choose(p, {x, y});
  dispatch_element("local_response_norm", p.dtype, [&](auto element) {
    using T = decltype(element);
    FASTCONV_RESPONSE_KERNELS(_, static_cast<const T*>(x), static_cast<T*>(y));
  });
}

void launch_local_response_norm_jvp(const NormProblem& p, const void* x, const void* tangent, void* y_tangent,
                                    cudaStream_t stream) {
  const NormChoice choice = choose(p, {x, tangent, y_tangent});
  dispatch_element("local_response_norm_jvp", p.dtype, [&](auto element) {
    using T = decltype(element);
    FASTCONV_RESPONSE_KERNELS(_jvp_, static_cast<const T*>(x), static_cast<const T*>(tangent),
                              static_cast<T*>(y_tangent));
  });
}

void launch_local_response_norm_backward(const NormProblem& p, const void* grad, const void* x, void* grad_input,
                                         cudaStream_t stream) {
  const NormChoice choice = choose(p, {grad, x, grad_input});
  dispatch_element("local_response_norm_backward", p.dtype, [&](auto element) {
    using T = decltype(element);
    FASTCONV_RESPONSE_KERNELS(_backward_, static_cast<const T*>(grad), static_cast<const T*>(x),
                              static_cast<T*>(grad_input));
  });
}

#undef FASTCONV_RESPONSE_KERNELS

void explain_local_response_norm(const NormProblem& p, const void* x, const void* other, const void* result, void* text,
                                 int64_t bytes) {
  const NormChoice choice = choose(p, {x, other, result});
  const char* names[] = {"channels", "walk", "any"};
  std::snprintf(static_cast<char*>(text), static_cast<size_t>(bytes), "%s%s: %s", names[static_cast<int>(choice.path)],
                choice.vectors ? " with vectors" : "", choice.reason);
}

FASTCONV_LAUNCHER("local_response_norm", "channels", launch_local_response_norm);
FASTCONV_LAUNCHER("local_response_norm_jvp", "channels", launch_local_response_norm_jvp);
FASTCONV_LAUNCHER("local_response_norm_backward", "channels", launch_local_response_norm_backward);
FASTCONV_LAUNCHER("explain_local_response_norm", "channels", explain_local_response_norm);

}  // namespace fastconv::cuda
