// Include first in a translation unit for 64-bit Arm, where NEON with FMA is the baseline.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#define FASTCONV_SIMD_NEON 1
#define FASTCONV_VECTOR_BYTES 16
#include <arm_neon.h>
