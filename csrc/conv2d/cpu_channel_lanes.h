// Implicit GEMM with output channels in lanes, for NHWC: rows of a tile are pixels, columns are output channels.
//
// Weights are packed into panels of kTileColumns channels, depth (tap, input channel): once for all calls where the
// caller keeps them, else once per call, or by each task where one or two strips hold all pixels. A task owns a strip
// of pixels and a range of channels: it gathers the rows of the pixels (a few contiguous copies per pixel, none at all
// for 1x1 with stride 1) and passes its weight panels over them.
#pragma once

#include "conv2d/cpu_channel_weights.h"
#include "conv2d/cpu_pack.h"

namespace fastconv {
namespace {

/// Up to kTileColumns pixels: grid positions numbered n * I * J + i * J + j from `first`.
template <class Acc>
struct PixelPositions {
  int64_t count;                   // at most kTileColumns; the rest of the panel is zeros
  int64_t row[kTileColumns<Acc>];  // input row and column of tap (0, 0)
  int64_t column[kTileColumns<Acc>];
  int64_t x_offset[kTileColumns<Acc>];  // of that input element, if it were inside
  int64_t y_offset[kTileColumns<Acc>];

  void locate(const GemmConv& p, int64_t first, int64_t total) {
    count = min_of(kTileColumns<Acc>, total - first);
    int64_t n = first / (p.i * p.j), i = first / p.j % p.i, j = first % p.j;
    for (int64_t lane = 0; lane < count; ++lane) {
      row[lane] = i * p.step.h;
      column[lane] = j * p.step.w;
      x_offset[lane] = n * p.x_strides.n + row[lane] * p.x_strides.h + column[lane] * p.x_strides.w;
      y_offset[lane] = p.y_offset + n * p.y_strides.n + i * p.y_strides.h + j * p.y_strides.w;
      if (++j == p.j) {
        j = 0;
        if (++i == p.i) i = 0, ++n;
      }
    }
  }
};

/// Depth [begin, end) of the flattened (tap, c) axis for `pixels.count` pixels, one row of end - begin each.
template <class T>
void gather_rows(const GemmConv& p, const PixelPositions<acc_t<T>>& pixels, const T* x, int64_t begin, int64_t end,
                 acc_t<T>* rows) {
  using Acc = acc_t<T>;
  constexpr int64_t kLane = simd::kLanes<Acc>;
  for (int64_t pixel = 0; pixel < pixels.count; ++pixel) {
    Acc* target = rows + pixel * (end - begin);
    for (int64_t d = begin; d < end;) {
      const int64_t t = d / p.c, c = d % p.c, length = min_of(p.c - c, end - d);
      const Tap& tap = p.taps[t];
      const bool reads = inside(pixels.row[pixel] + tap.dh, p.h) && inside(pixels.column[pixel] + tap.dw, p.w);
      const T* source = x + pixels.x_offset[pixel] + tap.dh * p.x_strides.h + tap.dw * p.x_strides.w + c;
      int64_t i = 0;
      for (; i + kLane <= length; i += kLane)
        simd::store<Acc>(target + i, reads ? simd::load(source + i) : simd::zero<Acc>());
      for (; i < length; ++i) target[i] = reads ? simd::widen(source[i]) : Acc(0);
      target += length;
      d += length;
    }
  }
}

template <class T>
void store_channel_tile(const GemmConv& p, const int64_t* y_offsets, const acc_t<T>* tile, int64_t tile_stride,
                        int64_t channel, int64_t rows, int64_t columns) {
  using Acc = acc_t<T>;
  constexpr int kLane = simd::kLanes<Acc>;
  const Epilogue& e = p.epilogue;
  for (int64_t lane = 0; lane < columns; lane += kLane) {
    const int64_t live = min_of(kLane, columns - lane);
    const auto scale =
        e.scale ? simd::load_first(static_cast<const Acc*>(e.scale) + channel + lane, live) : simd::zero<Acc>();
    const auto shift =
        e.shift ? simd::load_first(static_cast<const Acc*>(e.shift) + channel + lane, live) : simd::zero<Acc>();
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t offset = y_offsets[row] + channel + lane;
      auto value = simd::load(tile + row * tile_stride + lane);
      if (e.scale) value = value * scale;
      if (e.shift) value = value + shift;
      if (e.residual) value = value + simd::load_first(static_cast<const T*>(e.residual) + offset, live);
      value = simd::activate<Acc>(value, e.activation);
      if (live == kLane) simd::store<T>(static_cast<T*>(p.y) + offset, value);
      else simd::store_first<T>(static_cast<T*>(p.y) + offset, value, live);
    }
  }
}

/// Lets a tile that keeps its sums in y finish them for the channels from `channel` on, of the pixel at `y_offset`;
/// false if it has to be done afterwards.
template <class T>
FASTCONV_INLINE bool finish_in_tile(const GemmConv& p, int64_t y_offset, int64_t channel,
                                    TileFinish<acc_t<T>>& finish) {
  using Acc = acc_t<T>;
  const Epilogue& e = p.epilogue;
  if (e.activation == Activation::tanh) return false;
  finish.scale = e.scale ? static_cast<const Acc*>(e.scale) + channel : nullptr;
  finish.shift = e.shift ? static_cast<const Acc*>(e.shift) + channel : nullptr;
  // Only tensors in the type of their sums have them in y.
  finish.residual = e.residual ? static_cast<const Acc*>(e.residual) + y_offset + channel : nullptr;
  finish.activation = e.activation;
  return true;
}

/// Strips of pixels and ranges of panels of output channels: the tasks.
struct ChannelTasks {
  int64_t pixels, strip_pixels, strips;
  int64_t panels, panels_per_task, panel_tasks;  // of output channels
  bool packs_by_task;                            // weights, in L2, instead of once through memory

