// ldmatrix, stmatrix and mma.sync.
#include <cstring>

#include "emulator/matrix_type.h"
#include "emulator/ptx.h"
#include "emulator/state.h"

namespace fastconv::emulator {
namespace {

// ---------------------------------------------------------------- ldmatrix

struct MatrixLoad {
  uint32_t address;
  int count;
  bool transposed;
  uint32_t* fragments;
};

void combine_loads(void* const (&operands)[32], Location at) {
  const auto& first = *static_cast<const MatrixLoad*>(operands[0]);
  uint16_t rows[32][8];
  for (int i = 0; i < 8 * first.count; ++i) {
    const uint32_t address = static_cast<const MatrixLoad*>(operands[i])->address;
    std::memcpy(rows[i], resolve(address, 16, "ldmatrix", at), 16);
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto& mine = *static_cast<MatrixLoad*>(operands[lane]);
    if (mine.count != first.count || mine.transposed != first.transposed)
      fail(at, "the lanes of a warp disagree about ldmatrix");
    const int row = lane / 4, column = 2 * (lane % 4);
    for (int m = 0; m < first.count; ++m) {
      const uint16_t (&matrix)[32][8] = rows;
      const uint32_t low = first.transposed ? matrix[8 * m + column][row] : matrix[8 * m + row][column];
      const uint32_t high = first.transposed ? matrix[8 * m + column + 1][row] : matrix[8 * m + row][column + 1];
      mine.fragments[m] = low | high << 16;
    }
  }
}

// ---------------------------------------------------------------- mma.sync

struct FragmentProduct {
  MatrixType type;
  float* d;
  const uint32_t *a, *b;
};

void combine_products(void* const (&operands)[32], Location at) {
  const MatrixType type = static_cast<const FragmentProduct*>(operands[0])->type;
  const int depth = k_extent(type);
  uint32_t fragments[32][4];
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<const FragmentProduct*>(operands[lane]);
    if (mine.type != type) fail(at, "the lanes of a warp disagree about the type of mma.sync");
    std::memcpy(fragments[lane], mine.a, sizeof fragments[lane]);
    const int column = lane / 4, t = lane % 4;
    for (int r = 0; r < 2; ++r) {
      if (type == MatrixType::tf32) {
        b[t + 4 * r][column] = element_value(type, mine.b[r]);
      } else {
        b[2 * t + 8 * r][column] = element_value(type, mine.b[r] & 0xffff);
        b[2 * t + 8 * r + 1][column] = element_value(type, mine.b[r] >> 16);
      }
    }
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < depth; ++k) a[row][k] = fragment_a_value(type, fragments, row, k);
  for (int lane = 0; lane < 32; ++lane) {
    float* d = static_cast<FragmentProduct*>(operands[lane])->d;
    for (int e = 0; e < 4; ++e) {
      const int row = lane / 4 + e / 2 * 8, column = 2 * (lane % 4) + e % 2;
      for (int k = 0; k < depth; ++k) d[e] += a[row][k] * b[k][column];
    }
  }
}

void require_whole_warp(const char* what, Location at) {
  if (active_mask() != ~0u)
    fail(at, "%s by a warp of which lanes %08x are there, expected all 32", what, active_mask());
}

}  // namespace

void load_matrices(uint32_t* fragments, int count, bool transposed, uint32_t address, Location at) {
  require_whole_warp("ldmatrix", at);
  if (lane_index() < 8 * count) {
    require_aligned(address, 16, "ldmatrix", at);
    check_shared(address, 16, Access::read, "ldmatrix", at);
  }
  MatrixLoad mine{address, count, transposed, fragments};
  warp_collective("ldmatrix", ~0u, &mine, combine_loads, at);
}

void multiply_fragments(MatrixType type, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Location at) {
  require_whole_warp("mma.sync", at);
  FragmentProduct mine{type, d, a, b};
  warp_collective("mma.sync", ~0u, &mine, combine_products, at);
}

/// Lanes do not wait for one another: the last one to come writes, and until then the rows hold what they held. That
/// order is what makes a missing __syncwarp() after it visible.
void store_matrices(uint32_t address, const uint32_t (&fragments)[4], bool transposed, Location at) {
  Thread& thread = self();
  Warp& warp = *thread.warp;
  require_aligned(address, 16, "stmatrix", at);
  resolve(address, 16, "stmatrix", at);
  check_shared(address, 16, Access::write, "stmatrix", at);
  const size_t number = thread.extras().stmatrix_sequence++ - warp.matrix_stores_done;
  if (number == warp.matrix_stores.size()) warp.matrix_stores.emplace_back().transposed = transposed;
  MatrixStore& store = warp.matrix_stores[number];
  if (store.transposed != transposed) fail(at, "the lanes of a warp disagree about stmatrix");
  store.address[thread.lane] = address;
  std::memcpy(store.fragment[thread.lane], fragments, sizeof fragments);
  if (++store.lanes < 32) return;
  for (int m = 0; m < 4; ++m)
    for (int row = 0; row < 8; ++row) {
      uint16_t values[8];
      for (int column = 0; column < 8; ++column) {
        const int r = transposed ? column : row, c = transposed ? row : column;
        values[column] = static_cast<uint16_t>(store.fragment[r * 4 + c / 2][m] >> 16 * (c % 2));
      }
      std::memcpy(resolve(store.address[8 * m + row], 16, "stmatrix", at), values, 16);
    }
  ++thread.home->shared_version;
  warp.matrix_stores.pop_front();  // lanes come to them in order, so the oldest is complete first
  ++warp.matrix_stores_done;
}

}  // namespace fastconv::emulator
