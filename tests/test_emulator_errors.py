"""Every mistake that the emulator knows by itself has a case in emulator_errors.cu, and its own text."""

from __future__ import annotations

import pytest
import torch
from emulator_kernels import ERRORS, library
from emulator_library import Timing

CASES = {
    1: r"__trap\(\) \[block 0 thread 3, warp 0\]",
    2: "__shfl_sync with mask 0000ff00, which lacks lane 7",
    3: "mapa to rank 1 of a cluster of 1 blocks",
    4: "ld.shared: shared address .* is not aligned to 16 bytes",
    5: "ld.shared: shared address .* but the block has 1040 to 50192",
    6: "a pointer that is not into this block's shared memory",
    7: "cp.async: the source .* is not aligned to 16 bytes",
    8: "cp.async of 16 bytes from a source of 17",
    9: "named barrier 16 over 32 threads",
    10: "named barrier 1 over 33 threads",
    11: "barrier.cluster.wait without barrier.cluster.arrive",
    12: "barrier.cluster.arrive twice",
    13: "setmaxnreg.inc to 232 registers, and the warp has 248",
    14: "an atomic of 4 bytes at a misaligned address",
    15: "ldmatrix by a warp of which lanes [0-9a-f]{8} are there, expected all 32",
    16: "a vector of 16 bytes at address .*, expected a multiple of its size",
    17: "a vector of 8 bytes at address",
    18: "a vector of 16 bytes at address",
    20: "mbarrier.init at address .* expected a multiple of 8",
    21: "is not an initialised mbarrier",
    22: "the mbarrier at shared address .* has been overwritten",
    23: "a wait for parity 2 of an mbarrier, expected 0 or 1",
    24: "more than 64 mbarriers in a block",
    25: "which has all 3 of phase 0 already .16 bytes outstanding",
    30: "a tensor map that was not encoded",
    31: "the map has 2 dimensions and is tiled, the instruction wants 4 and im2col",
    32: "TMA: shared address .* is not aligned to 128 bytes",
    33: None,
    34: "a block exits with this TMA load in flight",
    35: "a thread exits before its bulk store was read",
    40: "a wgmma descriptor with a base offset",
    41: "a wgmma descriptor without a swizzle",
    42: "a wgmma operand: shared address .* but the block has",
    43: "the lanes of a warp gave wgmma different descriptors",
    44: "wgmma by a warp of which lanes [0-9a-f]{8} are there, expected all 32",
    45: "an accumulator register was written while wgmma was in flight",
    46: "wgmma accumulators of 128 registers a thread, and the warp has 104",
}


def space() -> torch.Tensor:
    words = torch.zeros(1024)
    return words[-words.data_ptr() // 4 % 32 :]


def test_the_cases_are_right_but_for_their_mistake() -> None:
    library(files=(ERRORS,)).call("wrong", "cases", space(), 0)


@pytest.mark.parametrize("which", [case for case, text in CASES.items() if text])
def test_mistake(which: int) -> None:
    with pytest.raises(RuntimeError, match=CASES[which]):
        library(files=(ERRORS,), timing=Timing.lazy).call("wrong", "cases", space(), which)
