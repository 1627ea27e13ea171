// Convolution in strict float32 as a matrix product on ordinary lanes (SIMT): every product and sum is an fmaf.
//
// A block computes a tile of 128x128, 128x64 or 64x64 results, a thread 8x8 of them in registers. For every 8 steps of
// the depth, cp.async brings 8 elements of each row and column of the tile to shared memory, zeros for those that do
// not exist, while the products of the 8 steps before are summed (double buffering). A group of four steps is 16 loads
// of 16 bytes from shared memory for 256 multiply-adds.
//
// What is copied is found in tables of Places (cuda_implicit_gemm.cuh): one for each row and column of the tile, made
// once, and one for each step of the depth, made 32 at a time, by a lane each. A copy adds two offsets.
#pragma once

#include "conv2d/cuda_flat_epilogue.cuh"
#include "conv2d/cuda_implicit_gemm.cuh"
#include "conv2d/cuda_implicit_gemm_plan.h"
#include "cuda_support/dtype.h"
#include "cuda_support/launch.h"
#include "cuda_support/ptx.cuh"

namespace fastconv::cuda {
namespace {

constexpr int kDepth = static_cast<int>(kGemmDepth);
constexpr int kOwn = 8;     // rows and columns of a thread
constexpr int kSteps = 32;  // of the depth, looked up at once
constexpr int kStagesLookedUp = kSteps / kDepth;
constexpr int64_t kBytes = sizeof(float);

template <int kRows_, int kColumns_>
struct SimtTile {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kThreads = kRows * kColumns / (kOwn * kOwn);
  static constexpr int kPitch = kColumns + 8;  // of results on their way out: threads' rows in different banks
  static_assert(kRows / kOwn * kPitch <= 2 * (kRows + kColumns) * kDepth, "results leave through the stages' memory");
};

/// The operands and the result, and how far a group is from the one before.
struct SimtTensors {
  const float *rows, *columns;
  float* result;
  int64_t rows_group, columns_group, result_group;
  int64_t split_elements;  // between the results of a part of the depth and those of the next
  uint32_t row_tiles, column_tiles;
};

struct SimtEpilogue : FlatEpilogue {
  ChannelNumbers scale, shift;

  SimtEpilogue() = default;
  explicit SimtEpilogue(const CudaEpilogue& epilogue)
      : FlatEpilogue(epilogue), scale(epilogue.scale), shift(epilogue.shift) {}
};

/// Which tile a block has. Tiles that differ in their channels alone come one after another: they read the same image.
struct SimtBlock {
  uint32_t row, column, group, phase;
  uint32_t first_stage;  // of its share of the depth