  ChannelTasks(const GemmConv& p, int64_t columns) : pixels(p.n * p.i * p.j), panels(ceil_div(p.m, columns)) {}

  /// Pixels of a block of depth that fit into a strip.
  static int64_t fitting(int64_t depth_bytes) {
    constexpr int64_t kStripBytes = 128 * 1024;
    return max_of(4 * kTileRows, min_of(kStripBytes / depth_bytes, 24 * kTileRows));
  }

  /// For weights that each call packs: every strip reads all of them, every range of channels gathers its strip again.
  void share(const GemmConv& p, int64_t fitting_pixels) {
    constexpr int64_t kFewestPanels = 4;
    const int64_t wanted = ceil_div(4 * thread_count(), p.groups);
    strips = ceil_div(pixels, fitting_pixels);
    panel_tasks = max_of(1, min_of(ceil_div(wanted, strips), panels / kFewestPanels));
    if (strips * panel_tasks < wanted) {
      const int64_t most = max_of(1, pixels / (4 * kTileRows));
      strips = max_of(strips, min_of(ceil_div(wanted, panel_tasks), most));
    }
    strip_pixels = ceil_div(pixels, strips);
    strips = ceil_div(pixels, strip_pixels);
    packs_by_task = strips <= 2;
    panels_per_task = ceil_div(panels, panel_tasks);
    panel_tasks = ceil_div(panels, panels_per_task);
  }
};

struct ChannelLanesPlan : ChannelTasks {
  int64_t depth, depth_block;

  ChannelLanesPlan(const GemmConv& p, int64_t columns, int64_t element_bytes, bool kept)
      : ChannelTasks(p, columns), depth(p.c * p.tap_count) {
    // A panel of 20 KiB for AVX2. AVX-512's products take so long that L2 keeps up: half as many passes over the sums.
    constexpr int64_t kDepth = kTileVectors * FASTCONV_VECTOR_BYTES > 64 ? 640 : 320;
    depth_block = depth == 0 ? 1 : ceil_div(depth, ceil_div(depth, kDepth));
    const int64_t fitting_pixels = fitting(depth_block * element_bytes);
    if (kept) share_kept(p, thread_count(), fitting_pixels);
    else share(p, fitting_pixels);
  }

