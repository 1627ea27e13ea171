// The only way to start a kernel, on the GPU and in the emulator:
//
//   launch(FASTCONV_KERNEL(scale_kernel<half>), grid, block, shared_bytes, stream, x, y, count);
//   launch(FASTCONV_KERNEL(conv_kernel<Tile>), {.grid = 132, .block = 384, .shared_bytes = 200 << 10, .cluster = 2},
//          stream, params);
//
// A launch that fails throws: the message names the kernel, the problem (any argument that is a ConvProblem, a
// PoolProblem or has a describe() of its own) and what CUDA said. A grid without blocks is nothing to do: the result is
// empty.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda_support/cuda.h"
#include "cuda_support/describe.h"

#if defined(FASTCONV_EMULATOR)
#include "emulator/run.h"
#endif

namespace fastconv::cuda {

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes = 0;   // dynamic shared memory of one block
  unsigned cluster = 1;      // blocks along x that form a cluster (sm_90); divides grid.x
  bool cooperative = false;  // every block is resident at once, so blocks may wait for one another
};

template <class... Parameters>
struct NamedKernel {
  void (*function)(Parameters...);
  const char* name;
};

template <class... Parameters>
NamedKernel<Parameters...> named(void (*function)(Parameters...), const char* name) {
  return {function, name};
}

/// A kernel and its name as it stands in the source.
#define FASTCONV_KERNEL(...) ::fastconv::cuda::named(&__VA_ARGS__, #__VA_ARGS__)

/// Blocks needed for `total` items at `per_block` each.
inline unsigned blocks_for(int64_t total, int64_t per_block) {
  const int64_t blocks = ceil_div(total, per_block);
  if (blocks > 0x7fffffff)
    throw std::runtime_error("a grid of " + std::to_string(blocks) +
                             " blocks, expected at most 2147483647; give each " + "block more than " +
                             std::to_string(per_block) + " of the " + std::to_string(total) + " items");
  return static_cast<unsigned>(blocks);
}

inline std::string describe(const LaunchShape& shape) {
  std::string text = "grid " + describe(shape.grid) + ", block " + describe(shape.block) + ", " +
                     std::to_string(shape.shared_bytes) + " bytes of dynamic shared memory";
  if (shape.cluster > 1) text += ", clusters of " + std::to_string(shape.cluster);
  if (shape.cooperative) text += ", cooperative";
  return text;
}

inline bool is_empty(const LaunchShape& shape) { return shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0; }

/// Throws unless `status` is success.
template <class... Arguments>
void check_launch(cudaError_t status, const char* kernel, const LaunchShape& shape, const Arguments&... arguments) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // CUDA keeps the error, and whoever launches next and asks would be told of it
  std::string text = std::string("CUDA kernel ") + kernel;
  ((text += describe_argument(arguments)), ...);
  text += " did not start: " + std::string(cudaGetErrorString(status)) + " (" + describe(shape) + ")";
  throw std::runtime_error(text);
}

#if defined(FASTCONV_EMULATOR)

template <class... Parameters, class... Arguments>
void launch(NamedKernel<Parameters...> kernel, const LaunchShape& shape, cudaStream_t, Arguments... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "the kernel takes another number of arguments");
  if (is_empty(shape)) return;
  const emulator::Grid grid{kernel.name, shape.grid, shape.block, shape.shared_bytes, shape.cluster, shape.cooperative};
  check_launch(emulator::check(grid), kernel.name, shape, arguments...);
  emulator::run(grid, [&] { kernel.function(static_cast<Parameters>(arguments)...); });
}

#else

template <class... Parameters, class... Arguments>
void launch(NamedKernel<Parameters...> kernel, const LaunchShape& shape, cudaStream_t stream, Arguments... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "the kernel takes another number of arguments");
  if (is_empty(shape)) return;
  if (shape.shared_bytes > (48u << 10))  // more must be asked for, kernel by kernel and device by device
    check_launch(
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel.function),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes)),
        kernel.name, shape, arguments...);
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (shape.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = shape.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  if (shape.cooperative) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  check_launch(cudaLaunchKernelEx(&config, kernel.function, static_cast<Parameters>(arguments)...), kernel.name, shape,
               arguments...);
}

#endif

template <class... Parameters, class... Arguments>
void launch(NamedKernel<Parameters...> kernel, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            Arguments... arguments) {
  launch(kernel, LaunchShape{grid, block, shared_bytes}, stream, arguments...);
}

}  // namespace fastconv::cuda
