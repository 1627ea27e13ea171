#include "conv2d/cpu_winograd_condition.h"

namespace fastconv {
namespace {

/// Measured: an output's error is at most 1e-5 of the root mean square of what its tile reads, weighted as follows. The
/// transforms multiply pixels in the middle of a tile, and subtract the multiples again.
constexpr int64_t kOutputs = 4;
constexpr double kLargest = 2, kWeights[6] = {0.25, 0.6, 2.15, 2.15, 0.6, 0.25};

/// Sums of squares of the pixels of one image.
class Image {
 public:
  Image(const GemmConv& p, const float* energies) : p_(p), energies_(energies) {
    dh_ = p.taps[0].dh, dw_ = p.taps[0].dw;
    for (int64_t t = 1; t < p.tap_count; ++t) dh_ = min_of(dh_, p.taps[t].dh), dw_ = min_of(dw_, p.taps[t].dw);
  }

  /// The largest of a pixel if every tile meets the condition, else NaN.
  double judge(WinogradForm form) const {
    double sum = 0, largest = 0;
    for (int64_t pixel = 0; pixel < p_.h * p_.w; ++pixel) {
      sum += energies_[pixel];
      largest = energies_[pixel] > largest ? energies_[pixel] : largest;
    }
    // Squares of smaller numbers than about 1e-15 lose digits. A NaN fails every comparison.
    const double mean = sum <= std::numeric_limits<float>::max() ? level(sum / static_cast<double>(p_.h * p_.w)) : 0;
    bool meets = mean > 1e-30;
    if (form == WinogradForm::f2) return meets ? largest : std::numeric_limits<double>::quiet_NaN();
    for (int64_t i = 0; i < p_.i && meets; i += kOutputs)
      for (int64_t j = 0; j < p_.j && meets; j += kOutputs) meets = tile_meets(i, j, mean);
    return meets ? largest : std::numeric_limits<double>::quiet_NaN();
  }

 private:
  /// The mean without what a few pixels add: each counts for at most 8 times the mean, again and again. Where fewer
  /// than an eighth of the pixels hold all the rest, that is the level of the others, however large those few are.
  double level(double mean) const {
    constexpr int kRounds = 64;
    for (int round = 0; round < kRounds; ++round) {
      const double most = 8 * mean;
      double sum = 0;
      for (int64_t pixel = 0; pixel < p_.h * p_.w; ++pixel) sum += energies_[pixel] < most ? energies_[pixel] : most;
      const double clipped = sum / static_cast<double>(p_.h * p_.w);
      if (!(clipped < 0.99 * mean)) return clipped;
      mean = clipped;
    }
    return mean;
  }

  /// True if the tile is not far above the image's mean, or not far above what each of its outputs reads.
  bool tile_meets(int64_t i, int64_t j, double mean) const {
    const double allowed = tile_mean(i, j) / (kLargest * kLargest);
    return allowed <= mean || allowed <= least_window_mean(i, j);
  }

  double tile_mean(int64_t i, int64_t j) const {
    double sum = 0;
    const int64_t top = i + dh_, left = j + dw_;
    for (int64_t h = max_of(top, 0); h < min_of(top + 6, p_.h); ++h) {
      double line = 0;
      for (int64_t w = max_of(left, 0); w < min_of(left + 6, p_.w); ++w)
        line += kWeights[w - left] * energies_[h * p_.w + w];
      sum += kWeights[h - top] * line;
    }
    return sum / 36;
  }

  double least_window_mean(int64_t i, int64_t j) const {
    double least = std::numeric_limits<double>::max();
    for (int64_t row = i; row < min_of(i + kOutputs, p_.i); ++row)
      for (int64_t column = j; column < min_of(j + kOutputs, p_.j); ++column) {
        double sum = 0;
        for (int64_t h = max_of(row + dh_, 0); h < min_of(row + dh_ + 3, p_.h); ++h)
          for (int64_t w = max_of(column + dw_, 0); w < min_of(column + dw_ + 3, p_.w); ++w)
            sum += energies_[h * p_.w + w];
        least = sum / 9 < least ? sum / 9 : least;
      }
    return least;
  }

  const GemmConv& p_;
  const float* energies_;
  int64_t dh_, dw_;  // what the first tap reads, relative to the output
};

}  // namespace

std::vector<double> winograd_energies(const Conv2dKernels& kernels, const GemmConv& p, Layout layout, DType dtype,
                                      WinogradForm form) {
  const int64_t plane = p.h * p.w;
  const Scratch energies(p.n * plane * static_cast<int64_t>(sizeof(float)));
  kernels.pixel_energies(p, layout, dtype, energies.as<float>());
  std::vector<double> found(static_cast<std::size_t>(p.n));
  parallel_for(0, p.n, ceil_div(8192, plane), [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image)
      found[static_cast<std::size_t>(image)] = Image(p, energies.as<float>() + image * plane).judge(form);
  });
  return found;
}

}  // namespace fastconv
