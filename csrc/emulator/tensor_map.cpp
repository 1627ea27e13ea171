// Tensor maps, with the refusals of the driver's encoders (facts 2 and 10 of the Hopper notes, README.md).
#include "emulator/tensor_map.h"

#include <cstring>

namespace fastconv::emulator {

uint32_t TensorMap::rows() const {
  if (im2col) return pixels;
  uint32_t count = 1;
  for (int i = 1; i < rank; ++i) count *= box[i];
  return count;
}
uint32_t TensorMap::row_bytes() const { return (im2col ? channels : box[0]) * uint32_t{element_bytes}; }

}  // namespace fastconv::emulator

namespace fastconv::cuda {
namespace {

using emulator::TensorMap;

constexpr int kInvalidValue = 1;  // CUDA_ERROR_INVALID_VALUE, its answer to every mistake

void require(bool condition, const char* kind) {
  if (!condition) refuse_tensor_map(kind, kInvalidValue);
}

CUtensorMap finish(TensorMap& map, MapElement element, const void* base, Swizzle swizzle, const char* kind) {
  map.base = reinterpret_cast<uint64_t>(base);
  map.element_bytes = static_cast<uint8_t>(map_element_bytes(element));
  map.rounds_to_tf32 = element == MapElement::tf32;
  map.swizzle = swizzle;
  map.magic = emulator::kTensorMapMagic;
  require(map.base % 16 == 0, kind);
  require(map.row_bytes() % 16 == 0, kind);
  require(swizzle == Swizzle::none || map.row_bytes() <= swizzle_row_bytes(swizzle), kind);
  CUtensorMap encoded{};
  std::memcpy(encoded.opaque, &map, sizeof map);
  return encoded;
}

void set_axis(TensorMap& map, int axis, uint64_t extent, uint64_t stride_bytes, const char* kind) {
  require(extent >= 1 && extent <= uint64_t{1} << 32, kind);
  map.extent[axis] = static_cast<uint32_t>(extent);
  if (axis == 0) return;
  require(stride_bytes % 16 == 0 && stride_bytes < uint64_t{1} << 40, kind);
  map.stride_bytes[axis - 1] = stride_bytes;
}

}  // namespace

CUtensorMap encode_tensor_map(const TiledMap& tiled) {
  const char* kind = "tiled";
  TensorMap map{};
  require(tiled.rank >= 1 && tiled.rank <= 5, kind);
  map.rank = static_cast<uint8_t>(tiled.rank);
  for (int i = 0; i < tiled.rank; ++i) {
    set_axis(map, i, tiled.extent[i], i ? tiled.stride_bytes[i - 1] : 0, kind);
    require(tiled.box[i] >= 1 && tiled.box[i] <= 256, kind);
    map.box[i] = static_cast<uint16_t>(tiled.box[i]);
  }
  return finish(map, tiled.element, tiled.base, tiled.swizzle, kind);
}

CUtensorMap encode_tensor_map(const Im2colMap& im2col) {
  const char* kind = "im2col";
  TensorMap map{};
  map.rank = 4;
  map.im2col = true;
  const int64_t size = map_element_bytes(im2col.element);
  const int64_t row = im2col.c * size, line = row * im2col.w, image = line * im2col.h;
  set_axis(map, 0, static_cast<uint64_t>(im2col.c), 0, kind);
  set_axis(map, 1, static_cast<uint64_t>(im2col.w), static_cast<uint64_t>(row), kind);
  set_axis(map, 2, static_cast<uint64_t>(im2col.h), static_cast<uint64_t>(line), kind);
  set_axis(map, 3, static_cast<uint64_t>(im2col.n), static_cast<uint64_t>(image), kind);
  require(im2col.channels >= 1 && im2col.channels <= 256 && im2col.pixels >= 1 && im2col.pixels <= 1024, kind);
  map.channels = static_cast<uint16_t>(im2col.channels);
  map.pixels = static_cast<uint16_t>(im2col.pixels);
  const int lower[2] = {im2col.lower_w, im2col.lower_h}, upper[2] = {im2col.upper_w, im2col.upper_h};
  const int step[2] = {im2col.step_w, im2col.step_h};
  for (int i = 0; i < 2; ++i) {
    require(lower[i] >= -128 && lower[i] <= 127 && upper[i] >= -128 && upper[i] <= 127, kind);
    require(step[i] >= 1 && step[i] <= 8, kind);
    require(int64_t{map.extent[1 + i]} + upper[i] - lower[i] > 0, kind);  // a box of base pixels that is not empty
    map.lower[i] = static_cast<int16_t>(lower[i]);
    map.upper[i] = static_cast<int16_t>(upper[i]);
    map.step[i] = static_cast<uint8_t>(step[i]);
  }
  return finish(map, im2col.element, im2col.base, im2col.swizzle, kind);
}

}  // namespace fastconv::cuda
