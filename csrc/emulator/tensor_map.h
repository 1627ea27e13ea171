// What the 128 bytes of a CUtensorMap hold in the emulator.
#pragma once

#include <cuda.h>

#include "cuda_support/tensor_map.h"

namespace fastconv::emulator {

struct TensorMap {
  uint64_t base, stride_bytes[4];
  uint32_t extent[5];
  uint16_t box[5];
  int16_t lower[2], upper[2];  // {w, h}
  uint16_t channels, pixels;
  uint8_t step[2];  // {w, h}
  uint8_t rank, element_bytes;
  Swizzle swizzle;
  bool im2col, rounds_to_tf32;
  uint16_t magic;

  uint32_t rows() const;  // box rows, each of row_bytes()
  uint32_t row_bytes() const;
  uint32_t box_bytes() const { return rows() * row_bytes(); }
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));
constexpr uint16_t kTensorMapMagic = 0x5a7e;

}  // namespace fastconv::emulator
