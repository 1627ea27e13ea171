// Activations from one layout to the other, where a network's own layout meets its caller's.
#pragma once

#include "common/parallel.h"
#include "common/problem.h"

namespace fastconv {

/// y[n][column][row] = x[n][row][column].
template <class T>
void transpose_images(const T* x, T* y, int64_t images, int64_t rows, int64_t columns) {
  constexpr int64_t kBlock = 64;  // columns: each row of x is read a few cache lines at a time
  const int64_t blocks = ceil_div(columns, kBlock);
  parallel_for(0, images * blocks, ceil_div(16384, kBlock * rows), [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t first = index % blocks * kBlock, last = min_of(columns, first + kBlock);
      const T* from = x + index / blocks * rows * columns;
      T* to = y + index / blocks * rows * columns;
      if (rows <= 4) {
        for (int64_t column = first; column < last; ++column)
          for (int64_t row = 0; row < rows; ++row) to[column * rows + row] = from[row * columns + column];
        continue;
      }
      for (int64_t row = 0; row < rows; row += 16)
        for (int64_t column = first; column < last; ++column)
          for (int64_t r = row; r < min_of(rows, row + 16); ++r) to[column * rows + r] = from[r * columns + column];
    }
  });
}

}  // namespace fastconv
