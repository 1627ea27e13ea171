// Operand elements of mma.sync and wgmma as floats.
#pragma once

#include <bit>
#include <cstdint>

#include <cuda_fp16.h>

#include "emulator/wgmma.h"

namespace fastconv::emulator {

constexpr int element_bytes(MatrixType type) { return type == MatrixType::tf32 ? 4 : 2; }
/// The K extent of one instruction: 32 bytes.
constexpr int k_extent(MatrixType type) { return 32 / element_bytes(type); }

inline float element_value(MatrixType type, uint32_t bits) {
  switch (type) {
    case MatrixType::f16:
      return __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
    case MatrixType::bf16:
      return std::bit_cast<float>(bits << 16);
    case MatrixType::tf32:
      return std::bit_cast<float>(bits & ~0x1fffu);  // the hardware ignores the low 13 bits
  }
  return 0;
}

/// Element (row, k) of the 16 x k operand A whose fragments the lanes hold; the layout is in cuda_support/ptx_mma.cuh.
inline float fragment_a_value(MatrixType type, const uint32_t (&fragments)[32][4], int row, int k) {
  if (type == MatrixType::tf32) return element_value(type, fragments[row % 8 * 4 + k % 4][row / 8 + k / 4 * 2]);
  const uint32_t pair = fragments[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
  return element_value(type, pair >> k % 2 * 16 & 0xffff);
}

}  // namespace fastconv::emulator
