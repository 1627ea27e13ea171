// Starting a kernel in the emulator; cuda_support/launch.h calls this.
#pragma once

#include <cstddef>
#include <functional>

#include "emulator/language.h"

namespace fastconv::emulator {

/// When asynchronous work (TMA, wgmma's operand reads, bulk stores, cp.async) happens between its issue and the wait
/// for it. A right kernel gives the same result under all of them.
enum class Timing : int { lazy, eager, random };

struct Options {
  Timing timing = Timing::lazy;
  unsigned seed = 1;         // order of warps, and the choices of Timing::random
  bool check_races = false;  // happens-before checks; one OS thread
  int os_threads = 0;        // 0: as many as there are cores
  int sm_count = 2;          // few, so that persistent kernels loop
  int capability = 90;
  unsigned shared_misalignment = 16;  // dynamic shared memory starts here modulo 1024
};
Options& options();

/// What a block may have, static and dynamic, on a device of Options::capability.
inline unsigned shared_limit() {
  const int capability = options().capability;
  return (capability >= 90 ? 227u : capability == 80 || capability == 87 ? 163u : 99u) << 10;
}

struct Statistics {
  uint64_t launches = 0, switches = 0, tma_operations = 0, wgmma_warps = 0;
};
Statistics& statistics();

/// What launch() was asked for.
struct Grid {
  const char* kernel;
  dim3 blocks, threads;
  size_t shared_bytes;
  unsigned cluster;
  bool cooperative;
};

/// The error that CUDA would answer with before anything runs.
cudaError_t check(const Grid& grid);

/// Runs `body` once for every thread. Throws std::runtime_error for what a GPU would answer with a wrong result, a hang
/// or a dead context: the text names the kernel, the line and the thread.
void run(const Grid& grid, const std::function<void()>& body);

}  // namespace fastconv::emulator
