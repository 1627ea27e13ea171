// The emulator's stand-in for CUDA's header of this name.
#pragma once
#include "emulator/builtins.h"

#define CUDART_VERSION 13000  // the release whose headers these follow
