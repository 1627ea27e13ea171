// The emulator's cuda_support/ptx.cuh: the same names and signatures (plus the caller's source location), with what
// each instruction does instead of the instruction. What they may and may not do is documented there.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "cuda_support/cuda.h"
#include "cuda_support/swizzle.h"
#include "emulator/tma.h"
#include "emulator/wgmma.h"

namespace fastconv::emulator {

// barriers.cpp
void bar_sync(int barrier, int threads, Location at);
void bar_arrive(int barrier, int threads, Location at);
void barrier_cluster_arrive(Location at);
void barrier_cluster_wait(Location at);
uint32_t cluster_rank();
void set_max_registers(unsigned registers, bool increase, Location at);

// shared_memory.cpp
uint32_t shared_address(const void* pointer);
uint32_t map_address(uint32_t address, uint32_t rank, Location at);
void store_shared(uint32_t address, const void* value, uint32_t bytes, Location at);
void load_shared(uint32_t address, void* value, uint32_t bytes, Location at);

// atomics.cpp
uint32_t load_acquire(const uint32_t* flag, Location at);
void store_release(uint32_t* flag, uint32_t value, Location at);

// cp_async.cpp
void cp_async(uint32_t destination, const void* source, uint32_t bytes, uint32_t source_bytes, Location at);
void cp_async_commit_group();
void cp_async_wait_group(unsigned pending);

// mbarrier.cpp
void mbarrier_init(uint32_t barrier, uint32_t arrivals, Location at);
void fence_mbarrier_init();
void mbarrier_arrive(uint32_t barrier, uint32_t bytes, Location at);
bool mbarrier_try_wait(uint32_t barrier, uint32_t parity, Location at);
void mbarrier_wait(uint32_t barrier, uint32_t parity, Location at);

// tma.cpp
void tma_load(uint32_t destination, const CUtensorMap* map, uint32_t barrier, unsigned blocks, int rank, bool im2col,
              TmaCoordinates coordinates, Location at);
void tma_store(const CUtensorMap* map, uint32_t source, int rank, bool im2col, TmaCoordinates coordinates, Location at);
void bulk_commit_group();
/// `read_only`: the sources have been read; else the tensor has been written too.
void bulk_wait_group(unsigned pending, bool read_only);
void fence_proxy_async();

// warp_matrix.cpp
void load_matrices(uint32_t* fragments, int count, bool transposed, uint32_t address, Location at);
void store_matrices(uint32_t address, const uint32_t (&fragments)[4], bool transposed, Location at);
void multiply_fragments(MatrixType type, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Location at);

// wgmma.cpp
void wgmma_fence();
void wgmma(const WgmmaShape& shape, float* d, uint64_t a, const uint32_t* fragment_a, uint64_t b, bool scale_d,
           Location at);
void wgmma_commit_group(Location at);
void wgmma_wait_group(unsigned pending, Location at);

}  // namespace fastconv::emulator

namespace fastconv::ptx {

inline uint32_t shared_address(const void* pointer) { return emulator::shared_address(pointer); }

inline bool elect_sync() { return emulator::lane_index() == 0; }
inline uint32_t cluster_ctarank() { return emulator::cluster_rank(); }
inline uint32_t mapa(uint32_t address, uint32_t rank, FASTCONV_HERE) {
  return emulator::map_address(address, rank, at);
}

template <int kRegisters>
void setmaxnreg_inc(FASTCONV_HERE) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulator::set_max_registers(kRegisters, true, at);
}
template <int kRegisters>
void setmaxnreg_dec(FASTCONV_HERE) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulator::set_max_registers(kRegisters, false, at);
}

inline void bar_sync(int barrier, int threads, FASTCONV_HERE) { emulator::bar_sync(barrier, threads, at); }
inline void bar_arrive(int barrier, int threads, FASTCONV_HERE) { emulator::bar_arrive(barrier, threads, at); }
inline void barrier_cluster_arrive(FASTCONV_HERE) { emulator::barrier_cluster_arrive(at); }
inline void barrier_cluster_wait(FASTCONV_HERE) { emulator::barrier_cluster_wait(at); }
inline void barrier_cluster_sync(FASTCONV_HERE) {
  emulator::barrier_cluster_arrive(at);
  emulator::barrier_cluster_wait(at);
}

inline void fence_proxy_async() { emulator::fence_proxy_async(); }
inline void fence_mbarrier_init() { emulator::fence_mbarrier_init(); }

inline void st_shared_v2(uint32_t address, float a, float b, FASTCONV_HERE) {
  const float value[2] = {a, b};
  emulator::store_shared(address, value, 8, at);
}
inline void st_shared_v4(uint32_t address, uint4 value, FASTCONV_HERE) {
  emulator::store_shared(address, &value, 16, at);
}
inline uint4 ld_shared_v4(uint32_t address, FASTCONV_HERE) {
  uint4 value;
  emulator::load_shared(address, &value, 16, at);
  return value;
}