  template <class Tile, bool kRowsFirst>
  static __device__ __forceinline__ SimtBlock find(const ImplicitGemm& gemm, const SimtTensors& at) {
    const uint32_t fast = kRowsFirst ? at.row_tiles : at.column_tiles,
                   slow = kRowsFirst ? at.column_tiles : at.row_tiles;
    uint32_t index = blockIdx.x;
    const uint32_t first = index % fast, second = index / fast % slow;
    index = index / fast / slow;
    return {(kRowsFirst ? first : second) * Tile::kRows, (kRowsFirst ? second : first) * Tile::kColumns,
            index % gemm.groups, index / gemm.groups, 0};
  }
};

template <class Tile>
struct SimtMemory {
  alignas(16) float stages[2][(Tile::kRows + Tile::kColumns) * kDepth];
  Place rows[Tile::kRows], columns[Tile::kColumns];  // in the operands, in the end in the result
  Place row_steps[2][kSteps], column_steps[2][kSteps];
  float scale[128], shift[128];
  // The same for all threads: kept here instead of in registers, which the sums need.
  Windows windows;
  SimtBlock block;
};

/// Where a stage has the element of a line (row or column of the tile) and a step. Copies go along memory, so either
/// the steps of a line lie together, or the lines of a step. In the first case four steps are one load, and the two
/// loads of a line change places in every other group of four lines: eight neighbouring lines are in eight groups of
/// banks.
template <bool kAlongDepth, int kLines>
__device__ __forceinline__ int place_in_stage(int line, int step) {
  if constexpr (kAlongDepth) return line * kDepth + ((step / 4) ^ (line / 4 % 2)) * 4 + step % 4;
  else return step * kLines + line;
}

/// Line `i` of the 8 that belong to the thread at place `own` along this side.
template <bool kAlongDepth, int kLines>
__device__ __forceinline__ int own_line(int own, int i) {
  if constexpr (kAlongDepth) return own + i * (kLines / kOwn);
  else return i / 4 * (kLines / 2) + own * 4 + i % 4;
}

/// Starts the copies of a stage of one operand, `kVector` elements each. An address that does not exist is not read,
/// and may be anything.
template <class Tile, bool kAlongDepth, int kLines, int kVector>
__device__ __forceinline__ void copy_stage(const Place* lines, const Place* steps, float* stage) {
  static_assert(kVector == 1 || kVector == 4);
  constexpr int kCopies = kLines * kDepth / kVector / Tile::kThreads;
  // Of what lies along memory, all vectors are shared out among neighbouring threads.
  constexpr int kNeighbours = kAlongDepth ? kDepth / kVector : kLines / kVector;
  constexpr int kFurther = Tile::kThreads / kNeighbours;  // lines or steps from one copy of a thread to the next
  static_assert(Tile::kThreads % kNeighbours == 0 && (!kAlongDepth || kFurther % 8 == 0), "copies are evenly spaced");
  const int along = static_cast<int>(threadIdx.x) % kNeighbours * kVector;
  const int across = static_cast<int>(threadIdx.x) / kNeighbours;
  const int line = kAlongDepth ? across : along, step = kAlongDepth ? along : across;
  const uint32_t to = ptx::shared_address(stage + place_in_stage<kAlongDepth, kLines>(line, step));
  const Place same = kAlongDepth ? steps[step] : lines[line];
  const Place* others = kAlongDepth ? lines + line : steps + step;
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    const Place other = others[i * kFurther];
    const bool exists = meet(same, other);
    const auto* from = reinterpret_cast<const float*>(same.offset + other.offset);
    const uint32_t at = to + 4 * i * kFurther * (kAlongDepth ? kDepth : kLines);
    if constexpr (kVector == 4) ptx::cp_async_cg_16(at, from, exists ? 16 : 0);
    else ptx::cp_async_ca<4>(at, from, exists ? 4 : 0);
  }
}

/// The place with its offset in units of an element: 1, or bytes. Places in the operands are addresses: that of the
/// tensor is in the lines.
template <int64_t kUnit>
__device__ __forceinline__ Place in_units(Place at) {
  at.offset *= kUnit;
  return at;
}

/// The table of one side of the tile, from index `first` on, with `origin` added to every offset.
template <int64_t kUnit, GemmTensor kTensor, GemmAxis kAxis, Layout kLayout, class Tile, int kLines>
__device__ __forceinline__ void fill_lines(const ImplicitGemm& gemm, const SimtMemory<Tile>& shared, uint32_t first,
                                           int64_t origin, Place (&lines)[kLines]) {
#pragma unroll 1
  for (int i = threadIdx.x; i < kLines; i += Tile::kThreads) {
    Place at = in_units<kUnit>(place_of<kTensor, kAxis, kLayout>(gemm, shared.windows, first + i));
    at.offset += origin;
    lines[i] = at;
  }
}

/// The tables of the next 32 steps, by two warps.
template <ConvPass kPass, Layout kLayout, class Tile>
__device__ __forceinline__ void look_up_steps(const ImplicitGemm& gemm, SimtMemory<Tile>& shared, int batch) {
  using Sides = GemmSides<kPass, kLayout>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t step = (shared.block.first_stage + batch * kStagesLookedUp) * kDepth + lane;
  if (warp == 0)
    shared.row_steps[batch % 2][lane] =
        in_units<kBytes>(place_of<Sides::kRowsTensor, Sides::kDepth, kLayout>(gemm, shared.windows, step));
  if (warp == Tile::kThreads / 32 - 1)
    shared.column_steps[batch % 2][lane] =
        in_units<kBytes>(place_of<Sides::kColumnsTensor, Sides::kDepth, kLayout>(gemm, shared.windows, step));
}

/// Stages of a block's share of the depth: all but the last blocks have as many.
template <GemmAxis kDepthAxis>
__device__ __forceinline__ uint32_t share_of(const ImplicitGemm& gemm, const Windows& windows) {
  const uint32_t stages = (extent<kDepthAxis>(gemm, windows) + kDepth - 1) / kDepth;
  return (stages + gridDim.y - 1) / gridDim.y;
}
template <GemmAxis kDepthAxis>
__device__ __forceinline__ int stages_of(const ImplicitGemm& gemm, const Windows& windows, const SimtBlock& block) {
  const uint32_t stages = (extent<kDepthAxis>(gemm, windows) + kDepth - 1) / kDepth;
  const uint32_t share = share_of<kDepthAxis>(gemm, windows);
  return block.first_stage < stages ? static_cast<int>(min(share, stages - block.first_stage)) : 0;
}

/// The 16-byte load number `v` of 8 that bring a group of four steps: four steps of line v, or four lines of a step.
template <bool kAlongDepth, int kLines>
__device__ __forceinline__ Vector<float, 4> load_own(const float* stage, int own, int group, int v) {
  const int line = own_line<kAlongDepth, kLines>(own, kAlongDepth ? v : v / 4 * 4);
  return load_vector<4>(stage + place_in_stage<kAlongDepth, kLines>(line, group * 4 + (kAlongDepth ? 0 : v % 4)));
}
/// Which of the thread's lines, and which step of the group, is element e of that load.
template <bool kAlongDepth>
__device__ __forceinline__ constexpr int loaded_line(int v, int e) {
  return kAlongDepth ? v : v / 4 * 4 + e;
}
template <bool kAlongDepth>
__device__ __forceinline__ constexpr int loaded_step(int v, int e) {
  return kAlongDepth ? e : v % 4;
}

/// sum += the products of a stage, in the order of the depth.
template <class Tile, bool kRowsAlongDepth, bool kColumnsAlongDepth>
__device__ __forceinline__ void multiply_stage(const float* stage, int own_row, int own_column,
                                               float (&sum)[kOwn][kOwn]) {
  const float* columns_stage = stage + Tile::kRows * kDepth;
  // Two groups at once would need more than the 128 registers that let 512 threads share a multiprocessor.
#pragma unroll 1
  for (int group = 0; group < kDepth / 4; ++group) {
    float columns[kOwn][4];
#pragma unroll
    for (int v = 0; v < kOwn; ++v) {
      const Vector<float, 4> loaded = load_own<kColumnsAlongDepth, Tile::kColumns>(columns_stage, own_column, group, v);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        columns[loaded_line<kColumnsAlongDepth>(v, e)][loaded_step<kColumnsAlongDepth>(v, e)] = loaded[e];
    }
#pragma unroll
    for (int v = 0; v < kOwn; ++v) {
      const Vector<float, 4> loaded = load_own<kRowsAlongDepth, Tile::kRows>(stage, own_row, group, v);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = loaded_line<kRowsAlongDepth>(v, e), step = loaded_step<kRowsAlongDepth>(v, e);
#pragma unroll
        for (int j = 0; j < kOwn; ++j) sum[row][j] = fmaf(loaded[e], columns[j][step], sum[row][j]);
      }
    }
  }
}

