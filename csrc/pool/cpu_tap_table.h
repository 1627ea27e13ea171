// Which windows cover an input position: the transpose of "which positions a window covers".
#pragma once

#include "common/parallel.h"
#include "common/problem.h"

namespace fastconv {
namespace {

/// For every input position along one axis, the (output position, tap) pairs that read it, taps ascending.
class TapTable {
 public:
  TapTable(int64_t size, int64_t positions, int64_t window, int64_t stride, int64_t padding, int64_t dilation)
      : start_((size + 2) * kWord), output_(positions * window * kWord), tap_(positions * window * kWord) {
    int64_t* start = start_.as<int64_t>();
    for (int64_t i = 0; i < size + 2; ++i) start[i] = 0;
    const auto for_each_pair = [&](const auto& body) {
      for (int64_t tap = 0; tap < window; ++tap)
        for (int64_t output = 0; output < positions; ++output) {
          const int64_t position = output * stride - padding + tap * dilation;
          if (position >= 0 && position < size) body(position, output, tap);
        }
    };
    for_each_pair([&](int64_t position, int64_t, int64_t) { ++start[position + 2]; });
    for (int64_t i = 2; i < size + 2; ++i) {
      most_ = max_of(most_, start[i]);
      start[i] += start[i - 1];
    }
    // Filling moves start[position + 1] from the list's beginning to its end, which is the next list's beginning.
    for_each_pair([&](int64_t position, int64_t output, int64_t tap) {
      const int64_t slot = start[position + 1]++;
      output_.as<int64_t>()[slot] = output;
      tap_.as<int64_t>()[slot] = tap;
    });
  }

  /// The longest list's length.
  int64_t most() const { return most_; }
  FASTCONV_INLINE int64_t begin(int64_t position) const { return start_.as<int64_t>()[position]; }
  FASTCONV_INLINE int64_t end(int64_t position) const { return start_.as<int64_t>()[position + 1]; }
  FASTCONV_INLINE int64_t output(int64_t slot) const { return output_.as<int64_t>()[slot]; }
  FASTCONV_INLINE int64_t tap(int64_t slot) const { return tap_.as<int64_t>()[slot]; }

 private:
  static constexpr int64_t kWord = sizeof(int64_t);
  Scratch start_, output_, tap_;
  int64_t most_ = 0;
};

}  // namespace
}  // namespace fastconv
