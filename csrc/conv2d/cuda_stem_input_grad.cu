// Stem convolution, input gradient: at most 4 input channels, any window up to 11x11, any stride up to 4.
//
// The padded input falls into cells of stride x stride elements: element h is in cell (h + padding) / stride, at place
// (h + padding) % stride. It meets tap place + u * stride on output cell - u, and no other: all elements at one place
// ("phase") of their cells have the same taps, and all phases read the same outputs.
//
// A program has a rectangle of cells. It brings their gradients to shared memory, some filters at a time, and a warp
// adds up one phase of 256 cells: a thread 2 rows x 4 columns of them, all channels, in registers. For a tap it loads 4
// weights (16 bytes, the same for the whole warp) and, for four taps at once, 8 gradients of a row (two 16-byte loads)
// for 4 * 8 * channels multiply-adds. No tap is multiplied that an element does not have.
#include <algorithm>

#include "conv2d/cuda_stem_refuse.h"
#include "cuda_support/describe.h"
#include "cuda_support/device.h"
#include "cuda_support/dtype.h"
#include "cuda_support/fast_divide.h"
#include "cuda_support/launch.h"
#include "cuda_support/launchers.h"

namespace fastconv::cuda {
namespace {

constexpr int kRows = 2, kColumns = 4;  // cells of a thread
constexpr int kWarpCells = 32 * kRows * kColumns;
constexpr int kMostThreads = 512;  // 16 phases
constexpr int kMostFilters = 8;    // in shared memory at a time: 16 bytes of fp16
constexpr int64_t kSharedBytes = 48 << 10;

struct CellAxis {
  int elements, outputs, window, stride, pad;
  int first, cells;  // the first cell that has elements; how many have
  int reach;         // outputs that a cell reads

  CellAxis() = default;
  CellAxis(int64_t in, int64_t out, int64_t window_, int64_t stride_, int64_t pad_)
      : elements(static_cast<int>(in)),
        outputs(static_cast<int>(out)),
        window(static_cast<int>(window_)),
        stride(static_cast<int>(stride_)),
        pad(static_cast<int>(pad_)),
        first(pad / stride),
        cells((elements - 1 + pad) / stride - first + 1),
        reach(static_cast<int>(ceil_div(window, stride))) {}

  /// Taps of the elements at `place`: place, place + stride, ...
  __device__ __forceinline__ int taps(int place) const { return (window - place + stride - 1) / stride; }
  /// Of all places before it.
  __device__ __forceinline__ int taps_before(int place) const {
    return window / stride * place + min(window % stride, place);
  }
};

struct CellTile {
  CellAxis h, w;
  int quads = 1;              // threads in a row
  int cell_warps = 1;         // warps that share a phase, below each other
  int rows = 1, columns = 1;  // cells
  int tiles_h = 1, tiles_w = 1;
  int row_words = 4, plane_words = 4;       // of a filter's gradients in shared memory, [row][column]
  int filters = 1;                          // in shared memory at a time
  int filter_stride = 1, pixel_stride = 1;  // of grad_y
  bool vectors = false;                     // its pixels are read 16 bytes at a time
  FastDivide by_row_words, by_window;