/// What the epilogue does to each channel of the tile.
template <bool kChannelIsColumn, class Tile>
__device__ __forceinline__ void fill_scales(const ImplicitGemm& gemm, const SimtEpilogue& epilogue,
                                            SimtMemory<Tile>& shared) {
  const uint32_t first = kChannelIsColumn ? shared.block.column : shared.block.row;
  for (int i = threadIdx.x; i < (kChannelIsColumn ? Tile::kColumns : Tile::kRows); i += Tile::kThreads) {
    const bool exists = first + i < gemm.grid_channels;
    const int64_t channel = int64_t{shared.block.group} * gemm.grid_channels + first + i;
    shared.scale[i] = exists && epilogue.scale.data != nullptr ? epilogue.scale.at(channel) : 1.0f;
    shared.shift[i] = exists && epilogue.shift.data != nullptr ? epilogue.shift.at(channel) : 0.0f;
  }
}

/// The results leave by way of shared memory, an eighth of every thread's rows at a time, so that neighbouring threads
/// write neighbouring addresses, four at a time where four columns lie together.
template <class Tile, bool kRowsAlongDepth, bool kColumnsAlongDepth, bool kChannelIsColumn, bool kHasEpilogue>
__device__ __forceinline__ void store_results(SimtMemory<Tile>& shared, int own_row, int own_column,
                                              float (&sum)[kOwn][kOwn], float* result, const SimtEpilogue& epilogue) {
  float* staged = shared.stages[0];
#pragma unroll 1
  for (int i = 0; i < kOwn; ++i) {
#pragma unroll
    for (int j = 0; j < kOwn; ++j)
      staged[own_row * Tile::kPitch + own_line<kColumnsAlongDepth, Tile::kColumns>(own_column, j)] = sum[0][j];
    // Registers have no index that changes at run time, so the rows move up.
#pragma unroll
    for (int row = 1; row < kOwn; ++row)
#pragma unroll
      for (int j = 0; j < kOwn; ++j) sum[row - 1][j] = sum[row][j];
    __syncthreads();
#pragma unroll 1
    for (int e = threadIdx.x; e < Tile::kRows / kOwn * (Tile::kColumns / 4); e += Tile::kThreads) {
      const int own = e / (Tile::kColumns / 4), column = e % (Tile::kColumns / 4) * 4;
      const int row = own_line<kRowsAlongDepth, Tile::kRows>(own, i);
      const Place at_row = shared.rows[row];
      const int64_t first = at_row.offset + shared.columns[column].offset;
      Vector<float, 4> values = load_vector<4>(staged + own * Tile::kPitch + column);
      bool exists[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const Place at = shared.columns[column + n];
        exists[n] = meet(at_row, at);
        if constexpr (kHasEpilogue) {
          const int channel = kChannelIsColumn ? column + n : row;
          const float scaled = values[n] * shared.scale[channel] + shared.shift[channel];
          if (exists[n]) values[n] = epilogue.finish<float>(scaled, at_row.offset + at.offset);
        }
      }
      const bool together = exists[3] && shared.columns[column + 3].offset == shared.columns[column].offset + 3;
      if (together && reinterpret_cast<uintptr_t>(result + first) % 16 == 0) {
        store_vector<4>(result + first, values);
      } else {
#pragma unroll
        for (int n = 0; n < 4; ++n)
          if (exists[n]) result[at_row.offset + shared.columns[column + n].offset] = values[n];
      }
    }
    __syncthreads();
  }
}

