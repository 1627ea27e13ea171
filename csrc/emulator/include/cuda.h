// The emulator's stand-in for the driver's header: an opaque tensor map, filled by emulator/tensor_map.cpp.
#pragma once
#include <cstdint>

struct alignas(64) CUtensorMap {
  uint64_t opaque[16];
};
