// The filters of Winograd, transformed: [m / kTileColumns][product][c][kTileColumns].
#pragma once

#include "conv2d/cpu_transpose.h"
#include "conv2d/cpu_winograd_plan.h"
#include "conv2d/cpu_winograd_transforms.h"

namespace fastconv {
namespace {

/// Raises *peak, by its bits: those of positive numbers have their order, infinity and NaN above all others.
inline void raise_peak(float* peak, float value) {
  uint32_t bits, known;
  std::memcpy(&bits, &value, sizeof(bits));
  auto* target = reinterpret_cast<uint32_t*>(peak);
  __atomic_load(target, &known, __ATOMIC_RELAXED);
  while (bits > known && !__atomic_compare_exchange(target, &known, &bits, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

/// Weights [c][9][kTileColumns] of a panel's output channels and up to kLanes input channels, in L1.
template <class T>
class FilterPiece {
 public:
  static constexpr int64_t kColumns = kTileColumns<float>, kChannels = simd::kLanes<float>;

  explicit FilterPiece(const GemmConv& p, const WinogradPlan& plan) : p_(p) {
    for (int64_t& place : places_) place = -1;  // no tap there: those that reach no input are left out
    for (int64_t t = 0; t < p.tap_count; ++t) {
      const int64_t place = (p.taps[t].dh - plan.first_h) * 3 + p.taps[t].dw - plan.first_w;
      places_[place] = taps_adjoin() ? p.taps[t].weight_offset_elems : t;
    }
  }

  void load(int64_t m, int64_t c, int64_t channels) {
    const T* weight = static_cast<const T*>(p_.weight) + m * p_.weight_m_stride + c * p_.weight_c_stride;
    for (int64_t lane = 0; lane < kColumns; lane += kChannels, weight += kChannels * p_.weight_m_stride) {
      const int64_t lanes = min_of(kChannels, p_.m - m - lane);
      if (lanes <= 0) break;
      if (taps_adjoin()) load_runs(weight, lane, lanes, channels);
      else load_taps(weight, lane, lanes, channels);
    }
  }

  /// Of input channel c, 3x3 vectors of float64 from `lane` on.
  FASTCONV_INLINE void widen(int64_t c, int64_t lane, simd::Vec<double> (&g)[9]) const {
    typedef float Narrow __attribute__((vector_size(FASTCONV_VECTOR_BYTES / 2)));
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) {
      Narrow narrow{};
      if (places_[t] >= 0) std::memcpy(&narrow, weights_ + (c * 9 + places_[t]) * kColumns + lane, sizeof(narrow));
      g[t] = __builtin_convertvector(narrow, simd::Vec<double>);
    }
  }

 private:
  /// In NCHW: [..][3][3], of a gradient too.
  bool taps_adjoin() const { return p_.weight_c_stride != 1 && p_.weight_m_stride != 1; }

  /// The taps of an input channel are side by side, and perhaps the input channels too.
  void load_runs(const T* weight, int64_t lane, int64_t lanes, int64_t channels) {
    const bool one = p_.weight_c_stride == 9;
    const int64_t runs = one ? 1 : channels, length = one ? channels * 9 : 9;
    const T* end = static_cast<const T*>(p_.weight) + p_.m * p_.c * 9;
    for (int64_t run = 0; run < runs; ++run, weight += p_.weight_c_stride)
      for (int64_t i = 0; i < length; i += kChannels) {
        const bool readable = end - (weight + (lanes - 1) * p_.weight_m_stride + i) >= kChannels;
        transpose_part<T>(weight + i, p_.weight_m_stride, lanes, min_of(kChannels, length - i), readable,
                          weights_ + (run * 9 + i) * kColumns + lane, kColumns);
      }
  }

  void load_taps(const T* weight, int64_t lane, int64_t lanes, int64_t channels) {
    for (int64_t t = 0; t < p_.tap_count; ++t) {
      const T* source = weight + p_.taps[t].weight_offset_elems;
      float* target = weights_ + t * kColumns + lane;
      if (p_.weight_c_stride == 1)
        transpose_part<T>(source, p_.weight_m_stride, lanes, channels, channels == kChannels, target, 9 * kColumns);
      else
        for (int64_t c = 0; c < channels; ++c, source += p_.weight_c_stride)
          simd::store<float>(target + c * 9 * kColumns,
                             lanes == kChannels ? simd::load(source) : simd::load_first(source, lanes));
    }
  }

  const GemmConv& p_;
  int64_t places_[9];
  float weights_[(kChannels * 9 + kChannels) * kColumns];
};

/// With filter_step from product to product; their largest magnitude before the transform comes last.
template <class Form, class T>
void transform_filters(const GemmConv& p, float* filters) {
  const WinogradPlan plan(p, Form::kOutputs);
  float* peak = filters + plan.filter_elems(p) - 1;
  *peak = 0;
  using Piece = FilterPiece<T>;
  constexpr int64_t kLane = simd::kLanes<double>, kColumns = kTileColumns<float>;
  typedef float Narrow __attribute__((vector_size(FASTCONV_VECTOR_BYTES / 2)));
  const int64_t pieces = ceil_div(p.c, Piece::kChannels);
  parallel_for(0, ceil_div(p.m, kColumns) * pieces, 4, [&](int64_t begin, int64_t end) {
    Piece piece(p, plan);
    auto largest = simd::zero<double>();
    for (int64_t index = begin; index < end; ++index) {
      const int64_t panel = index / pieces, first = index % pieces * Piece::kChannels;
      const int64_t channels = min_of(Piece::kChannels, p.c - first), live = min_of(kColumns, p.m - panel * kColumns);
      piece.load(panel * kColumns, first, channels);
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t lane = 0; lane < live; lane += kLane) {
          simd::Vec<double> g[9], result[Form::kProducts];
          piece.widen(c, lane, g);
#pragma GCC unroll 9
          for (int t = 0; t < 9; ++t) largest = simd::max_propagate_nan<double>(largest, g[t] < 0 ? -g[t] : g[t]);
          Form::transform_filter(g, result);
          float* to = filters + panel * Form::kProducts * plan.filter_step + (first + c) * kColumns + lane;
#pragma GCC unroll 36
          for (int64_t f = 0; f < Form::kProducts; ++f) {
            const Narrow narrowed = __builtin_convertvector(result[f], Narrow);
            std::memcpy(to + f * plan.filter_step, &narrowed, sizeof(narrowed));
          }
        }
    }
    for (int64_t i = 0; i < kLane; ++i) raise_peak(peak, __builtin_fabsf(static_cast<float>(largest[i])));
  });
}

}  // namespace
}  // namespace fastconv