  int phases() const { return h.stride * w.stride; }
  int threads() const { return 32 * phases() * cell_warps; }
  int window() const { return h.window * w.window; }
  int64_t filter_bytes() const { return (plane_words + 4 * window()) * int64_t{sizeof(float)}; }
  /// The gradients, the weights, and where in a filter each of these is.
  int64_t bytes() const { return filters * filter_bytes() + window() * int64_t{sizeof(int)}; }
};

/// Threads that meet in one bank when a quarter of a warp loads 16 bytes each, rows `row_quads` times 16 bytes apart.
int quad_conflicts(int quads, int row_quads) {
  int threads[8] = {}, most = 0;
  for (int i = 0; i < 8; ++i) most = std::max(most, ++threads[(i / quads * kRows * row_quads + i % quads) % 8]);
  return most;
}

void set_shape(CellTile& tile, int quads, int cell_warps) {
  tile.quads = quads, tile.cell_warps = cell_warps;
  tile.rows = 32 / quads * kRows * cell_warps, tile.columns = quads * kColumns;
  tile.tiles_h = static_cast<int>(ceil_div(tile.h.cells, tile.rows));
  tile.tiles_w = static_cast<int>(ceil_div(tile.w.cells, tile.columns));
  // The last thread of a row loads whole quads.
  const int row_quads = quads + static_cast<int>(ceil_div(tile.w.reach - 1, kColumns));
  int best = row_quads;
  for (int more = row_quads; more < row_quads + 8; ++more)
    if (quad_conflicts(quads, more) < quad_conflicts(quads, best)) best = more;
  tile.row_words = best * kColumns;
  tile.plane_words = (tile.rows + tile.h.reach - 1) * tile.row_words;
}

/// The rectangle that wastes the fewest cells and loads.
CellTile choose_tile(const ConvProblem& p) {
  CellTile tile, best;
  tile.h = CellAxis(p.h, p.p(), p.r, p.stride.h, p.padding.top);
  tile.w = CellAxis(p.w, p.q(), p.s, p.stride.w, p.padding.left);
  int cell_warps = std::max(1, 8 / tile.phases());
  for (;; cell_warps /= 2) {
    int64_t best_cost = INT64_MAX;
    for (int quads = 1; quads <= 32; quads *= 2) {
      set_shape(tile, quads, cell_warps);
      // Multiply-adds of a cell, against the few instructions that bring a gradient.
      const int64_t work = int64_t{kWarpCells} * cell_warps * tile.window() * p.c + 8 * tile.plane_words;
      const int64_t cost = tile.tiles_h * tile.tiles_w * work;
      if (cost < best_cost) best_cost = cost, best = tile;
    }
    // Smaller tiles where these leave multiprocessors idle.
    const int64_t blocks = p.n * best.tiles_h * best.tiles_w;
    if (cell_warps == 1 || blocks >= 2 * int64_t{device_properties().sm_count}) break;
  }
  while (2 * best.filters <= kMostFilters && 2 * best.filters * best.filter_bytes() <= kSharedBytes) best.filters *= 2;
  const Strides4 strides = p.output_strides();
  best.filter_stride = static_cast<int>(strides.c), best.pixel_stride = static_cast<int>(strides.w);
  best.by_row_words = FastDivide(best.row_words), best.by_window = FastDivide(best.window());
  return best;
}

/// The taps of a phase, last first: its weights lie together, in the order of the outputs that they meet.
struct Phase {
  int h, w;            // place in the cell
  int taps_h, taps_w;  // may be none: a window smaller than the stride
  int first_tap;

