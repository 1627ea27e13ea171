// wgmma of one warp between issue and wait.
#pragma once

#include <deque>
#include <memory>
#include <vector>

#include "emulator/builtins.h"
#include "emulator/race.h"

namespace fastconv::emulator {

enum class MatrixType : int { f16, bf16, tf32 };

/// What one wgmma multiplies; the same for all lanes, `fragment_a` apart.
struct WgmmaShape {
  MatrixType type;
  int n;
  bool mn_major_a, mn_major_b, a_in_registers;
};

/// A warp's 16 x n accumulator rows while wgmma may write them. The registers themselves hold a NaN meanwhile.
struct Accumulator {
  float* registers[32] = {};
  int n = 0;
  bool live = false;
  int users = 0;  // operations that have not run
  std::vector<float> values;
};

struct WgmmaOperation {
  bool commit = false, executed = false, scale_d = false;
  unsigned lanes = 0;
  WgmmaShape shape{};
  uint64_t a = 0, b = 0;
  uint32_t fragment_a[32][4];
  Accumulator* accumulator = nullptr;
  Location at;
  Clock clock;
};

/// Lanes append without waiting: the first to come makes the entry, the others compare theirs with it.
struct WgmmaQueue {
  std::deque<WgmmaOperation> operations;
  uint64_t base = 0;      // number of the first in `operations`
  uint64_t executed = 0;  // all before this number have run
  std::vector<std::unique_ptr<Accumulator>> accumulators;
};

}  // namespace fastconv::emulator
