// Kernels without tensor cores for test_emulator.py: what the emulator supplies, and mistakes that it must find.
//
// `bug` plants the mistake that its test is about; 0 is the right kernel.
#include "cuda_support/device.h"
#include "cuda_support/dtype.h"
#include "cuda_support/fast_divide.h"
#include "cuda_support/launch.h"
#include "cuda_support/launchers.h"
#include "cuda_support/ptx.cuh"
#include "cuda_support/reduce.cuh"

namespace fastconv::cuda {
namespace {

// ---------------------------------------------------------------- elements

template <class T>
__global__ void scale_kernel(const T* x, T* y, float factor, int64_t count) {
  constexpr int N = kVectorElements<T>;
  const int64_t i = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * N;
  if (i + N <= count) {
    float values[N];
    to_float(load_streaming<N>(x + i), values);
    for (int e = 0; e < N; ++e) values[e] *= factor;
    store_streaming(y + i, from_float<T>(values));
  } else {
    for (int64_t j = i; j < count; ++j) y[j] = from_float<T>(factor * to_float(x[j]));
  }
}

template <class T>
__global__ void convert_kernel(const float* from, T* rounded, float* back, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  rounded[i] = from_float<T>(from[i]);
  back[i] = to_float(rounded[i]);
}

__global__ void divide_kernel(const int64_t* dividends, int64_t* quotients, int64_t* rests, FastDivide divide,
                              int count) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= count) return;
  auto rest = static_cast<uint32_t>(dividends[i]);
  quotients[i] = divide.divide_keep_rest(rest);
  rests[i] = rest;
}

// ---------------------------------------------------------------- blocks and warps

__global__ void identity_kernel(int* out) {  // grid and block of three dimensions
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = static_cast<int>(1000 * block + thread);
}

__global__ void sum_kernel(const float* x, float* sums, int count) {
  float sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += 128) sum += x[blockIdx.x * count + i];
  sum = block_sum<128>(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

/// One warp; 12 results per lane.
__global__ void warp_kernel(const int* x, int* out) {
  const int lane = static_cast<int>(threadIdx.x), value = x[lane];
  int* mine = out + 12 * lane;
  mine[0] = __shfl_sync(~0u, value, 5);
  mine[1] = __shfl_sync(~0u, value, 3, 8);
  mine[2] = __shfl_up_sync(~0u, value, 2);
  mine[3] = __shfl_down_sync(~0u, value, 4, 16);
  mine[4] = __shfl_xor_sync(~0u, value, 1);
  mine[5] = static_cast<int>(__ballot_sync(~0u, value % 3 == 0));
  mine[6] = __any_sync(~0u, value == 7);
  mine[7] = __all_sync(~0u, value >= 0);
  mine[8] = 0;
  if (lane < 8) mine[8] = __shfl_xor_sync(0xffu, value, 7);  // part of the warp
  __syncwarp();
  mine[9] = __popc(static_cast<unsigned>(value)) + __clz(value) + __ffs(value);
  mine[10] = static_cast<int>(__byte_perm(0x03020100u + static_cast<unsigned>(lane), 0x07060504u, 0x2615));
  mine[11] = static_cast<int>(__umulhi(static_cast<unsigned>(value) << 28, 48u));
}

__global__ void vote_kernel(const int* x, int* out) {  // 64 threads
  const int value = x[threadIdx.x];
  const int any = __syncthreads_or(value == 3), all = __syncthreads_and(value < 100);
  const int count = __syncthreads_count(value % 2);
  out[threadIdx.x] = 10000 * any + 1000 * all + count;
}

__global__ void atomic_kernel(const int* x, int* integers, float* sum, unsigned long long* wide, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  atomicAdd(&integers[0], x[i]);
  atomicMax(&integers[1], x[i]);
  atomicMin(&integers[2], x[i]);
  atomicOr(&integers[3], 1 << x[i] % 16);
  atomicCAS(&integers[4], -1, i);
  atomicAdd(sum, static_cast<float>(x[i]));
  atomicAdd(wide, 1ull << 33);
}

// ---------------------------------------------------------------- planted bugs

/// Transposes a 32 x 32 tile through shared memory. Bugs: 1 no barrier, 2 the tile's row is one short, 3 a barrier that
/// half of the threads skip, 4 results written twice by different threads.
__global__ void transpose_kernel(const float* x, float* y, int bug) {
  FASTCONV_DYNAMIC_SHARED(raw);
  auto* tile = reinterpret_cast<float*>(raw);
  const int column = static_cast<int>(threadIdx.x % 32), first = static_cast<int>(threadIdx.x / 32);
  for (int row = first; row < 32; row += 4)
    tile[row * 33 + column + (bug == 2 && row == 31 ? 33 : 0)] = x[row * 32 + column];
  if (bug == 3) {
    if (first < 2) ptx::bar_sync(1, 128);
  } else if (bug != 1) {
    __syncthreads();
  }
  for (int row = first; row < 32; row += 4) {
    y[row * 32 + column] = tile[column * 33 + row];
    if (bug == 4 && row == 5) y[6 * 32 + column] = tile[column * 33 + 6];
  }
}

/// Each warp writes a row and sums it in another order. Bug 1: no __syncwarp between.
__global__ void warp_row_kernel(float* y, int bug) {
  FASTCONV_SHARED(rows, float[4][32]);
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  rows[warp][lane] = static_cast<float>(threadIdx.x);
  if (bug != 1) __syncwarp();
  y[threadIdx.x] = rows[warp][31 - lane];
}

/// Blocks add up their neighbours' values. Bugs: 1 read what another block writes in the same launch, 2 all blocks
/// write one element.
__global__ void neighbour_kernel(float* values, float* out, int bug) {
  values[blockIdx.x + gridDim.x] = 1.0f + static_cast<float>(blockIdx.x);
  const unsigned other = bug == 1 ? gridDim.x + (blockIdx.x + 1) % gridDim.x : blockIdx.x;
  out[bug == 2 ? 0 : blockIdx.x] = values[other];
}

/// Every block writes its part, waits for all others, and reads theirs: a grid barrier by a counter. Bugs: 1 no
/// release, 2 no wait, 3 launched as an ordinary grid.
__global__ void grid_sum_kernel(const float* x, float* parts, uint32_t* arrived, float* out, int bug) {
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = x[2 * blockIdx.x] + x[2 * blockIdx.x + 1];
    if (bug == 1) atomicAdd(arrived, 1u);
    else ptx::red_release_gpu_add(arrived, 1);
    if (bug != 2)
      while (ptx::ld_acquire_gpu(arrived) < gridDim.x) {
      }
    float sum = 0;
    for (unsigned block = 0; block < gridDim.x; ++block) sum += parts[block];
    out[blockIdx.x] = sum;
  }
}