template <ConvPass kPass, Layout kLayout, class Tile, int kRowVector, int kColumnVector>
__global__ void __launch_bounds__(Tile::kThreads, 512 / Tile::kThreads)
    implicit_gemm_fp32(ImplicitGemm gemm, SimtTensors at, SimtEpilogue epilogue) {
  using Sides = GemmSides<kPass, kLayout>;
  constexpr bool kHasEpilogue = kPass == ConvPass::forward;
  constexpr bool kRowsAlongDepth = Sides::contiguous(Sides::kRowsTensor, kRowVector) == Sides::kDepth;
  constexpr bool kColumnsAlongDepth = Sides::contiguous(Sides::kColumnsTensor, kColumnVector) == Sides::kDepth;
  FASTCONV_SHARED(shared, SimtMemory<Tile>);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    shared.block = SimtBlock::find<Tile, Sides::kRows == GemmAxis::channels>(gemm, at);
    shared.windows = windows_of<kPass>(gemm, shared.block.phase);
    shared.block.first_stage = blockIdx.y * share_of<Sides::kDepth>(gemm, shared.windows);
  }
  __syncthreads();
  const Windows& windows = shared.windows;
  const SimtBlock& block = shared.block;
  // A phase may have fewer pixels than the first.
  if (block.row >= extent<Sides::kRows>(gemm, windows) || block.column >= extent<Sides::kColumns>(gemm, windows))
    return;

  const auto copy = [&](int stage) {
    const int table = stage / kStagesLookedUp % 2, step = stage % kStagesLookedUp * kDepth;
    float* to = shared.stages[stage % 2];
    copy_stage<Tile, kRowsAlongDepth, Tile::kRows, kRowVector>(shared.rows, shared.row_steps[table] + step, to);
    copy_stage<Tile, kColumnsAlongDepth, Tile::kColumns, kColumnVector>(
        shared.columns, shared.column_steps[table] + step, to + Tile::kRows * kDepth);
    ptx::cp_async_commit_group();
  };

  fill_lines<kBytes, Sides::kRowsTensor, Sides::kRows, kLayout, Tile>(
      gemm, shared, block.row, reinterpret_cast<int64_t>(at.rows + block.group * at.rows_group), shared.rows);
  fill_lines<kBytes, Sides::kColumnsTensor, Sides::kColumns, kLayout, Tile>(
      gemm, shared, block.column, reinterpret_cast<int64_t>(at.columns + block.group * at.columns_group),
      shared.columns);
  look_up_steps<kPass, kLayout>(gemm, shared, 0);
  __syncthreads();
  const int count = stages_of<Sides::kDepth>(gemm, windows, block);
  if (count > 0) copy(0);
  // A warp has 4x8 threads: its loads from shared memory are 64 bytes of rows and 128 of columns.
  constexpr int kWarpsAcross = Tile::kColumns / kOwn / 8;
  const int own_row = warp / kWarpsAcross * 4 + lane / 8, own_column = warp % kWarpsAcross * 8 + lane % 8;
  float sum[kOwn][kOwn] = {};
