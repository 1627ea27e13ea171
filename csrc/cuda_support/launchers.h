// Names a launcher (the tensor-free C++ function that starts a kernel) so that tests can call it by name.
#pragma once

#include "cuda_support/cuda.h"

#if defined(FASTCONV_EMULATOR)
#include "emulator/launchers.h"
#else
/// FASTCONV_LAUNCHER("max_pool2d", "rows", launch_max_pool2d); in the .cu file, after the function, in its namespace.
///
/// The function returns nothing, or an int64_t (the size of a workspace). It takes problems by const reference, tensors
/// as pointers, numbers by value, and a cudaStream_t. The emulator's library lists it with its signature
/// (emulator/launchers.h); nvcc needs nothing.
#define FASTCONV_LAUNCHER(op, algo, function) static_assert(true)
#endif