 private:
  /// With kept panels a task costs little beside its products, so that there are as few as memory and threads ask for:
  /// equal shares for all threads, of pixels where tiles stay high, or else of the output channels.
  void share_kept(const GemmConv& p, int64_t threads, int64_t fitting_pixels) {
    const int64_t fewest = ceil_div(pixels, fitting_pixels), wanted = ceil_div(threads, p.groups);
    double least = 0;
    const int64_t strip_counts[] = {fewest, min_of(pixels, round_up(fewest, wanted))};
    const int64_t part_counts[] = {1, min_of(panels, wanted)};
    for (const int64_t strip_count : strip_counts)
      for (const int64_t part_count : part_counts) {
        const int64_t length = ceil_div(pixels, strip_count), per_part = ceil_div(panels, part_count);
        const int64_t all_strips = ceil_div(pixels, length), parts = ceil_div(panels, per_part);
        const int64_t tiles = ceil_div(length, kTileRows);
        // In products of one row of a tile. A tile costs as much as half a row more; one of fewer than four rows waits
        // for itself.
        const double strip = static_cast<double>(max_of(length, 4 * tiles)) + 0.5 * static_cast<double>(tiles);
        const double gathered = 0.1 * static_cast<double>(length);
        const double cost = static_cast<double>(ceil_div(p.groups * all_strips * parts, threads)) *
                            (strip * static_cast<double>(per_part) + gathered);
        if (least > 0 && cost >= least) continue;
        least = cost;
        strips = all_strips, strip_pixels = length;
        panel_tasks = parts, panels_per_task = per_part;
      }
    packs_by_task = false;
  }
};

/// Pixels can be read in place if their rows are one block of depth each, evenly spaced.
template <class T>
bool rows_in_place(const GemmConv& p) {
  if (sizeof(T) != sizeof(acc_t<T>) || p.tap_count != 1 || p.step.h != 1 || p.step.w != 1) return false;
  return p.taps[0].dh == 0 && p.taps[0].dw == 0 && p.i == p.h && p.j == p.w;
}

/// Pixels are written the same distance apart, in the type of the sums: tiles of whole vectors keep their sums there.
template <class T>
bool sums_in_place(const GemmConv& p) {
  return sizeof(T) == sizeof(acc_t<T>) && p.y_strides.h == p.j * p.y_strides.w &&
         (p.n == 1 || p.y_strides.n == p.i * p.y_strides.h);
}

template <class T>
struct ChannelLanesScratch {
  acc_t<T>* rows;
  acc_t<T>* sums;
  acc_t<T>* weights;  // of a panel and a block of depth
  int64_t* y_offsets;
};

template <class T>
void convolve_pixel_strip(const GemmConv& p, const ChannelLanesPlan& plan, const acc_t<T>* weight_panels, int64_t task,
                          const ChannelLanesScratch<T>& scratch) {
  using Acc = acc_t<T>;
  constexpr int64_t kColumns = kTileColumns<Acc>;
  const int64_t part = task % plan.panel_tasks, strip = task / plan.panel_tasks % plan.strips;
  const int64_t group = task / plan.panel_tasks / plan.strips;
  const int64_t first = strip * plan.strip_pixels, count = min_of(plan.strip_pixels, plan.pixels - first);
  const int64_t panel_begin = part * plan.panels_per_task;
  const int64_t panel_end = min_of(plan.panels, panel_begin + plan.panels_per_task);
  const T* x = static_cast<const T*>(p.x) + group * p.c * p.x_strides.c;
  const bool in_place = rows_in_place<T>(p), dense_sums = sums_in_place<T>(p);
  const bool plain = p.epilogue.is_plain();

  for (int64_t begin = 0; begin == 0 || begin < plan.depth; begin += plan.depth_block) {
    const int64_t end = min_of(plan.depth, begin + plan.depth_block);
    const bool last = end == plan.depth;
    const Acc* rows = scratch.rows;
    int64_t row_stride = end - begin;
    PixelPositions<Acc> pixels;
    for (int64_t pixel = 0; pixel < count; pixel += kColumns) {
      if (in_place && begin > 0) break;
      pixels.locate(p, first + pixel, first + count);
      for (int64_t i = 0; i < pixels.count; ++i) scratch.y_offsets[pixel + i] = pixels.y_offset[i];
      if (!in_place) gather_rows<T>(p, pixels, x, begin, end, scratch.rows + pixel * row_stride);
    }
    if (in_place) {
      row_stride = p.x_strides.w;
      rows = reinterpret_cast<const Acc*>(x) + first * row_stride + begin;
    }
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const int64_t m = panel * kColumns, columns = min_of(kColumns, p.m - m);
      TileCall<Acc> call{};
      if (plan.packs_by_task) {
        pack_weight_panel<T>(p, group, panel, begin, end, scratch.weights);
        call.b = scratch.weights;
      } else {
        call.b = weight_panels + ((group * plan.panels + panel) * plan.depth + begin) * kColumns;
      }
      call.a_stride = row_stride, call.depth = end - begin;
      call.accumulate = begin > 0;
      const bool direct = dense_sums && columns % simd::kLanes<Acc> == 0;
      call.out_stride = direct ? p.y_strides.w : kColumns;
      const RowTiles heights(count);
      for (int64_t tile = 0; tile < heights.tiles; ++tile) {
        const int64_t pixel = heights.begin(tile), live = heights.begin(tile + 1) - pixel;
        call.a = rows + pixel * row_stride;
        if (direct) call.out = static_cast<Acc*>(p.y) + scratch.y_offsets[pixel] + group * p.m + m;
        else if (plan.depth_block >= plan.depth) call.out = scratch.sums;
        else call.out = scratch.sums + ((panel - panel_begin) * plan.strip_pixels + pixel) * kColumns;
        if (last && direct && !plain && finish_in_tile<T>(p, scratch.y_offsets[pixel], group * p.m + m, call.finish)) {
          kFinishingTiles<Acc, Rows::depth_contiguous>.at(live, columns)(call);
          continue;
        }
        kTiles<Acc, Rows::depth_contiguous>.at(live, columns)(call);
        if (last && !(direct && plain))
          store_channel_tile<T>(p, scratch.y_offsets + pixel, call.out, call.out_stride, group * p.m + m, live,
                                columns);
      }
    }
  }
}

