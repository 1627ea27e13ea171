// Local response normalisation and its two derivatives, over the tiles of cpu_tile.h.
#pragma once

#include "norm/cpu_tile.h"

namespace fastconv {
namespace {

/// d^-beta: by square roots for the exponents that networks use, else by the C library, a lane at a time.
template <class Acc>
struct NegativePower {
  enum class Kind { three_quarters, half, one, any } kind;
  Acc exponent;

  explicit NegativePower(double beta)
      : kind(beta == 0.75  ? Kind::three_quarters
             : beta == 0.5 ? Kind::half
             : beta == 1.0 ? Kind::one
                           : Kind::any),
        exponent(static_cast<Acc>(-beta)) {}

  FASTCONV_INLINE simd::Vec<Acc> operator()(simd::Vec<Acc> d) const {
    const auto one = simd::broadcast<Acc>(1);
    switch (kind) {
      case Kind::three_quarters: {
        const auto root = square_root(d);
        return one / (root * square_root(root));
      }
      case Kind::half:
        return one / square_root(d);
      case Kind::one:
        return one / d;
      case Kind::any:
        for (int i = 0; i < simd::kLanes<Acc>; ++i) d[i] = std::pow(d[i], exponent);
        return d;
    }
    return d;
  }

 private:
  static FASTCONV_INLINE simd::Vec<Acc> square_root(simd::Vec<Acc> x) {
#if defined(FASTCONV_SIMD_AVX512)
    if constexpr (sizeof(Acc) == 4) return (simd::Vec<Acc>)_mm512_sqrt_ps((__m512)x);
    else return (simd::Vec<Acc>)_mm512_sqrt_pd((__m512d)x);
#elif defined(FASTCONV_SIMD_AVX2)
    if constexpr (sizeof(Acc) == 4) return (simd::Vec<Acc>)_mm256_sqrt_ps((__m256)x);
    else return (simd::Vec<Acc>)_mm256_sqrt_pd((__m256d)x);
#else
    for (int i = 0; i < simd::kLanes<Acc>; ++i) x[i] = std::sqrt(x[i]);
    return x;
#endif
  }
};

/// Sum over the window of a * b, where the window starts at the pointers and runs by `stride`.
template <class Acc>
FASTCONV_INLINE simd::Vec<Acc> window_product(const Acc* a, const Acc* b, int64_t size, int64_t stride) {
  auto sum = simd::zero<Acc>();
  for (int64_t i = 0; i < size; ++i) sum = simd::fma<Acc>(simd::load(a + i * stride), simd::load(b + i * stride), sum);
  return sum;
}
template <class Acc>
FASTCONV_INLINE simd::Vec<Acc> window_sum(const Acc* a, int64_t size, int64_t stride) {
  auto sum = simd::zero<Acc>();
  for (int64_t i = 0; i < size; ++i) sum += simd::load(a + i * stride);
  return sum;
}

/// What every pass needs to know, in the accumulator's type.
template <class Acc>
struct Response {
  const NormProblem& p;
  TileShape shape;
  NegativePower<Acc> power;
  Acc k, scale, slope;  // slope = 2 * scale * beta

  explicit Response(const NormProblem& problem)
      : p(problem),
        shape(problem, problem.before(), problem.after(), simd::kLanes<Acc>, tile_pixels(problem, simd::kLanes<Acc>)),
        power(problem.beta),
        k(static_cast<Acc>(problem.k)),
        scale(static_cast<Acc>(problem.scale)),
        slope(static_cast<Acc>(2 * problem.scale * problem.beta)) {}

  /// d of the lanes from `x`, a pointer into a tile.
  FASTCONV_INLINE simd::Vec<Acc> denominator(const Acc* x) const {
    const Acc* first = x - p.before() * shape.channel_stride;
    return simd::fma<Acc>(simd::broadcast(scale), window_product(first, first, p.size, shape.channel_stride),
                          simd::broadcast(k));
  }