  __device__ __forceinline__ Phase(const CellTile& tile, int number)
      : h(number / tile.w.stride),
        w(number % tile.w.stride),
        taps_h(tile.h.taps(h)),
        taps_w(tile.w.taps(w)),
        first_tap(tile.h.taps_before(h) * tile.w.window + taps_h * tile.w.taps_before(w)) {}
};

/// sources[i]: where in a filter's channel weight i of the phases' order is.
__device__ __forceinline__ void fill_sources(const ConvProblem& p, const CellTile& tile, int* sources) {
  const Strides4 ws = p.weight_strides();
  for (int tap = threadIdx.x; tap < tile.h.window * tile.w.window; tap += blockDim.x) {
    const int r = tap / tile.w.window, s = tap % tile.w.window;
    const Phase phase(tile, r % tile.h.stride * tile.w.stride + s % tile.w.stride);
    const int u = phase.taps_h - 1 - r / tile.h.stride, v = phase.taps_w - 1 - s / tile.w.stride;
    sources[phase.first_tap + u * phase.taps_w + v] = static_cast<int>(r * ws.h + s * ws.w);
  }
}

/// [filter][weight in the phases' order][4 channels], zeros for channels that do not exist.
template <class T>
__device__ __forceinline__ void fill_weights(const ConvProblem& p, const CellTile& tile, const int* sources,
                                             const T* weight, int filters, float* to) {
  const Strides4 ws = p.weight_strides();
  const int per_filter = static_cast<int>(ws.n), per_channel = static_cast<int>(ws.c);
  for (int i = threadIdx.x; i < filters * static_cast<int>(tile.by_window.divisor) * 4; i += blockDim.x) {
    const int c = i % 4;
    uint32_t tap = i / 4;
    const int k = static_cast<int>(tile.by_window.divide_keep_rest(tap));
    to[i] = c < p.c ? to_float(weight[k * per_filter + c * per_channel + sources[tap]]) : 0.0f;
  }
}

/// Gradients of `filters` filters from row and column (top, left) on, zeros outside the output; `image` is the first
/// filter's first element.
template <class T>
__device__ __forceinline__ void fill_gradients(const CellTile& tile, const T* image, int top, int left, int filters,
                                               float* slab) {
  constexpr int kVector = kVectorElements<T>;
  for (int i = threadIdx.x; i < tile.plane_words; i += blockDim.x) {
    uint32_t column = i;
    const int row = top + static_cast<int>(tile.by_row_words.divide_keep_rest(column));
    const int q = left + static_cast<int>(column);
    const bool exists = static_cast<unsigned>(row) < static_cast<unsigned>(tile.h.outputs) &&
                        static_cast<unsigned>(q) < static_cast<unsigned>(tile.w.outputs);
    const T* from = image + (exists ? (row * tile.w.outputs + q) * tile.pixel_stride : 0);
    if (tile.vectors) {
      for (int k = 0; k < filters; k += kVector) {
        Vector<T, kVector> values = {};
        if (exists) values = load_vector<kVector>(from + k);
#pragma unroll
        for (int n = 0; n < kVector; ++n) slab[(k + n) * tile.plane_words + i] = to_float(values[n]);
      }
    } else {
#pragma unroll 4
      for (int k = 0; k < filters; ++k)
        slab[k * tile.plane_words + i] = exists ? to_float(from[k * tile.filter_stride]) : 0.0f;
    }
  }
}

template <int kC>
using CellSums = float[kRows][kColumns][kC];

/// Adds what one filter contributes. `gradients` is where the thread's first cell and the phase's last tap meet, its
/// `weights` are the phase's.
template <int kC>
__device__ __forceinline__ void add_filter(const CellTile& tile, const Phase& phase, const float* gradients,
                                           const float* weights, CellSums<kC>& sum) {
  const int skipped = tile.w.reach - phase.taps_w;  // columns that this phase does not reach
#pragma unroll 1
  for (int u = 0; u < phase.taps_h; ++u, gradients += tile.row_words) {
#pragma unroll 1
    for (int v = 0; v < tile.w.reach; v += kColumns) {
      Vector<float, kColumns> near[kRows], far[kRows] = {};
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const float* from = gradients + row * tile.row_words + v;
        near[row] = load_vector<kColumns>(from);
        if (v + 1 < tile.w.reach) far[row] = load_vector<kColumns>(from + kColumns);
      }
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        if (static_cast<unsigned>(v + i - skipped) >= static_cast<unsigned>(phase.taps_w)) continue;
        const Vector<float, 4> w = load_vector<4>(weights);
        weights += 4;
#pragma unroll
        for (int row = 0; row < kRows; ++row)
#pragma unroll
          for (int j = 0; j < kColumns; ++j) {
            const float gradient = i + j < kColumns ? near[row][(i + j) % kColumns] : far[row][(i + j) % kColumns];
#pragma unroll
            for (int c = 0; c < kC; ++c) sum[row][j][c] = fmaf(gradient, w[c], sum[row][j][c]);
          }
      }
    }
  }
}

/// Writes the thread's elements; (row, column) is its first cell.
template <int kC, class T>
__device__ __forceinline__ void store_cells(const ConvProblem& p, const CellTile& tile, const Phase& phase, int row,
                                            int column, const CellSums<kC>& sum, T* image) {
  const int pixel = p.layout == Layout::nchw ? 1 : static_cast<int>(p.c);
  const int channel = p.layout == Layout::nchw ? tile.h.elements * tile.w.elements : 1;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int h = (tile.h.first + row + i) * tile.h.stride - tile.h.pad + phase.h;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int w = (tile.w.first + column + j) * tile.w.stride - tile.w.pad + phase.w;
      if (static_cast<unsigned>(h) >= static_cast<unsigned>(tile.h.elements) ||
          static_cast<unsigned>(w) >= static_cast<unsigned>(tile.w.elements))
        continue;
      T* to = image + (h * tile.w.elements + w) * pixel;
#pragma unroll
      for (int c = 0; c < kC; ++c)
        if (c < p.c) to[c * channel] = from_float<T>(sum[i][j][c]);
    }
  }
}

