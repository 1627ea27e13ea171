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
  TensorMap map = {};
  bool store = false;
  TmaCoordinates coordinates;
  uint32_t shared = 0;                // without a rank
  Block* source = nullptr;            // stores: whose shared memory
  std::vector<unsigned char> staged;  // stores: the source, once it has been read
  std::vector<Block*> destinations;   // loads
  uint32_t barrier = 0;
  Thread* issuer = nullptr;
  unsigned group = 0;
  Location at;
};

void execute(TmaOperation& operation);

}  // namespace fastconv::emulator
