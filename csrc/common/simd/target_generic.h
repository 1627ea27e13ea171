// Include first in a translation unit for any CPU: 16-byte vectors, lowered by the compiler to what the baseline has.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#define FASTCONV_SIMD_GENERIC 1
#define FASTCONV_VECTOR_BYTES 16
