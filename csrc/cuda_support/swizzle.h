// The swizzles of shared memory that TMA and wgmma share.
#pragma once

#include "cuda_support/cuda.h"

namespace fastconv {

/// A box row of 32, 64 or 128 bytes has its 16-byte chunks exchanged by a pattern that repeats over 256, 512 or 1024
/// bytes: tiles start at a multiple of that.
enum class Swizzle : int { none, bytes32, bytes64, bytes128 };

/// Bytes of a box row under the swizzle, 0 for none.
__host__ __device__ constexpr uint32_t swizzle_row_bytes(Swizzle swizzle) {
  return swizzle == Swizzle::none ? 0 : 16u << static_cast<int>(swizzle);
}

/// Where the byte at `address` of the plain layout lies: address bits 4.. are XORed with 1, 2 or 3 bits from bit 7 up.
/// Absolute addresses count, not offsets in the tile (measured on an H100 with TMA and with wgmma).
__host__ __device__ constexpr uint32_t swizzle_address(uint32_t address, Swizzle swizzle) {
  return address ^ (address >> 7 & ((1u << static_cast<int>(swizzle)) - 1)) << 4;
}

}  // namespace fastconv
