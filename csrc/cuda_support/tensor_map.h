// Tensor maps for TMA (sm_90): what a tensor looks like and which box one instruction moves. Host side.
#pragma once

#include <cuda.h>

#include <stdexcept>
#include <string>

#include "cuda_support/cuda.h"
#include "cuda_support/swizzle.h"

namespace fastconv::cuda {

enum class MapElement : int { f16, bf16, f32, tf32 };  // tf32: rounded to nearest even as it is loaded

constexpr int64_t map_element_bytes(MapElement element) {
  return element == MapElement::f16 || element == MapElement::bf16 ? 2 : 4;
}

/// A box of a dense tensor of up to 5 dimensions, innermost first.
struct TiledMap {
  MapElement element;
  int rank;
  const void* base;          // 16-byte aligned
  uint64_t extent[5];        // elements
  uint64_t stride_bytes[4];  // of dimensions 1 and up; multiples of 16
  uint32_t box[5];           // elements, at most 256; box[0] in bytes a multiple of 16, at most the swizzle's row
  Swizzle swizzle;
};

/// Pixels of an NHWC tensor in the order in which a convolution's windows visit them. For a forward convolution
///   lower = -pad, upper = pad - (taps - 1) * dilation, step = stride, in both axes; and for the input gradient of a
/// convolution with stride 1, over the output gradient
///   lower = pad - (taps - 1) * dilation, upper = lower + input size - output size, tap offset (taps - 1 - tap) *
///   dilation.
struct Im2colMap {
  MapElement element;
  const void* base;
  int64_t n, c, h, w;
  int lower_w, lower_h, upper_w, upper_h;  // corners of the bounding box of base pixels, each -128 to 127
  int step_w, step_h;                      // 1 to 8
  int channels, pixels;                    // the box: at most 256 channels, 1024 pixels
  Swizzle swizzle;
};

/// Each throws with the reason that CUDA gives, which is one number for every mistake; the comments above list them.
CUtensorMap encode_tensor_map(const TiledMap& map);
CUtensorMap encode_tensor_map(const Im2colMap& map);

[[noreturn]] inline void refuse_tensor_map(const char* kind, int status) {
  throw std::runtime_error(std::string("CUDA refused a ") + kind + " tensor map (CUresult " + std::to_string(status) +
                           "), expected 16-byte aligned addresses and strides, and a box within the limits that "
                           "cuda_support/tensor_map.h lists; such tensors need a kernel without TMA");
}

#if !defined(FASTCONV_EMULATOR)

/// From the driver that is installed, so that nothing links to libcuda.
template <class Function>
Function driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  if (cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found) != cudaSuccess ||
      found != cudaDriverEntryPointSuccess)
    throw std::runtime_error(std::string("the CUDA driver has no ") + name +
                             ", expected version 12.0 or later; update it or choose a kernel without TMA");
  return reinterpret_cast<Function>(function);
}

inline CUtensorMapDataType driver_type(MapElement element) {
  switch (element) {
    case MapElement::f16:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    case MapElement::bf16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case MapElement::f32:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    case MapElement::tf32:
      return CU_TENSOR_MAP_DATA_TYPE_TFLOAT32;
  }
  throw std::logic_error("unknown tensor map element");
}

inline CUtensorMap encode_tensor_map(const TiledMap& map) {
  static const auto encode = driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  CUtensorMap encoded;
  const cuuint32_t every[5] = {1, 1, 1, 1, 1};
  cuuint64_t extent[5] = {}, stride[5] = {};
  for (int i = 0; i < map.rank; ++i) extent[i] = map.extent[i];
  for (int i = 0; i + 1 < map.rank; ++i) stride[i] = map.stride_bytes[i];
  const CUresult status =
      encode(&encoded, driver_type(map.element), map.rank, const_cast<void*>(map.base), extent, stride, map.box, every,
             CU_TENSOR_MAP_INTERLEAVE_NONE, static_cast<CUtensorMapSwizzle>(map.swizzle),
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) refuse_tensor_map("tiled", status);
  return encoded;
}

inline CUtensorMap encode_tensor_map(const Im2colMap& map) {
  static const auto encode = driver_function<decltype(&cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
  CUtensorMap encoded;
  const auto size = static_cast<cuuint64_t>(map_element_bytes(map.element));
  const auto c = static_cast<cuuint64_t>(map.c), h = static_cast<cuuint64_t>(map.h), w = static_cast<cuuint64_t>(map.w),
             n = static_cast<cuuint64_t>(map.n);
  const cuuint64_t extent[4] = {c, w, h, n}, stride[3] = {c * size, c * w * size, c * w * h * size};
  const cuuint32_t every[4] = {1, static_cast<cuuint32_t>(map.step_w), static_cast<cuuint32_t>(map.step_h), 1};
  // Innermost spatial dimension first: {W, H}. cuda.h's comment says otherwise; measured.
  const int lower[2] = {map.lower_w, map.lower_h}, upper[2] = {map.upper_w, map.upper_h};
  const CUresult status = encode(&encoded, driver_type(map.element), 4, const_cast<void*>(map.base), extent, stride,
                                 lower, upper, map.channels, map.pixels, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                 static_cast<CUtensorMapSwizzle>(map.swizzle), CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) refuse_tensor_map("im2col", status);
  return encoded;
}

#endif

}  // namespace fastconv::cuda