template <int kC, class T>
__global__ void __launch_bounds__(kMostThreads, 1)
    stem_input_grad(ConvProblem p, CellTile tile, const T* grad_y, const T* weight, T* grad_x) {
  FASTCONV_DYNAMIC_SHARED(shared);
  const int window = tile.h.window * tile.w.window, filters = static_cast<int>(p.k);
  float* slab = reinterpret_cast<float*>(shared);
  float* weights = slab + tile.filters * tile.plane_words;
  int* sources = reinterpret_cast<int*>(weights + tile.filters * window * 4);
  fill_sources(p, tile, sources);
  const int in_image = static_cast<int>(blockIdx.x % static_cast<unsigned>(tile.tiles_h * tile.tiles_w));
  const int64_t image = blockIdx.x / static_cast<unsigned>(tile.tiles_h * tile.tiles_w);
  const int first_row = in_image / tile.tiles_w * tile.rows, first_column = in_image % tile.tiles_w * tile.columns;
  // Phases have unequal numbers of taps: from block to block they change schedulers.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Phase phase(tile, static_cast<int>((warp / tile.cell_warps + blockIdx.x) %
                                           static_cast<unsigned>(tile.h.stride * tile.w.stride)));
  const int row = (warp % tile.cell_warps * (32 / tile.quads) + lane / tile.quads) * kRows;
  const int column = lane % tile.quads * kColumns;
  const float* own = slab + (row + tile.h.reach - phase.taps_h) * tile.row_words + column;
  const T* gradients = grad_y + image * (p.k * p.p() * p.q());
  CellSums<kC> sum = {};
  for (int k = 0; k < filters; k += tile.filters) {
    const int here = min(tile.filters, filters - k);
    __syncthreads();  // the filters before are no longer read, and `sources` is complete
    fill_gradients(tile, gradients + k * tile.filter_stride, tile.h.first + first_row - tile.h.reach + 1,
                   tile.w.first + first_column - tile.w.reach + 1, here, slab);
    fill_weights(p, tile, sources, weight + k * p.weight_strides().n, here, weights);
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < here; ++i)
      add_filter(tile, phase, own + i * tile.plane_words, weights + (i * window + phase.first_tap) * 4, sum);
  }
  store_cells(p, tile, phase, first_row + row, first_column + column, sum, grad_x + image * (p.c * p.h * p.w));
}

}  // namespace

/// All tensors dense in the problem's layout. Throws where refuse_stem_cuda gives a reason.
void launch_stem_input_grad(const ConvProblem& p, const void* grad_y, const void* weight, void* grad_x,
                            cudaStream_t stream) {
  if (const char* reason = refuse_stem_cuda(p))
    throw std::runtime_error("the CUDA stem kernel refuses " + describe(p) + ": " + reason +
                             "; the direct kernel serves any problem");
  CellTile tile = choose_tile(p);
  const unsigned blocks = blocks_for(p.n * tile.tiles_h * tile.tiles_w, 1);
  dispatch_element("stem input gradient", p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kVector = kVectorElements<T>;
    tile.vectors = p.layout == Layout::nhwc && tile.filters % kVector == 0 && is_aligned(grad_y, p.k, sizeof(T), 16);
    const auto run = [&](auto kernel) {
      launch(kernel, blocks, static_cast<unsigned>(tile.threads()), static_cast<size_t>(tile.bytes()), stream, p, tile,
             static_cast<const T*>(grad_y), static_cast<const T*>(weight), static_cast<T*>(grad_x));
    };
    if (p.c == 1) run(FASTCONV_KERNEL(stem_input_grad<1, T>));
    else if (p.c <= 3) run(FASTCONV_KERNEL(stem_input_grad<3, T>));
    else run(FASTCONV_KERNEL(stem_input_grad<4, T>));
  });
}

FASTCONV_LAUNCHER("conv2d_input_grad", "stem", launch_stem_input_grad);

}  // namespace fastconv::cuda