/// `kept`: what pack_weight_panels made of the weight, or null.
template <class T>
void convolve_channel_lanes(const GemmConv& p, const acc_t<T>* kept) {
  using Acc = acc_t<T>;
  constexpr int64_t kColumns = kTileColumns<Acc>, kBytes = sizeof(Acc);
  const ChannelLanesPlan plan(p, kColumns, kBytes, kept != nullptr);
  const bool packs = !kept && !plan.packs_by_task;
  Scratch packed(packs ? weight_panel_elems<Acc>(p) * kBytes : 0);
  if (packs) pack_weight_panels<T>(p, packed.as<Acc>());
  const Acc* panels = kept ? kept : packed.as<Acc>();

  parallel_for(0, p.groups * plan.strips * plan.panel_tasks, 1, [&](int64_t begin, int64_t end) {
    const int64_t sums_rows = plan.depth_block >= plan.depth ? kTileRows : plan.panels_per_task * plan.strip_pixels;
    Scratch rows(rows_in_place<T>(p) ? 0 : plan.strip_pixels * plan.depth_block * kBytes);
    Scratch sums(sums_rows * kColumns * kBytes);
    Scratch weights(plan.packs_by_task ? plan.depth_block * kColumns * kBytes : 0);
    Scratch offsets(plan.strip_pixels * static_cast<int64_t>(sizeof(int64_t)));
    const ChannelLanesScratch<T> scratch{rows.as<Acc>(), sums.as<Acc>(), weights.as<Acc>(), offsets.as<int64_t>()};
    for (int64_t task = begin; task < end; ++task) convolve_pixel_strip<T>(p, plan, panels, task, scratch);
  });
}

}  // namespace
}  // namespace fastconv