inline uint32_t ld_acquire_gpu(const uint32_t* flag, FASTCONV_HERE) { return emulator::load_acquire(flag, at); }
inline void st_release_gpu(uint32_t* flag, uint32_t value, FASTCONV_HERE) { emulator::store_release(flag, value, at); }
inline void red_release_gpu_add(uint32_t* flag, uint32_t value, FASTCONV_HERE) {
  emulator::thread_fence();
  atomicAdd(flag, value, at);
}

// ---------------------------------------------------------------- ptx_async.cuh

inline void cp_async_cg_16(uint32_t destination, const void* source, int source_bytes = 16, FASTCONV_HERE) {
  emulator::cp_async(destination, source, 16, static_cast<uint32_t>(source_bytes), at);
}
template <int kBytes>
void cp_async_ca(uint32_t destination, const void* source, int source_bytes = kBytes, FASTCONV_HERE) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulator::cp_async(destination, source, kBytes, static_cast<uint32_t>(source_bytes), at);
}
inline void cp_async_commit_group() { emulator::cp_async_commit_group(); }
template <int kPending>
void cp_async_wait_group() {
  emulator::cp_async_wait_group(kPending);
}

inline void mbarrier_init(uint32_t barrier, uint32_t arrivals, FASTCONV_HERE) {
  emulator::mbarrier_init(barrier, arrivals, at);
}
inline void mbarrier_arrive(uint32_t barrier, FASTCONV_HERE) { emulator::mbarrier_arrive(barrier, 0, at); }
inline void mbarrier_arrive_cluster(uint32_t barrier, uint32_t rank, FASTCONV_HERE) {
  emulator::mbarrier_arrive(emulator::map_address(barrier, rank, at), 0, at);
}
inline void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes, FASTCONV_HERE) {
  emulator::mbarrier_arrive(barrier, bytes, at);
}
inline bool mbarrier_try_wait_parity(uint32_t barrier, uint32_t parity, FASTCONV_HERE) {
  return emulator::mbarrier_try_wait(barrier, parity, at);
}
inline void mbarrier_wait_parity(uint32_t barrier, uint32_t parity, FASTCONV_HERE) {
  emulator::mbarrier_wait(barrier, parity, at);
}

// ---------------------------------------------------------------- ptx_tma.cuh

inline void prefetch_tensormap(const CUtensorMap*) {}
inline void cp_async_bulk_tensor_2d(uint32_t destination, const CUtensorMap* map, uint32_t barrier, int c0, int c1,
                                    FASTCONV_HERE) {
  emulator::tma_load(destination, map, barrier, 0, 2, false, {{c0, c1}}, at);
}
inline void cp_async_bulk_tensor_3d(uint32_t destination, const CUtensorMap* map, uint32_t barrier, int c0, int c1,
                                    int c2, FASTCONV_HERE) {
  emulator::tma_load(destination, map, barrier, 0, 3, false, {{c0, c1, c2}}, at);
}
inline void cp_async_bulk_tensor_4d(uint32_t destination, const CUtensorMap* map, uint32_t barrier, int c0, int c1,
                                    int c2, int c3, FASTCONV_HERE) {
  emulator::tma_load(destination, map, barrier, 0, 4, false, {{c0, c1, c2, c3}}, at);
}
inline void cp_async_bulk_tensor_3d_multicast(uint32_t destination, const CUtensorMap* map, uint32_t barrier,
                                              uint16_t blocks, int c0, int c1, int c2, FASTCONV_HERE) {
  emulator::tma_load(destination, map, barrier, blocks, 3, false, {{c0, c1, c2}}, at);
}
struct Im2colStart {
  int c, w, h, n, offset_w, offset_h;
};
inline void cp_async_bulk_tensor_4d_im2col(uint32_t destination, const CUtensorMap* map, uint32_t barrier,
                                           Im2colStart start, FASTCONV_HERE) {
  emulator::tma_load(destination, map, barrier, 0, 4, true,
                     {{start.c, start.w, start.h, start.n}, start.offset_w, start.offset_h}, at);
}
inline void cp_async_bulk_tensor_4d_im2col_multicast(uint32_t destination, const CUtensorMap* map, uint32_t barrier,
                                                     uint16_t blocks, Im2colStart start, FASTCONV_HERE) {
  emulator::tma_load(destination, map, barrier, blocks, 4, true,
                     {{start.c, start.w, start.h, start.n}, start.offset_w, start.offset_h}, at);
}
inline void cp_async_bulk_tensor_2d_store(const CUtensorMap* map, uint32_t source, int c0, int c1, FASTCONV_HERE) {
  emulator::tma_store(map, source, 2, false, {{c0, c1}}, at);
}
inline void cp_async_bulk_tensor_3d_store(const CUtensorMap* map, uint32_t source, int c0, int c1, int c2,
                                          FASTCONV_HERE) {
  emulator::tma_store(map, source, 3, false, {{c0, c1, c2}}, at);
}
inline void cp_async_bulk_tensor_4d_im2col_store(const CUtensorMap* map, uint32_t source, int c, int w, int h, int n,
                                                 FASTCONV_HERE) {
  emulator::tma_store(map, source, 4, true, {{c, w, h, n}}, at);
}
inline void cp_async_bulk_commit_group() { emulator::bulk_commit_group(); }
template <int kPending>
void cp_async_bulk_wait_group_read() {
  emulator::bulk_wait_group(kPending, true);
}
template <int kPending>
void cp_async_bulk_wait_group() {
  emulator::bulk_wait_group(kPending, false);
}