/// Two warps hand a value over through a flag in shared memory, polling.
__global__ void handover_kernel(int* out) {
  FASTCONV_SHARED(flag, int[2]);
  if (threadIdx.x == 0) flag[0] = 0;
  __syncthreads();
  if (threadIdx.x == 40) {
    flag[1] = 42;
    __threadfence_block();
    atomicExch(&flag[0], 1);
  }
  if (threadIdx.x == 0) {
    while (atomicAdd(&flag[0], 0) == 0) __nanosleep(20);
    __threadfence_block();
    out[0] = flag[1];
  }
}

// Shared memory and registers over what a block may have.
__global__ void static_kernel(float* out) {
  FASTCONV_SHARED(large, float[49 * 256]);
  large[threadIdx.x] = 1;
  out[threadIdx.x] = large[threadIdx.x];
}

/// Four warpgroups; the last gives registers to the others. Bug 1: more than there are.
__global__ void __launch_bounds__(512, 1) register_kernel(int* out, int bug) {
  if (threadIdx.x / 128 == 3) ptx::setmaxnreg_dec<40>();
  else if (bug == 1) ptx::setmaxnreg_inc<168>();
  else ptx::setmaxnreg_inc<152>();
  out[threadIdx.x] = 1;
}

}  // namespace

// ---------------------------------------------------------------- launchers

void launch_scale(const PoolProblem& p, const void* x, void* y, double factor, cudaStream_t stream) {
  const int64_t count = p.n * p.c * p.h * p.w;
  dispatch_element("scale", p.dtype, [&](auto element) {
    using T = decltype(element);
    launch(FASTCONV_KERNEL(scale_kernel<T>), blocks_for(count, 256 * kVectorElements<T>), 256, 0, stream,
           static_cast<const T*>(x), static_cast<T*>(y), static_cast<float>(factor), count);
  });
}
FASTCONV_LAUNCHER("scale", "vector", launch_scale);

