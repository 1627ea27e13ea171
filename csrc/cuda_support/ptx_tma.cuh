// TMA: loads and stores of whole boxes (cp.async.bulk.tensor, sm_90). Part of ptx.cuh.
//
// One thread issues. The shared address is 128-byte aligned (1024 with the 128-byte swizzle). The tensor map
// (tensor_map.h) is a `const __grid_constant__` kernel parameter. Coordinates are in elements, innermost first.
// A load completes on `barrier` with the bytes of the whole box, what lies outside the tensor (read as zero) included.
#pragma once

#include <cuda.h>

#include "cuda_support/cuda.h"

namespace fastconv::ptx {

/// prefetch.tensormap: fetches the 128 bytes of the map before the first use.
__device__ __forceinline__ void prefetch_tensormap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// ---------------------------------------------------------------- loads

#define FASTCONV_TMA_LOAD(dimensions, mode) \
  "cp.async.bulk.tensor." dimensions ".shared::cluster.global." mode ".mbarrier::complete_tx::bytes"

/// cp.async.bulk.tensor.Nd ... tile
__device__ __forceinline__ void cp_async_bulk_tensor_2d(uint32_t destination, const CUtensorMap* map, uint32_t barrier,
                                                        int c0, int c1) {
  asm volatile(FASTCONV_TMA_LOAD("2d", "tile") " [%0], [%1, {%3, %4}], [%2];" ::"r"(destination), "l"(map),
               "r"(barrier), "r"(c0), "r"(c1)
               : "memory");
}
__device__ __forceinline__ void cp_async_bulk_tensor_3d(uint32_t destination, const CUtensorMap* map, uint32_t barrier,
                                                        int c0, int c1, int c2) {
  asm volatile(FASTCONV_TMA_LOAD("3d", "tile") " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(destination), "l"(map),
               "r"(barrier), "r"(c0), "r"(c1), "r"(c2)
               : "memory");
}
__device__ __forceinline__ void cp_async_bulk_tensor_4d(uint32_t destination, const CUtensorMap* map, uint32_t barrier,
                                                        int c0, int c1, int c2, int c3) {
  asm volatile(FASTCONV_TMA_LOAD("4d", "tile") " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(destination), "l"(map),
               "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}

/// ... .multicast::cluster: the box lands at the same place in every block of `blocks` (a bit mask of ranks), and the
/// barrier at the same place as `barrier` in each of them receives the bytes of the whole box.
__device__ __forceinline__ void cp_async_bulk_tensor_3d_multicast(uint32_t destination, const CUtensorMap* map,
                                                                  uint32_t barrier, uint16_t blocks, int c0, int c1,
                                                                  int c2) {
  asm volatile(
      FASTCONV_TMA_LOAD("3d", "tile") ".multicast::cluster [%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(destination),
      "l"(map), "r"(barrier), "h"(blocks), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

/// Where an im2col box starts: channel, then the first base pixel, which must lie inside the map's bounding box (below
/// it is error 715, not zeros) and on its stride lattice: w = q * stride_w - pad_w, h = p * stride_h - pad_h.
/// `offset_w` and `offset_h` (0 to 255) are the filter tap: s * dilation_w, r * dilation_h.
struct Im2colStart {
  int c, w, h, n, offset_w, offset_h;
};

/// cp.async.bulk.tensor.4d ... im2col, NHWC tensors as {C, W, H, N}. The box walks w, then h, then n: the order of
/// output pixels, over the ends of rows and images. Pixels of images below 0 or past the last are zeros.
__device__ __forceinline__ void cp_async_bulk_tensor_4d_im2col(uint32_t destination, const CUtensorMap* map,
                                                               uint32_t barrier, Im2colStart start) {
  asm volatile(FASTCONV_TMA_LOAD("4d", "im2col") " [%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(destination),
               "l"(map), "r"(barrier), "r"(start.c), "r"(start.w), "r"(start.h), "r"(start.n),
               "h"(static_cast<uint16_t>(start.offset_w)), "h"(static_cast<uint16_t>(start.offset_h))
               : "memory");
}
__device__ __forceinline__ void cp_async_bulk_tensor_4d_im2col_multicast(uint32_t destination, const CUtensorMap* map,
                                                                         uint32_t barrier, uint16_t blocks,
                                                                         Im2colStart start) {
  asm volatile(FASTCONV_TMA_LOAD("4d", "im2col") ".multicast::cluster [%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8}, "
                                                 "%9;" ::"r"(destination),
               "l"(map), "r"(barrier), "r"(start.c), "r"(start.w), "r"(start.h), "r"(start.n),
               "h"(static_cast<uint16_t>(start.offset_w)), "h"(static_cast<uint16_t>(start.offset_h)), "h"(blocks)
               : "memory");
}

#undef FASTCONV_TMA_LOAD

// ---------------------------------------------------------------- stores

/// cp.async.bulk.tensor.Nd.global.shared::cta ... tile: what lies outside the tensor is not written. The writers of the
/// source execute fence_proxy_async and a barrier first.
__device__ __forceinline__ void cp_async_bulk_tensor_2d_store(const CUtensorMap* map, uint32_t source, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(source), "r"(c0), "r"(c1)
               : "memory");
}
__device__ __forceinline__ void cp_async_bulk_tensor_3d_store(const CUtensorMap* map, uint32_t source, int c0, int c1,
                                                              int c2) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
               "r"(source), "r"(c0), "r"(c1), "r"(c2)
               : "memory");
}

/// ... im2col_no_offs: the pixels that a load from the same start with offsets of 0 reads are written, those outside of
/// the tensor are not. By the manual; not tried on hardware yet.
__device__ __forceinline__ void cp_async_bulk_tensor_4d_im2col_store(const CUtensorMap* map, uint32_t source, int c,
                                                                     int w, int h, int n) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.im2col_no_offs.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
      "r"(source), "r"(c), "r"(w), "r"(h), "r"(n)
      : "memory");
}

/// cp.async.bulk.commit_group, wait_group: groups are per thread, so the thread that stored waits. With _read the
/// sources may be overwritten afterwards; without it the tensor has been written too.
__device__ __forceinline__ void cp_async_bulk_commit_group() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void cp_async_bulk_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
template <int kPending>
__device__ __forceinline__ void cp_async_bulk_wait_group() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace fastconv::ptx