// ---------------------------------------------------------------- ptx_mma.cuh

struct tf32 {};
inline uint32_t cvt_rna_tf32(float value) {
  const uint32_t bits = __float_as_uint(value);
  return (bits & 0x7f800000) == 0x7f800000 ? bits : (bits + 0x1000) & ~0x1fffu;
}

template <class T>
constexpr emulator::MatrixType matrix_type = std::is_same_v<T, __half>          ? emulator::MatrixType::f16
                                             : std::is_same_v<T, __nv_bfloat16> ? emulator::MatrixType::bf16
                                                                                : emulator::MatrixType::tf32;

#define FASTCONV_LDMATRIX(name, count, transposed)                          \
  inline void name(uint32_t (&r)[count], uint32_t address, FASTCONV_HERE) { \
    emulator::load_matrices(r, count, transposed, address, at);             \
  }
FASTCONV_LDMATRIX(ldmatrix_x1, 1, false)
FASTCONV_LDMATRIX(ldmatrix_x2, 2, false)
FASTCONV_LDMATRIX(ldmatrix_x4, 4, false)
FASTCONV_LDMATRIX(ldmatrix_x1_trans, 1, true)
FASTCONV_LDMATRIX(ldmatrix_x2_trans, 2, true)
FASTCONV_LDMATRIX(ldmatrix_x4_trans, 4, true)
#undef FASTCONV_LDMATRIX

inline void stmatrix_x4(uint32_t address, const uint32_t (&r)[4], FASTCONV_HERE) {
  emulator::store_matrices(address, r, false, at);
}
inline void stmatrix_x4_trans(uint32_t address, const uint32_t (&r)[4], FASTCONV_HERE) {
  emulator::store_matrices(address, r, true, at);
}
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], FASTCONV_HERE) {
  static_assert(matrix_type<T> != emulator::MatrixType::tf32, "half or bfloat16");
  emulator::multiply_fragments(matrix_type<T>, d, a, b, at);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], FASTCONV_HERE) {
  emulator::multiply_fragments(emulator::MatrixType::tf32, d, a, b, at);
}

// ---------------------------------------------------------------- ptx_wgmma.cuh

inline uint64_t wgmma_descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes,
                                 Swizzle swizzle = Swizzle::bytes128) {
  const uint64_t mode = swizzle == Swizzle::none ? 0 : 4 - static_cast<int>(swizzle);
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(stride_bytes >> 4) << 32 | mode << 62;
}
inline void wgmma_fence() { emulator::wgmma_fence(); }
inline void wgmma_commit_group(FASTCONV_HERE) { emulator::wgmma_commit_group(at); }
template <int kPending>
void wgmma_wait_group(FASTCONV_HERE) {
  emulator::wgmma_wait_group(kPending, at);
}

/// The numbers of columns that ptx_wgmma.cuh has specialisations for.
template <int N>
concept WgmmaColumns = N == 8 || N == 16 || (N % 32 == 0 && N >= 32 && N <= 256);

template <class T, int N, int kMnMajorA = 0, int kMnMajorB = 0>
  requires WgmmaColumns<N>
void wgmma_mma_async(float (&d)[N / 2], uint64_t a, uint64_t b, int scale_d, FASTCONV_HERE) {
  static_assert(matrix_type<T> != emulator::MatrixType::tf32 || (!kMnMajorA && !kMnMajorB), "tf32 is K-major");
  emulator::wgmma({matrix_type<T>, N, kMnMajorA != 0, kMnMajorB != 0, false}, d, a, nullptr, b, scale_d != 0, at);
}
template <class T, int N, int kMnMajorB = 0>
  requires WgmmaColumns<N>
void wgmma_mma_async(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int scale_d, FASTCONV_HERE) {
  static_assert(matrix_type<T> != emulator::MatrixType::tf32 || !kMnMajorB, "tf32 is K-major");
  emulator::wgmma({matrix_type<T>, N, false, kMnMajorB != 0, true}, d, 0, a, b, scale_d != 0, at);
}

}  // namespace fastconv::ptx
