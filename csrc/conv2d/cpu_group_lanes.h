// Groups of few channels in NHWC: several of them share a register.
//
// A block is as many whole groups as have their outputs, and their inputs, within one vector. For every tap a pixel's
// inputs are one vector; the c-th input of each group, spread over the lanes of its group's outputs, is a permutation
// of it. Where a tap lies outside the image, a row of zeros is read.
#pragma once

#include "conv2d/cpu_channel_lanes.h"

namespace fastconv {
namespace {

#if defined(FASTCONV_SIMD_AVX512) || defined(FASTCONV_SIMD_NEON)
inline constexpr int kGroupRows = 12;  // sums and inputs of as many pixels fill 24 of 32 registers
#else
inline constexpr int kGroupRows = 6;
#endif

template <class T>
bool group_lanes_serve(const GemmConv& p) {
  const int64_t larger = max_of(p.c, p.m);
  return p.groups > 1 && larger <= simd::kLanes<acc_t<T>> && p.c > 0 && p.tap_count > 0 && p.x_strides.c == 1 &&
         p.y_strides.c == 1;
}

/// How groups fill vectors, and where a permutation takes each lane's input from.
template <class T>
struct GroupBlocks {
  static constexpr int64_t kLane = simd::kLanes<acc_t<T>>;
  int64_t groups, blocks;        // of a block, in all
  int64_t inputs, outputs;       // of a block
  int64_t block_elems;           // of its weights
  simd::Mask<acc_t<T>> lane_of;  // where the first input of a lane's group is

  explicit GroupBlocks(const GemmConv& p)
      : groups(min_of(p.groups, kLane / max_of(p.c, p.m))),
        blocks(ceil_div(p.groups, groups)),
        inputs(groups * p.c),
        outputs(groups * p.m),
        block_elems(p.tap_count * p.c * kLane) {
    for (int64_t lane = 0; lane < kLane; ++lane) lane_of[lane] = lane < outputs ? lane / p.m * p.c : 0;
  }
  int64_t live_groups(const GemmConv& p, int64_t block) const { return min_of(groups, p.groups - block * groups); }
};

/// [block][tap][c][lane], zero in lanes without an output.
template <class T>
void pack_group_weights(const GemmConv& p, const GroupBlocks<T>& plan, acc_t<T>* to) {
  using Acc = acc_t<T>;
  parallel_for(0, plan.blocks, ceil_div(4096, plan.block_elems), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      Acc* target = to + block * plan.block_elems;
      std::memset(target, 0, static_cast<size_t>(plan.block_elems) * sizeof(Acc));
      for (int64_t g = 0; g < plan.live_groups(p, block); ++g) {
        const T* weight = static_cast<const T*>(p.weight) + (block * plan.groups + g) * p.weight_group_stride;
        for (int64_t t = 0; t < p.tap_count; ++t)
          for (int64_t c = 0; c < p.c; ++c)
            for (int64_t m = 0; m < p.m; ++m)
              target[(t * p.c + c) * plan.kLane + g * p.m + m] =
                  simd::widen(weight[p.taps[t].weight_offset_elems + c * p.weight_c_stride + m * p.weight_m_stride]);
      }
    }
  });
}

template <class T>
struct GroupCall {
  const T* x;              // of the block's first input
  const T* zeros;          // read where offsets are negative
  const int64_t* offsets;  // [tap][kGroupRows]
  int64_t taps, c, inputs;
  const acc_t<T>* weights;
  simd::Mask<acc_t<T>> lane_of;
  acc_t<T>* sums;  // [row][kLanes]
};

