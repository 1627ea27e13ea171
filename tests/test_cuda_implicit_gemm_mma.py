"""Implicit GEMM on tensor cores, run by the emulator, against the CPU kernels and float64."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from cuda_convolutions import ACTIVATIONS, CudaRun, assert_matches, check_epilogue, configured
from emulator_library import Library, Timing, build
from reference import Conv

ALGO = "implicit_gemm_mma"
SOURCES = [f"csrc/conv2d/cuda_{ALGO}_{part}.cu" for part in ("forward", "input_grad", "weight_grad")]
DTYPES = [torch.float16, torch.bfloat16]
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])


@pytest.fixture(scope="module")
def library() -> Library:
    return build(SOURCES)


@pytest.fixture(scope="module")
def checked() -> Library:
    return build(SOURCES, "checked")


def check(library: Library, problem: Conv, channels_last: bool, offset: int = 0) -> None:
    run = CudaRun(problem, channels_last, offset)
    assert_matches(run, run.results(library, ALGO), ALGO)


def conv(window: int, c: int, k: int, size: tuple[int, int], stride: int = 1, padding: int = 0, **rest: object) -> Conv:
    return Conv(
        c_per_group=c,
        k_per_group=k,
        size=size,
        kernel=(window, window),
        stride=(stride, stride),
        padding=(padding,) * 4,
        **{"n": 1, "dtype": torch.float16, "integers": True, **rest},  # type: ignore[arg-type]
    )


# One of each way that a kernel can take: with and without whole vectors, in both layouts.
PROBLEMS = {
    "3x3": conv(3, 40, 72, (7, 8), 1, 1, n=2),
    "3x3-stride-2": conv(3, 16, 24, (9, 12), 2, 1),
    "1x1": conv(1, 72, 40, (8, 9)),
    "1x1-stride-2": conv(1, 24, 16, (7, 10), 2),
    "1x1-odd-planes": conv(1, 16, 8, (5, 5), n=3),
    "odd-channels": conv(3, 13, 19, (6, 7), 1, 1),
    "one-channel": conv(2, 1, 1, (4, 5)),
    "dilated": conv(3, 8, 16, (9, 10), 1, 2, dilation=(2, 3)),
    "dilated-stride": conv(3, 8, 8, (13, 14), 2, 2, dilation=(2, 3)),
    "groups": conv(3, 16, 24, (6, 8), 1, 1, groups=2),
    "groups-odd": conv(3, 3, 5, (6, 8), 2, 1, groups=3),
    "window-of-the-image": conv(5, 8, 16, (5, 5), n=3),
    "strides-beyond-the-window": conv(2, 8, 8, (11, 11), 3),
}


@LAYOUTS
@pytest.mark.parametrize("name", PROBLEMS)
def test_integers_are_exact(library: Library, name: str, channels_last: bool) -> None:
    for dtype in DTYPES:
        check(library, replace(PROBLEMS[name], dtype=dtype), channels_last)


@LAYOUTS
def test_every_tile(library: Library, channels_last: bool) -> None:
    """One multiprocessor wants tiles of 128x128, many want 64x64; both with edges, and with more slices than stages."""
    for problem in (conv(3, 72, 200, (11, 13), 1, 1), conv(1, 200, 72, (12, 12)), conv(3, 75, 199, (9, 15), 1, 1)):
        for sm_count in (1, 132):
            with configured(library, sm_count=sm_count):
                check(library, problem, channels_last)


@LAYOUTS
def test_shares_of_the_depth(library: Library, channels_last: bool) -> None:
    """Few tiles, many multiprocessors, and enough depth: split-K, with and without whole vectors, with an epilogue."""
    for problem in (
        conv(3, 72, 64, (5, 6), 1, 1),
        conv(1, 600, 520, (4, 4)),
        conv(3, 70, 67, (7, 5), 2, 1),
        conv(3, 64, 65, (4, 4), 1, 1, groups=2),
    ):
        run = CudaRun(problem, channels_last)
        with configured(library, sm_count=40):
            for op in ("conv2d", "conv2d_input_grad"):
                floats = library.call(f"{op}_workspace", ALGO, run.described)
                assert floats is not None
                assert floats > 0 or (op == "conv2d_input_grad" and problem.stride != (1, 1))
            check(library, problem, channels_last)
            if problem.kernel == (1, 1):
                check_epilogue(library, ALGO, replace(problem, integers=False), "relu6", channels_last)


@LAYOUTS
def test_weight_gradients_of_many_shares(library: Library, channels_last: bool) -> None:
    """Enough pixels for several shares, the last one shorter; their sums are added in order."""
    for problem in (conv(1, 24, 40, (20, 24), n=3), conv(3, 8, 8, (23, 25), 1, 1, n=2), conv(1, 9, 5, (27, 31))):
        run = CudaRun(problem, channels_last)
        weights = problem.k_per_group * problem.c_per_group * problem.kernel[0] ** 2
        with configured(library, sm_count=3):
            floats = library.call("conv2d_weight_grad_workspace", ALGO, run.described)
            assert floats is not None
            assert floats > 2 * weights
            check(library, problem, channels_last)


def random_problem(seed: int) -> Conv:
    dice = random.Random(seed)
    kernel = (dice.randint(1, 4), dice.randint(1, 4))
    dilation = (dice.choice([1, 1, 2, 3]), dice.choice([1, 1, 2, 3]))
    padding = tuple(dice.randint(0, 3) for _ in range(4))
    reach = [dilation[i] * (kernel[i] - 1) + 1 for i in range(2)]
    size = tuple(max(1, reach[i] - padding[i] - padding[i + 2]) + dice.randint(0, 8) for i in range(2))
    return Conv(
        n=dice.randint(1, 3),
        groups=dice.choice([1, 1, 2, 3]),
        c_per_group=dice.choice([1, 5, 8, 16, 24, 33]),
        k_per_group=dice.choice([1, 4, 8, 16, 30, 40]),
        size=(size[0], size[1]),
        kernel=kernel,
        stride=(dice.randint(1, 3), dice.randint(1, 3)),
        padding=(padding[0], padding[1], padding[2], padding[3]),
        dilation=dilation,
        dtype=DTYPES[seed % 2],
        integers=seed % 3 == 0,
        seed=seed,
    )


@LAYOUTS
@pytest.mark.parametrize("seed", range(16))
def test_random_problems(library: Library, seed: int, channels_last: bool) -> None:
    with configured(library, timing=list(Timing)[seed % 3], seed=seed, sm_count=(1, 3, 132)[seed % 3]):
        check(library, random_problem(seed), channels_last, seed % 4 // 2)


@LAYOUTS
def test_addresses_that_forbid_vectors(library: Library, channels_last: bool) -> None:
    for name in ("3x3", "1x1"):
        check(library, PROBLEMS[name], channels_last, offset=3)


@LAYOUTS
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue(library: Library, activation: str, channels_last: bool) -> None:
    """With 16-byte stores and without; two groups, whose tables of scales differ."""
    for k, size in ((8, (4, 6)), (11, (5, 7))):
        problem = Conv(groups=2, c_per_group=8, k_per_group=k, size=size, padding=(1,) * 4, dtype=torch.float16)
        check_epilogue(library, ALGO, problem, activation, channels_last)


@LAYOUTS
def test_nan_stays_in_its_windows(library: Library, channels_last: bool) -> None:
    """Tiles hold more than an image: what lies beside a window, or in the padding of depth, must not get in."""
    for c in (8, 13):
        run = CudaRun(conv(3, c, 9, (9, 11), 1, 1, n=2, integers=False), channels_last)
        run.tensors["x"][1, c - 1, 4, 5] = float("nan")
        run.tensors["grad"][0, 8, 3, 10] = float("nan")
        for result, (image, rows, columns) in (
            (run.forward(library, ALGO), (1, slice(3, 6), slice(4, 7))),
            (run.input_grad(library, ALGO), (0, slice(2, 5), slice(9, 11))),
        ):
            touched = torch.zeros(result.shape, dtype=torch.bool)
            touched[image, :, rows, columns] = True
            assert torch.equal(result.isnan(), touched)
        corner = CudaRun(conv(3, c, 9, (9, 11), 1, 1, n=2, integers=False), channels_last)
        corner.tensors["x"][0, c - 1, 0, 0] = float("nan")
        result = corner.weight_grad(library, ALGO)
        touched = torch.zeros(result.shape, dtype=torch.bool)
        touched[:, c - 1, :2, :2] = True
        assert torch.equal(result.isnan(), touched)


@LAYOUTS
@pytest.mark.parametrize("timing", list(Timing), ids=str)
def test_no_races(checked: Library, timing: Timing, channels_last: bool) -> None:
    with configured(checked, timing=timing, check_races=True, sm_count=132):
        for problem in (conv(3, 24, 16, (4, 6), 1, 1), conv(1, 168, 8, (4, 4)), conv(3, 13, 5, (5, 5), 2, 1)):
            check(checked, problem, channels_last)
    with configured(checked, timing=timing, check_races=True, sm_count=1):  # tiles of 128x128
        check(checked, conv(1, 136, 136, (15, 15)), channels_last)


def test_refuses_with_a_reason(library: Library) -> None:
    with pytest.raises(RuntimeError, match="needs float16 or bfloat16"):
        CudaRun(Conv()).forward(library, ALGO)
    with pytest.raises(RuntimeError, match="at least one output"):
        CudaRun(Conv(n=0, dtype=torch.float16)).input_grad(library, ALGO)
