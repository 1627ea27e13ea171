// Winograd's F(4x4, 3x3) for stride 1: 36 products give 16 outputs, where the definition takes 144.
//
// Filters are transformed before the tasks start. A task owns a block of tiles (4x4 outputs each): it transforms their
// 6x6 inputs for all input channels into V[product][...], which stays in L2, then for each register tile of output
// channels runs the 36 small products into M, which stays in L1 or L2, and turns M into outputs, epilogue included.
// Nothing but inputs, filters and outputs goes through memory.
//
// NCHW: lanes are tiles, rows of the register tile are output channels. NHWC: lanes are output channels, rows are
// tiles.
#pragma once

#include "conv2d/cpu_channel_lanes.h"
#include "conv2d/cpu_pixel_store.h"
#include "conv2d/cpu_tile.h"
#include "conv2d/cpu_winograd_transforms.h"
#include "conv2d/gemm_conv.h"

namespace fastconv {
namespace {

/// Input channels that one chain of sums takes. Longer chains cost accuracy: with 256 channels in one the error was
/// three times as large.
inline constexpr int64_t kWinogradDepth = 64;

/// Where a tile lies: its image, and its place in the grid of tiles.
struct TilePlace {
  int64_t image, row, column;
};

struct WinogradPlan {
  int64_t rows, columns, tiles;      // tiles of a plane, of all planes
  int64_t block_tiles, blocks;       // tiles of a task
  int64_t parts, channels_per_part;  // of the output channels, where there are few blocks
  int64_t pitch;                     // of a row of input channels
  int64_t filter_step, v_step;       // from one of the 36 products to the next
  int64_t first_h, first_w;          // input position of the first tap, relative to the output's

  WinogradPlan(const GemmConv& p, Layout layout) {
    constexpr int64_t kColumns = kTileColumns<float>, kLane = simd::kLanes<float>;
    const bool nchw = layout == Layout::nchw;
    rows = ceil_div(p.i, kWinogradOutputs), columns = ceil_div(p.j, kWinogradOutputs);
    tiles = p.n * rows * columns;
    // V takes 144 bytes a tile and channel, and shares L2 with M and the filters that stream by.
    block_tiles = nchw ? kColumns : p.c > 128 ? kTileRows : 2 * kTileRows;
    blocks = ceil_div(tiles, block_tiles);
    if (!nchw) block_tiles = ceil_div(tiles, blocks);
    const int64_t channel_step = nchw ? kTileRows : kColumns;  // output channels of a register tile
    const int64_t steps = ceil_div(p.m, channel_step), threads = thread_count();
    // Every part transforms the inputs again.
    parts = blocks < 4 * threads && blocks % threads != 0 ? min_of(steps, threads) : 1;
    channels_per_part = ceil_div(steps, parts) * channel_step;
    parts = ceil_div(p.m, channels_per_part);
    // Whole vectors; not a multiple of 1 KiB, or the rows of a register tile would evict each other from L1.
    pitch = round_up(p.c, kLane) + kLane;
    // Transforms write 36 places at once; these must not share the few ways of a cache set.
    filter_step = (nchw ? p.m * pitch : p.c * kColumns) + kLane;
    v_step = (nchw ? p.c * kColumns : block_tiles * pitch) + kLane;
    first_h = p.tap_count ? p.taps[0].dh : 0, first_w = p.tap_count ? p.taps[0].dw : 0;
    for (int64_t t = 1; t < p.tap_count; ++t)
      first_h = min_of(first_h, p.taps[t].dh), first_w = min_of(first_w, p.taps[t].dw);
  }

  /// Elements of the transformed filters, and one more: their largest magnitude before the transform.
  int64_t filter_elems(const GemmConv& p, Layout layout) const {
    return kWinogradProducts * (layout == Layout::nchw ? 1 : ceil_div(p.m, kTileColumns<float>)) * filter_step + 1;
  }

