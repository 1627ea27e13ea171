// TMA operations between their issue and their completion.
#pragma once

#include <vector>

#include "emulator/builtins.h"
#include "emulator/tensor_map.h"

namespace fastconv::emulator {

struct Block;
struct Thread;

struct TmaCoordinates {
  int at[5] = {};
  int offset_w = 0, offset_h = 0;
};

struct TmaOperation {
  TensorMap map;
  bool store;
  TmaCoordinates coordinates;
  uint32_t shared;                   // without a rank
  Block* source;                     // stores: whose shared memory
  std::vector<Block*> destinations;  // loads
  uint32_t barrier;
  Thread* issuer;
  unsigned group;
  Location at;
};

void execute(TmaOperation& operation);

}  // namespace fastconv::emulator