  /// body(first tile, last tile) on torch's threads.
  template <class Body>
  FASTCONV_INLINE void parallel(const Body& body) const {
    const int64_t tiles = p.n * ceil_div(p.plane, shape.pixels);
    parallel_for(0, tiles, 1 + 8192 / (shape.pixels * p.c + 1), body);
  }
};

/// Stores the lanes of a line from element j on, as many as the line has.
template <class T>
FASTCONV_INLINE void store_lanes(T* line, int64_t j, int64_t length, simd::Vec<acc_t<T>> value) {
  constexpr int64_t kLane = simd::kLanes<acc_t<T>>;
  if (j + kLane <= length) simd::store<T>(line + j, value);
  else simd::store_first<T>(line + j, value, length - j);
}

template <class T>
void response_forward(const NormProblem& p, const T* x, T* y) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  const Response<Acc> response(p);
  response.parallel([&](int64_t begin, int64_t end) {
    const Tile<Acc> tile(response.shape);
    for_each_tile(p, response.shape.pixels, begin, end, [&](const TilePlace& place) {
      const TileLines lines(p, place);
      tile.fill(lines, x);
      for (int64_t i = 0; i < lines.count; ++i)
        for (int64_t j = 0; j < lines.length; j += kLane) {
          const Acc* source = tile.line(i) + j;
          const auto value = simd::load(source) * response.power(response.denominator(source));
          store_lanes(y + lines.start + i * lines.stride, j, lines.length, value);
        }
    });
  });
}

/// v d^-beta - slope x d^(-beta-1) (sum over the window of x v)
template <class T>
void response_jvp(const NormProblem& p, const T* x, const T* tangent, T* y_tangent) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  const Response<Acc> response(p);
  response.parallel([&](int64_t begin, int64_t end) {
    const Tile<Acc> values(response.shape), tangents(response.shape);
    for_each_tile(p, response.shape.pixels, begin, end, [&](const TilePlace& place) {
      const TileLines lines(p, place);
      values.fill(lines, x);
      tangents.fill(lines, tangent);
      for (int64_t i = 0; i < lines.count; ++i)
        for (int64_t j = 0; j < lines.length; j += kLane) {
          const Acc *source = values.line(i) + j, *along = tangents.line(i) + j;
          const int64_t first = -p.before() * response.shape.channel_stride;
          const auto d = response.denominator(source);
          const auto change = window_product(source + first, along + first, p.size, response.shape.channel_stride);
          const auto inner = simd::load(along) - simd::broadcast(response.slope) * simd::load(source) * change / d;
          store_lanes(y_tangent + lines.start + i * lines.stride, j, lines.length, response.power(d) * inner);
        }
    });
  });
}

/// g d^-beta - slope x (sum of g x d^(-beta-1) over the channels whose window holds this one)
template <class T>
void response_backward(const NormProblem& p, const T* grad, const T* x, T* grad_input) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  const Response<Acc> response(p);
  // Channel i is in the windows of the channels [i - after, i + before]: the margins change sides.
  const TileShape mirrored(p, p.after(), p.before(), kLane, response.shape.pixels);
  response.parallel([&](int64_t begin, int64_t end) {
    const Tile<Acc> values(response.shape), direct(response.shape), shares(mirrored);
    for_each_tile(p, response.shape.pixels, begin, end, [&](const TilePlace& place) {
      const TileLines lines(p, place);
      values.fill(lines, x);
      for (int64_t i = 0; i < lines.count; ++i)
        for (int64_t j = 0; j < lines.length; j += kLane) {
          const int64_t live = min_of(kLane, lines.length - j);
          const T* source = grad + lines.start + i * lines.stride + j;
          const auto g = live == kLane ? simd::load(source) : simd::load_first(source, live);
          const auto d = response.denominator(values.line(i) + j);
          const auto first = g * response.power(d);
          const auto share = first * simd::load(values.line(i) + j) / d;
          simd::store_first<Acc>(direct.line(i) + j, first, live);
          simd::store_first<Acc>(shares.line(i) + j, share, live);
        }
      for (int64_t i = 0; i < lines.count; ++i)
        for (int64_t j = 0; j < lines.length; j += kLane) {
          const Acc* window = shares.line(i) + j - p.after() * mirrored.channel_stride;
          const auto back = window_sum(window, p.size, mirrored.channel_stride);
          const auto value =
              simd::load(direct.line(i) + j) - simd::broadcast(response.slope) * simd::load(values.line(i) + j) * back;
          store_lanes(grad_input + lines.start + i * lines.stride, j, lines.length, value);
        }
    });
  });
}

}  // namespace
}  // namespace fastconv