template <class T, int kRows, bool kWhole>
__attribute__((noinline)) void group_tile(const GroupCall<T>& call) {
  using Acc = acc_t<T>;
  using V = simd::Vec<Acc>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  V sums[kRows];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) sums[row] = V{};
  const Acc* weights = call.weights;
  for (int64_t t = 0; t < call.taps; ++t) {
    V inputs[kRows];
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const int64_t offset = call.offsets[t * kGroupRows + row];
      const T* from = offset < 0 ? call.zeros : call.x + offset;
      inputs[row] = kWhole ? simd::load(from) : simd::load_first(from, call.inputs);
    }
    simd::Mask<Acc> lanes = call.lane_of;
    for (int64_t c = 0; c < call.c; ++c, weights += kLane, lanes += 1) {
      const V weight = simd::load(weights);
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row)
        sums[row] = simd::fma<Acc>(simd::permute<Acc>(inputs[row], lanes), weight, sums[row]);
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) simd::store<Acc>(call.sums + row * kLane, sums[row]);
}

template <class T, int kRows = kGroupRows>
void group_rows(int64_t rows, bool whole, const GroupCall<T>& call) {
  if (rows == kRows) return whole ? group_tile<T, kRows, true>(call) : group_tile<T, kRows, false>(call);
  if constexpr (kRows > 1) group_rows<T, kRows - 1>(rows, whole, call);
}

/// Outputs [first, first + rows) of a row of the grid, in all groups.
template <class T>
void convolve_group_pixels(const GemmConv& p, const GroupBlocks<T>& plan, const acc_t<T>* weights, int64_t image,
                           int64_t i, int64_t first, int64_t rows, int64_t* offsets) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  alignas(64) static const T zeros[simd::kLanes<Acc>] = {};
  alignas(64) Acc sums[kGroupRows * simd::kLanes<Acc>];
  int64_t y_offsets[kGroupRows];
  for (int64_t row = 0; row < rows; ++row)
    y_offsets[row] = p.y_offset + image * p.y_strides.n + i * p.y_strides.h + (first + row) * p.y_strides.w;
  for (int64_t t = 0; t < p.tap_count; ++t) {
    const int64_t h = i * p.step.h + p.taps[t].dh;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t w = (first + row) * p.step.w + p.taps[t].dw;
      const bool there = inside(h, p.h) && inside(w, p.w);
      offsets[t * kGroupRows + row] = there ? h * p.x_strides.h + w * p.x_strides.w : -1;
    }
  }
  const T* x = static_cast<const T*>(p.x) + image * p.x_strides.n;
  for (int64_t block = 0; block < plan.blocks; ++block) {
    const int64_t groups = plan.live_groups(p, block), inputs = groups * p.c;
    const GroupCall<T> call{x + block * plan.inputs,
                            zeros,
                            offsets,
                            p.tap_count,
                            p.c,
                            inputs,
                            weights + block * plan.block_elems,
                            plan.lane_of,
                            sums};
    group_rows<T>(rows, inputs == kLane, call);
    store_channel_tile<T>(p, y_offsets, sums, kLane, block * plan.outputs, rows, groups * p.m);
  }
}

template <class T>
void convolve_group_lanes(const GemmConv& p) {
  constexpr int64_t kBytes = sizeof(acc_t<T>);
  const GroupBlocks<T> plan(p);
  Scratch packed(plan.blocks * plan.block_elems * kBytes);
  pack_group_weights<T>(p, plan, packed.as<acc_t<T>>());
  const int64_t work = p.j * p.tap_count * p.groups * p.c * p.m;
  parallel_for(0, p.n * p.i, ceil_div(1 << 16, work + 1), [&](int64_t begin, int64_t end) {
    Scratch offsets(p.tap_count * kGroupRows * static_cast<int64_t>(sizeof(int64_t)));
    for (int64_t index = begin; index < end; ++index) {
      const int64_t tiles = ceil_div(p.j, kGroupRows);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t first = tile * p.j / tiles, last = (tile + 1) * p.j / tiles;
        convolve_group_pixels<T>(p, plan, packed.as<acc_t<T>>(), index / p.i, index % p.i, first, last - first,
                                 offsets.as<int64_t>());
      }
    }
  });
}

}  // namespace
}  // namespace fastconv
