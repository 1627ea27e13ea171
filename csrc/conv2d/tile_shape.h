// The register tile of each instruction set, for whoever describes it without being compiled for it. The kernels have
// these numbers in cpu_tile.h, where the reasons are; tests/test_explain.py holds the two files together.
#pragma once

#include "common/isa.h"
#include "common/problem.h"

namespace fastconv {

struct TileShape {
  int64_t rows, vectors, vector_bytes;

  /// Columns of a tile whose sums are kept in float64 for float64 storage, else in float32.
  constexpr int64_t columns(DType dtype) const { return vectors * vector_bytes / (dtype == DType::f64 ? 8 : 4); }
};

inline TileShape tile_shape(Isa isa) {
  switch (isa) {
    case Isa::avx512_bf16:
    case Isa::avx512:
      return {12, 2, 64};
    case Isa::avx2:
      return {6, 2, 32};
    case Isa::neon:
      return {6, 4, 16};
    case Isa::generic:
      return {4, 2, 16};
  }
  throw std::logic_error("unknown instruction set");
}

}  // namespace fastconv