  TilePlace place(int64_t tile) const { return {tile / columns / rows, tile / columns % rows, tile % columns}; }
};

/// Raises *peak, by its bits: those of positive numbers have their order, infinity and NaN above all others.
inline void raise_peak(float* peak, float value) {
  uint32_t bits, known;
  std::memcpy(&bits, &value, sizeof(bits));
  auto* target = reinterpret_cast<uint32_t*>(peak);
  __atomic_load(target, &known, __ATOMIC_RELAXED);
  while (bits > known && !__atomic_compare_exchange(target, &known, &bits, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

/// Transformed filters: [product][m][pitch of c] for NCHW, [m / kTileColumns][product][c][kTileColumns] for NHWC, with
/// filter_step from product to product. Their largest magnitude before the transform comes last.
template <class T>
void transform_filters(const GemmConv& p, Layout layout, float* filters) {
  const WinogradPlan plan(p, layout);
  float* peak = filters + plan.filter_elems(p, layout) - 1;
  *peak = 0;
  constexpr int64_t kLane = simd::kLanes<double>, kColumns = kTileColumns<float>;
  typedef float Narrow __attribute__((vector_size(FASTCONV_VECTOR_BYTES / 2)));
  const bool lanes_are_inputs = layout == Layout::nchw;
  const int64_t lane_size = lanes_are_inputs ? p.c : p.m, groups = ceil_div(lane_size, kLane);
  const int64_t lane_stride = lanes_are_inputs ? p.weight_c_stride : p.weight_m_stride;
  const int64_t other_size = lanes_are_inputs ? p.m : p.c;
  const int64_t other_stride = lanes_are_inputs ? p.weight_m_stride : p.weight_c_stride;
  int64_t offsets[9];
  for (int64_t& offset : offsets) offset = -1;  // no tap there: those that reach no input are left out
  for (int64_t t = 0; t < p.tap_count; ++t)
    offsets[(p.taps[t].dh - plan.first_h) * 3 + p.taps[t].dw - plan.first_w] = p.taps[t].weight_offset_elems;
  // Filters that share cache lines follow one another: in NHWC the input channels of a panel's output channels.
  const int64_t abreast = lanes_are_inputs ? groups : kColumns / kLane;
  const int64_t panels = ceil_div(groups, abreast);
  parallel_for(0, panels * other_size * abreast, 64, [&](int64_t begin, int64_t end) {
    auto largest = simd::zero<double>();
    for (int64_t index = begin; index < end; ++index) {
      const int64_t lane = (index / abreast / other_size * abreast + index % abreast) * kLane;
      const int64_t other = index / abreast % other_size, live = min_of(kLane, lane_size - lane);
      if (live <= 0) continue;
      const T* weight = static_cast<const T*>(p.weight) + other * other_stride + lane * lane_stride;
      simd::Vec<double> g[9], result[kWinogradProducts];
      for (int t = 0; t < 9; ++t) {
        g[t] = simd::zero<double>();
        if (offsets[t] < 0) continue;
        if (live == kLane) {
#pragma GCC unroll 8
          for (int64_t i = 0; i < kLane; ++i) g[t][i] = simd::widen(weight[offsets[t] + i * lane_stride]);
        } else {
          for (int64_t i = 0; i < live; ++i) g[t][i] = simd::widen(weight[offsets[t] + i * lane_stride]);
        }
      }
#pragma GCC unroll 9
      for (int t = 0; t < 9; ++t) largest = simd::max_propagate_nan<double>(largest, g[t] < 0 ? -g[t] : g[t]);
      transform_filter(g, result);
      float* to = lanes_are_inputs ? filters + other * plan.pitch + lane
                                   : filters + lane / kColumns * kWinogradProducts * plan.filter_step +
                                         other * kColumns + lane % kColumns;
      for (int64_t f = 0; f < kWinogradProducts; ++f) {
        const Narrow narrowed = __builtin_convertvector(result[f], Narrow);
        std::memcpy(to + f * plan.filter_step, &narrowed, sizeof(narrowed));
      }
    }
    for (int64_t i = 0; i < kLane; ++i) raise_peak(peak, __builtin_fabsf(static_cast<float>(largest[i])));
  });
}

/// Neighbouring tiles of one row of tiles, in a block.
struct TileRun {
  int64_t lane, count;
  TilePlace first;
};

/// Calls body(run) for the runs of tiles [first, first + count).
template <class Body>
FASTCONV_INLINE void for_runs(const WinogradPlan& plan, int64_t first, int64_t count, const Body& body) {
  for (int64_t lane = 0; lane < count;) {
    const TilePlace place = plan.place(first + lane);
    const int64_t length = min_of(plan.columns - place.column, count - lane);
    body(TileRun{lane, length, place});
    lane += length;
  }
}

/// A product of `depth` steps as the sum of products of at most kWinogradDepth.
FASTCONV_INLINE void multiply_in_blocks(TileCall<float> call, TileFunction<float> multiply, int64_t depth) {
  const int64_t blocks = ceil_div(depth, kWinogradDepth), length = ceil_div(depth, max_of(blocks, 1));
  for (int64_t begin = 0; begin == 0 || begin < depth; begin += length) {
    call.depth = min_of(length, depth - begin), call.accumulate = begin > 0;
    multiply(call);
    call.a += length, call.b += length * kTileColumns<float>;
  }
}

// ---------------------------------------------------------------- NCHW

/// The six columns of `count` neighbouring tiles' pieces from one row of the input, four elements apart.
FASTCONV_INLINE void split_columns(const float* from, int64_t count, float* to, int64_t to_step) {
  float *c0 = to, *c1 = to + to_step, *c2 = to + 2 * to_step, *c3 = to + 3 * to_step;
  for (int64_t t = 0; t < count; ++t) {
    c0[t] = from[4 * t];
    c1[t] = from[4 * t + 1];
    c2[t] = from[4 * t + 2];
    c3[t] = from[4 * t + 3];
  }
  float *c4 = to + 4 * to_step, *c5 = to + 5 * to_step;
  for (int64_t t = 0; t + 1 < count; ++t) c4[t] = c0[t + 1], c5[t] = c1[t + 1];
  c4[count - 1] = from[4 * count], c5[count - 1] = from[4 * count + 1];
}

/// One row of the input, of `length` elements from column `first`, as float32 with zeros outside the plane.
template <class T>
FASTCONV_INLINE const float* widened_row(const T* row, int64_t first, int64_t length, int64_t width, float* buffer) {
  if constexpr (__is_same(T, float))
    if (first >= 0 && first + length <= width) return row + first;
  const int64_t begin = max_of(0, -first), end = min_of(length, width - first);
  for (int64_t i = 0; i < min_of(begin, length); ++i) buffer[i] = 0;
  for (int64_t i = begin; i < end; ++i) buffer[i] = simd::widen(row[first + i]);
  for (int64_t i = max_of(end, 0); i < length; ++i) buffer[i] = 0;
  return buffer;
}

/// V[product][c][kTileColumns] of a block.
template <class T>
void transform_block_nchw(const GemmConv& p, const WinogradPlan& plan, int64_t first, int64_t count, float* v) {
  constexpr int64_t kColumns = kTileColumns<float>, kLane = simd::kLanes<float>;
  alignas(64) float pieces[kWinogradProducts * kColumns] = {};
  float buffer[4 * kColumns + 2];
  for (int64_t c = 0; c < p.c; ++c) {
    for_runs(plan, first, count, [&](const TileRun& run) {
      const T* plane = static_cast<const T*>(p.x) + run.first.image * p.x_strides.n + c * p.x_strides.c;
      const int64_t h = run.first.row * kWinogradOutputs + plan.first_h;
      const int64_t w = run.first.column * kWinogradOutputs + plan.first_w;
      for (int64_t r = 0; r < kWinogradInputs; ++r) {
        float* to = pieces + r * kWinogradInputs * kColumns + run.lane;
        if (!inside(h + r, p.h)) {
          for (int64_t s = 0; s < kWinogradInputs; ++s)
            for (int64_t t = 0; t < run.count; ++t) to[s * kColumns + t] = 0;
          continue;
        }
        const int64_t length = 4 * run.count + 2;
        split_columns(widened_row<T>(plane + (h + r) * p.x_strides.h, w, length, p.w, buffer), run.count, to, kColumns);
      }
    });
    for (int64_t lane = 0; lane < count; lane += kLane) {
      simd::Vec<float> d[kWinogradProducts], result[kWinogradProducts];
#pragma GCC unroll 36
      for (int f = 0; f < kWinogradProducts; ++f) d[f] = simd::load(pieces + f * kColumns + lane);
      transform_input<float>(d, result);
#pragma GCC unroll 36
      for (int f = 0; f < kWinogradProducts; ++f)
        simd::store<float>(v + f * plan.v_step + c * kColumns + lane, result[f]);
    }
  }
}

/// Rows of outputs of one channel, [4][4 * kTileColumns], through the epilogue to their places.
template <class T>
void store_rows(const GemmConv& p, const WinogradPlan& plan, int64_t first, int64_t count, int64_t channel,
                const float* lines) {
  for_runs(plan, first, count, [&](const TileRun& run) {
    const int64_t i = run.first.row * kWinogradOutputs, j = run.first.column * kWinogradOutputs;
    for (int64_t r = 0; r < min_of(kWinogradOutputs, p.i - i); ++r) {
      const int64_t offset = p.y_offset + run.first.image * p.y_strides.n + (i + r) * p.y_strides.h + j;
      store_run<T>(p, lines + (r * kTileColumns<float> + run.lane) * 4, offset, channel, 1,
                   min_of(4 * run.count, p.j - j));
    }
  });
}

/// The outputs of one channel from its row of M, [product][kTileRows][kTileColumns].
template <class T>
void finish_channel_nchw(const GemmConv& p, const WinogradPlan& plan, int64_t first, int64_t count, int64_t channel,
                         const float* m) {
  constexpr int64_t kColumns = kTileColumns<float>, kLane = simd::kLanes<float>;
  alignas(64) float lines[16 * kColumns + kLane];
  for (int64_t lane = 0; lane < count; lane += kLane) {
    simd::Vec<float> products[kWinogradProducts], outputs[16];
#pragma GCC unroll 36
    for (int f = 0; f < kWinogradProducts; ++f) products[f] = simd::load(m + f * kTileRows * kColumns + lane);
    transform_output<float>(products, outputs);
    alignas(64) float plain[16 * kLane];
#pragma GCC unroll 16
    for (int o = 0; o < 16; ++o) simd::store<float>(plain + o * kLane, outputs[o]);
    for (int64_t r = 0; r < 4; ++r) {
      const float* from = plain + r * 4 * kLane;
      float* to = lines + (r * kColumns + lane) * 4;
      for (int64_t t = 0; t < kLane; ++t) {
        to[4 * t] = from[t];
        to[4 * t + 1] = from[kLane + t];
        to[4 * t + 2] = from[2 * kLane + t];
        to[4 * t + 3] = from[3 * kLane + t];
      }
    }
  }
  store_rows<T>(p, plan, first, count, channel, lines);
}

template <class T>
void convolve_block_nchw(const GemmConv& p, const WinogradPlan& plan, const float* filters, int64_t block,
                         int64_t channel_begin, int64_t channel_end, float* v, float* m) {
  constexpr int64_t kColumns = kTileColumns<float>;
  const int64_t first = block * plan.block_tiles, count = min_of(plan.block_tiles, plan.tiles - first);
  transform_block_nchw<T>(p, plan, first, count, v);
  for (int64_t channel = channel_begin; channel < channel_end; channel += kTileRows) {
    const int64_t live = min_of(kTileRows, channel_end - channel);
    const TileFunction<float> multiply = kTiles<float, Rows::depth_contiguous>.at(live, count);
    for (int64_t f = 0; f < kWinogradProducts; ++f) {
      TileCall<float> call{};
      call.a = filters + f * plan.filter_step + channel * plan.pitch, call.a_stride = plan.pitch;
      call.b = v + f * plan.v_step;
      call.out = m + f * kTileRows * kColumns, call.out_stride = kColumns;
      multiply_in_blocks(call, multiply, p.c);
    }
    for (int64_t row = 0; row < live; ++row)
      finish_channel_nchw<T>(p, plan, first, count, channel + row, m + row * kColumns);
  }
}

// ---------------------------------------------------------------- NHWC

/// V[product][tile][pitch of c] of a block.
template <class T>
void transform_block_nhwc(const GemmConv& p, const WinogradPlan& plan, int64_t first, int64_t count, float* v) {
  constexpr int64_t kLane = simd::kLanes<float>;
  for (int64_t tile = 0; tile < count; ++tile) {
    const TilePlace place = plan.place(first + tile);
    const int64_t h = place.row * kWinogradOutputs + plan.first_h, w = place.column * kWinogradOutputs + plan.first_w;
    const T* pixels[kWinogradProducts];
    for (int64_t f = 0; f < kWinogradProducts; ++f) {
      const int64_t y = h + f / 6, x = w + f % 6;
      const bool reads = inside(y, p.h) && inside(x, p.w);
      pixels[f] = reads
                      ? static_cast<const T*>(p.x) + place.image * p.x_strides.n + y * p.x_strides.h + x * p.x_strides.w
                      : nullptr;
    }
    for (int64_t c = 0; c < p.c; c += kLane) {
      const int64_t live = min_of(kLane, p.c - c);
      simd::Vec<float> d[kWinogradProducts], result[kWinogradProducts];
      for (int f = 0; f < kWinogradProducts; ++f)
        d[f] = pixels[f] == nullptr ? simd::zero<float>()
               : live == kLane      ? simd::load(pixels[f] + c)
                                    : simd::load_first(pixels[f] + c, live);
      transform_input<float>(d, result);
      float* to = v + tile * plan.pitch + c;
#pragma GCC unroll 36
      for (int f = 0; f < kWinogradProducts; ++f) simd::store<float>(to + f * plan.v_step, result[f]);
    }
  }
}

/// The outputs of one tile for `columns` channels from M[product][block_tiles][kTileColumns].
template <class T>
void finish_tile_nhwc(const GemmConv& p, const WinogradPlan& plan, int64_t tile, int64_t channel, int64_t columns,
                      const float* m) {
  constexpr int64_t kColumns = kTileColumns<float>, kLane = simd::kLanes<float>;
  const TilePlace place = plan.place(tile);
  const int64_t i = place.row * kWinogradOutputs, j = place.column * kWinogradOutputs;
  const int64_t rows = min_of(kWinogradOutputs, p.i - i), pixels = min_of(kWinogradOutputs, p.j - j);
  alignas(64) float sums[16 * kColumns];  // of the pixels inside the output, side by side
  int64_t offsets[16];
  for (int64_t lane = 0; lane < columns; lane += kLane) {
    simd::Vec<float> products[kWinogradProducts], outputs[16];
#pragma GCC unroll 36
    for (int f = 0; f < kWinogradProducts; ++f) products[f] = simd::load(m + f * plan.block_tiles * kColumns + lane);
    transform_output<float>(products, outputs);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t s = 0; s < pixels; ++s)
        simd::store<float>(sums + (r * pixels + s) * kColumns + lane, outputs[r * kWinogradOutputs + s]);
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t s = 0; s < pixels; ++s)
      offsets[r * pixels + s] =
          p.y_offset + place.image * p.y_strides.n + (i + r) * p.y_strides.h + (j + s) * p.y_strides.w;
  store_channel_tile<T>(p, offsets, sums, kTileColumns<acc_t<T>>, channel, rows * pixels, columns);
}

template <class T>
void convolve_block_nhwc(const GemmConv& p, const WinogradPlan& plan, const float* filters, int64_t block,
                         int64_t channel_begin, int64_t channel_end, float* v, float* m) {
  constexpr int64_t kColumns = kTileColumns<float>;
  const int64_t first = block * plan.block_tiles, count = min_of(plan.block_tiles, plan.tiles - first);
  transform_block_nhwc<T>(p, plan, first, count, v);
  const RowTiles rows(count);
  for (int64_t channel = channel_begin; channel < channel_end; channel += kColumns) {
    const int64_t columns = min_of(kColumns, channel_end - channel);
    for (int64_t f = 0; f < kWinogradProducts; ++f)
      for (int64_t tile = 0; tile < rows.tiles; ++tile) {
        TileCall<float> call{};
        call.a = v + f * plan.v_step + rows.begin(tile) * plan.pitch, call.a_stride = plan.pitch;
        call.b = filters + (channel / kColumns * kWinogradProducts + f) * plan.filter_step;
        call.out = m + (f * plan.block_tiles + rows.begin(tile)) * kColumns, call.out_stride = kColumns;
        const auto multiply =
            kTiles<float, Rows::depth_contiguous>.at(rows.begin(tile + 1) - rows.begin(tile), columns);
        multiply_in_blocks(call, multiply, p.c);
      }
    for (int64_t tile = 0; tile < count; ++tile)
      finish_tile_nhwc<T>(p, plan, first + tile, channel, columns, m + tile * kColumns);
  }
}

// ---------------------------------------------------------------- both

template <class T>
void convolve_winograd(const GemmConv& p, Layout layout, const float* filters) {
  constexpr int64_t kColumns = kTileColumns<float>, kFloat = sizeof(float);
  const WinogradPlan plan(p, layout);
  const bool nchw = layout == Layout::nchw;
  parallel_for(0, plan.parts * plan.blocks, 1, [&](int64_t begin, int64_t end) {
    Scratch v(kWinogradProducts * plan.v_step * kFloat);
    Scratch m(kWinogradProducts * (nchw ? kTileRows : plan.block_tiles) * kColumns * kFloat);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t channel = task / plan.blocks * plan.channels_per_part;
      const auto convolve = nchw ? convolve_block_nchw<T> : convolve_block_nhwc<T>;
      convolve(p, plan, filters, task % plan.blocks, channel, min_of(p.m, channel + plan.channels_per_part),
               v.as<float>(), m.as<float>());
    }
  });
}

}  // namespace
}  // namespace fastconv