void launch_convert(DType dtype, const float* from, void* rounded, float* back, int count, cudaStream_t stream) {
  dispatch_element("convert", dtype, [&](auto element) {
    using T = decltype(element);
    launch(FASTCONV_KERNEL(convert_kernel<T>), blocks_for(count, 128), 128, 0, stream, from, static_cast<T*>(rounded),
           back, count);
  });
}
FASTCONV_LAUNCHER("convert", "float", launch_convert);

void launch_divide(const int64_t* dividends, int64_t* quotients, int64_t* rests, int64_t divisor, int count,
                   cudaStream_t stream) {
  launch(FASTCONV_KERNEL(divide_kernel), 1, 1024, 0, stream, dividends, quotients, rests, FastDivide(divisor), count);
}
FASTCONV_LAUNCHER("divide", "fast", launch_divide);

void launch_identity(int* out, cudaStream_t stream) {
  launch(FASTCONV_KERNEL(identity_kernel), dim3(3, 2, 2), dim3(5, 3, 2), 0, stream, out);
}
FASTCONV_LAUNCHER("identity", "3d", launch_identity);

void launch_sum(const float* x, float* sums, int blocks, int count, cudaStream_t stream) {
  launch(FASTCONV_KERNEL(sum_kernel), static_cast<unsigned>(blocks), 128, 0, stream, x, sums, count);
}
FASTCONV_LAUNCHER("sum", "block", launch_sum);

void launch_warp(const int* x, int* out, cudaStream_t stream) {
  launch(FASTCONV_KERNEL(warp_kernel), 1, 32, 0, stream, x, out);
}
FASTCONV_LAUNCHER("warp", "shuffles", launch_warp);

void launch_vote(const int* x, int* out, cudaStream_t stream) {
  launch(FASTCONV_KERNEL(vote_kernel), 1, 64, 0, stream, x, out);
}
FASTCONV_LAUNCHER("vote", "block", launch_vote);

void launch_atomic(const int* x, int* integers, float* sum, unsigned long long* wide, int count, cudaStream_t stream) {
  launch(FASTCONV_KERNEL(atomic_kernel), blocks_for(count, 64), 64, 0, stream, x, integers, sum, wide, count);
}
FASTCONV_LAUNCHER("atomic", "global", launch_atomic);

void launch_transpose(const float* x, float* y, int bug, cudaStream_t stream) {
  launch(FASTCONV_KERNEL(transpose_kernel), 1, 128, 32 * 33 * sizeof(float), stream, x, y, bug);
}
FASTCONV_LAUNCHER("transpose", "tile", launch_transpose);

void launch_warp_row(float* y, int bug, cudaStream_t stream) {
  launch(FASTCONV_KERNEL(warp_row_kernel), 1, 128, 0, stream, y, bug);
}
FASTCONV_LAUNCHER("warp_row", "shared", launch_warp_row);

void launch_neighbour(float* values, float* out, int blocks, int bug, cudaStream_t stream) {
  launch(FASTCONV_KERNEL(neighbour_kernel), static_cast<unsigned>(blocks), 1, 0, stream, values, out, bug);
}
FASTCONV_LAUNCHER("neighbour", "blocks", launch_neighbour);

void launch_grid_sum(const float* x, float* parts, unsigned* arrived, float* out, int blocks, int bug,
                     cudaStream_t stream) {
  launch(FASTCONV_KERNEL(grid_sum_kernel),
         {.grid = static_cast<unsigned>(blocks), .block = 32, .cooperative = bug != 3}, stream, x, parts, arrived, out,
         bug);
}
FASTCONV_LAUNCHER("grid_sum", "cooperative", launch_grid_sum);

void launch_handover(int* out, cudaStream_t stream) { launch(FASTCONV_KERNEL(handover_kernel), 1, 64, 0, stream, out); }
FASTCONV_LAUNCHER("handover", "flag", launch_handover);

void launch_budget(const PoolProblem& p, float* out, int shared_bytes, int threads, cudaStream_t stream) {
  if (shared_bytes < 0) launch(FASTCONV_KERNEL(static_kernel), 1, 32, 0, stream, out);
  else
    launch(FASTCONV_KERNEL(scale_kernel<float>), 1, static_cast<unsigned>(threads), static_cast<size_t>(shared_bytes),
           stream, out, out, 1.0f, p.n);
}
FASTCONV_LAUNCHER("budget", "shared", launch_budget);

void launch_registers(int* out, int bug, cudaStream_t stream) {
  launch(FASTCONV_KERNEL(register_kernel), 1, 512, 0, stream, out, bug);
}
FASTCONV_LAUNCHER("registers", "setmaxnreg", launch_registers);

}  // namespace fastconv::cuda
