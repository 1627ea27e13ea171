"""The emulator of CUDA kernels (csrc/emulator): mma.sync, wgmma, and a whole Hopper pipeline.

The kernels are in emulator_*.cu. Planted bugs are chosen by a kernel parameter; each must be caught as the tables say.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from emulator_kernels import PIPELINE_PROBLEMS, REUSING, WGMMA, library, pipeline, product, run_mma
from emulator_library import Timing

# ---------------------------------------------------------------- mma.sync and wgmma


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_mma_sync(dtype: torch.dtype) -> None:
    assert run_mma(library(), 0, dtype)


def _products() -> list[str]:
    source = (Path(__file__).parent / "emulator_wgmma.cu").read_text()
    return [line.split("(")[1].split(",")[0] for line in source.splitlines() if line.startswith("PRODUCT(")]


@pytest.mark.parametrize("name", _products())
def test_wgmma_layouts(name: str) -> None:
    """Facts 13 and, with shifted rows of a K-major operand, 14. Only 128-byte swizzles were verified on hardware."""
    for timing in (Timing.lazy, Timing.eager):
        for shift in range(0, 18, 3) if name.endswith("k") else (0,):
            assert product(library(files=(WGMMA,), timing=timing), name, shift)


def test_operands_of_an_earlier_launch_are_forgotten() -> None:
    """The emulator converts an operand once for four warps; plain stores of the next launch must count."""
    for value in (1, 2, 3):
        d = torch.zeros(1)
        library(files=(WGMMA,)).call("refill", "wgmma", d, value)
        assert d.item() == 16 * value


def test_wgmma_with_exchanged_offsets_is_caught() -> None:
    """Leading and stride offset of an MN-major operand the wrong way round: wrong values, or beyond shared memory."""
    try:
        right = product(library(files=(WGMMA,)), "f16_256_128_km", exchanged=1)
    except RuntimeError as error:
        right = "a wgmma operand" not in str(error)
    assert not right


# ---------------------------------------------------------------- the pipeline: TMA, mbarriers, clusters


@pytest.mark.parametrize("cluster", ["single", "pair"])
@pytest.mark.parametrize("kind", ["plain", "checked", "ucontext"])
def test_pipeline(kind: str, cluster: str) -> None:
    problems = [*PIPELINE_PROBLEMS, REUSING] if kind == "plain" else PIPELINE_PROBLEMS[1:3]
    timings = ((Timing.lazy, 1), (Timing.eager, 2), (Timing.random, 3)) if kind == "plain" else ((Timing.lazy, 1),)
    for problem, (timing, seed) in itertools.product(problems, timings):
        assert pipeline(library(kind, timing=timing, seed=seed), cluster, problem, 0)


def test_pipeline_in_bfloat16() -> None:
    assert pipeline(library(), "single", PIPELINE_PROBLEMS[1], 0, torch.bfloat16)


PIPELINE_BUGS = {
    # bug: what is wrong, the library and timing that must find it, the error's text (None: a wrong result)
    1: ("no wait for the full barrier", "checked", Timing.lazy, "race on shared address"),
    2: ("no wait for the empty barrier", "plain", Timing.lazy, "an arrival on mbarrier"),
    3: ("wrong swizzle in the epilogue", "plain", Timing.lazy, None),
    4: ("im2col upper corner of W + 1", "plain", Timing.lazy, None),
    5: ("no wgmma_wait_group<0> before reading", "plain", Timing.lazy, "a warp exits with wgmma in flight"),
    6: ("no wgmma_wait_group<1> before release", "plain", Timing.lazy, None),
    7: ("no order between the warpgroups", "checked", Timing.lazy, "race on shared address|deadlock"),
    8: ("expect_tx 128 bytes short", "plain", Timing.lazy, "deadlock(.|\n)*-128 bytes outstanding"),
    9: ("expect_tx 128 bytes long", "plain", Timing.lazy, "deadlock(.|\n)* 128 bytes outstanding"),
    10: ("no fence_proxy_async", "checked", Timing.lazy, "has not executed fence_proxy_async since"),
    11: ("no named barrier before the TMA store", "checked", Timing.lazy, "race on shared address"),
    12: ("no wgmma_fence", "plain", Timing.lazy, "wgmma without a wgmma_fence"),
    13: ("no bulk wait before reuse", "checked", Timing.lazy, "is not ordered after the read by bulk stores"),
    14: ("releases the slot in use", "plain", Timing.lazy, None),
    15: ("no fence_mbarrier_init", "plain", Timing.lazy, "without a fence_mbarrier_init"),
    17: ("no cluster barrier at exit", "checked", Timing.lazy, "which may have exited by then"),
    18: (
        "no __syncthreads after mbarrier_init",
        "checked",
        Timing.lazy,
        "mbarrier.init at|not an initialised mbarrier",
    ),
}


@pytest.mark.parametrize("bug", PIPELINE_BUGS)
def test_planted_pipeline_bugs_are_caught(bug: int) -> None:
    _, kind, timing, error = PIPELINE_BUGS[bug]
    built = library(kind, timing=timing)
    cluster = "pair" if bug == 17 else "single"
    if error is None:
        assert not pipeline(built, cluster, REUSING, bug)
    else:
        with pytest.raises(RuntimeError, match=error):
            pipeline(built, cluster, REUSING, bug)