#pragma unroll 1
  for (int stage = 0; stage < count; ++stage) {
    ptx::cp_async_wait_group<0>();
    __syncthreads();  // this stage is there for all, and nobody reads the one before or its table any more
    if (stage + 1 < count) copy(stage + 1);
    if (stage % kStagesLookedUp == 0) look_up_steps<kPass, kLayout>(gemm, shared, stage / kStagesLookedUp + 1);
    multiply_stage<Tile, kRowsAlongDepth, kColumnsAlongDepth>(shared.stages[stage % 2], own_row, own_column, sum);
  }
  __syncthreads();

  fill_lines<1, Sides::kResult, Sides::kRows, kLayout, Tile>(gemm, shared, block.row, block.group * at.result_group,
                                                             shared.rows);
  fill_lines<1, Sides::kResult, Sides::kColumns, kLayout, Tile>(gemm, shared, block.column, 0, shared.columns);
  constexpr bool kChannelIsColumn = Sides::kColumns == GemmAxis::channels;
  if constexpr (kHasEpilogue) fill_scales<kChannelIsColumn>(gemm, epilogue, shared);
  store_results<Tile, kRowsAlongDepth, kColumnsAlongDepth, kChannelIsColumn, kHasEpilogue>(
      shared, own_row, own_column, sum, at.result + blockIdx.y * at.split_elements, epilogue);
}

/// The second pass of a split depth: the parts in order, then the epilogue.
constexpr int kFinishThreads = 256;

template <bool kHasEpilogue>
__global__ void __launch_bounds__(kFinishThreads)
    add_splits(const float* partial, float* result, int splits, int64_t elements, int64_t channel_elements,
               int64_t channels, SimtEpilogue epilogue) {
  const int64_t index = int64_t{blockIdx.x} * kFinishThreads + threadIdx.x;
  if (index >= elements) return;
  float sum = 0;
#pragma unroll 4
  for (int split = 0; split < splits; ++split) sum += partial[split * elements + index];
  if constexpr (kHasEpilogue) {
    const int64_t channel = index / channel_elements % channels;
    if (epilogue.scale.data != nullptr) sum *= epilogue.scale.at(channel);
    if (epilogue.shift.data != nullptr) sum += epilogue.shift.at(channel);
    sum = epilogue.finish<float>(sum, index);
  }
  result[index] = sum;
}

}  // namespace
}  // namespace fastconv::cuda
