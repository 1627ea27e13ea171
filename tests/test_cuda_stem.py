"""The CUDA kernels for stems (few input channels), run by the emulator, against the CPU kernels and float64."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from cuda_convolutions import ACTIVATIONS, CudaRun, assert_matches, check_epilogue, configured
from emulator_library import Library, Timing, build
from reference import Conv

KERNELS = ("stem", "stem_mma", "stem_input_grad", "stem_weight_grad")
SOURCES = [f"csrc/conv2d/cuda_{name}.cu" for name in KERNELS]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])


@pytest.fixture(scope="module")
def library() -> Library:
    return build(SOURCES)


@pytest.fixture(scope="module")
def checked() -> Library:
    return build(SOURCES, "checked")


def stem(window: int, stride: int, padding: int, filters: int, size: tuple[int, int], **rest: object) -> Conv:
    return Conv(
        k_per_group=filters,
        size=size,
        kernel=(window, window),
        stride=(stride, stride),
        padding=(padding,) * 4,
        **{"c_per_group": 3, **rest},  # type: ignore[arg-type]
    )


def check(library: Library, problem: Conv, channels_last: bool, offset: int = 0) -> None:
    run = CudaRun(problem, channels_last, offset)
    assert_matches(run, run.results(library, "stem"), "stem")
    if problem.dtype != torch.float32:
        assert_matches(run, {"output": run.forward(library, "stem_mma")}, "stem_mma")


# ResNet, AlexNet, VGG, MobileNet, LeNet, and a patch embedding; smaller images.
LECTURE = [
    stem(7, 2, 3, 64, (26, 32), n=1),
    stem(11, 4, 2, 96, (36, 44), n=1),
    stem(3, 1, 1, 64, (20, 28), n=1),
    stem(3, 2, 1, 32, (40, 32)),
    stem(5, 1, 0, 6, (32, 32), c_per_group=1),
    stem(4, 4, 0, 96, (32, 32)),
]


@LAYOUTS
@pytest.mark.parametrize("problem", LECTURE, ids=lambda p: f"{p.kernel[0]}x{p.kernel[1]}s{p.stride[0]}")
def test_stems_of_the_lecture(library: Library, problem: Conv, channels_last: bool) -> None:
    for dtype in DTYPES:
        for integers in (True, False):
            check(library, replace(problem, dtype=dtype, integers=integers), channels_last)


def random_problem(seed: int) -> Conv:
    dice = random.Random(seed)
    kernel = (dice.randint(1, 11), dice.randint(1, 11))
    padding = tuple(dice.randint(0, 5) for _ in range(4))
    size = tuple(max(1, kernel[i] - padding[i] - padding[i + 2]) + dice.randint(0, 30) for i in range(2))
    return Conv(
        n=dice.randint(1, 3),
        c_per_group=dice.randint(1, 4),
        k_per_group=dice.choice([1, 5, 8, 17, 33, 70]),
        size=(size[0], size[1]),
        kernel=kernel,
        stride=(dice.randint(1, 4), dice.randint(1, 4)),
        padding=(padding[0], padding[1], padding[2], padding[3]),
        dtype=DTYPES[seed % 3],
        integers=seed % 2 == 0,
        seed=seed,
    )


@LAYOUTS
@pytest.mark.parametrize("seed", range(24))
def test_random_problems(library: Library, seed: int, channels_last: bool) -> None:
    with configured(library, sm_count=(1, 3, 132)[seed % 3]):
        check(library, random_problem(seed), channels_last, seed % 5)


@LAYOUTS
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_epilogue(library: Library, dtype: torch.dtype, activation: str, channels_last: bool) -> None:
    for algo in ("stem", "stem_mma")[: 1 if dtype == torch.float32 else 2]:
        check_epilogue(library, algo, stem(3, 2, 1, 11, (9, 12), dtype=dtype), activation, channels_last)


def check_nan(library: Library, algo: str, window: int, stride: int, channels_last: bool) -> None:
    problem = stem(window, stride, 0, 9, (23, 23), n=1, dtype=torch.float16)
    run = CudaRun(problem, channels_last)
    run.tensors["x"][0, 1, 11, 11] = float("nan")
    y = run.forward(library, algo)
    touched = torch.zeros(y.shape[2:], dtype=torch.bool)
    starts = range(0, 23 - window + 1, stride)
    reached = [i for i, start in enumerate(starts) if start <= 11 < start + window]
    touched[reached[0] : reached[-1] + 1, reached[0] : reached[-1] + 1] = True
    assert torch.equal(y.isnan(), touched.expand_as(y))


@LAYOUTS
@pytest.mark.parametrize("algo", ["stem", "stem_mma"])
def test_nan_stays_in_its_windows(library: Library, algo: str, channels_last: bool) -> None:
    """Tensor cores multiply more than the window: what lies beside it must not get in."""
    for window, stride in ((3, 1), (5, 1), (7, 2), (11, 4)):
        check_nan(library, algo, window, stride, channels_last)


@LAYOUTS
def test_on_devices_of_little_shared_memory(library: Library, channels_last: bool) -> None:
    with configured(library, capability=86):
        for channels in (1, 3):
            problem = stem(11, 4, 2, 64, (24, 28), n=1, c_per_group=channels, dtype=torch.float16, integers=True)
            check(library, problem, channels_last)
            run = CudaRun(replace(problem, stride=(1, 1), size=(12, 15)), channels_last)
            assert_matches(run, {"output": run.forward(library, "stem_mma")}, "stem_mma")


@LAYOUTS
def test_windows_smaller_than_the_stride(library: Library, channels_last: bool) -> None:
    """Elements that no window reaches have a gradient of zero."""
    for kernel, stride in (((1, 1), (2, 2)), ((2, 3), (4, 4)), ((1, 3), (3, 1)), ((5, 2), (1, 4))):
        problem = Conv(kernel=kernel, stride=stride, k_per_group=9, size=(13, 18), padding=(0, 1, 2, 0), integers=True)
        check(library, problem, channels_last)


@LAYOUTS
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_whole_vectors_of_filters(library: Library, channels: int, channels_last: bool) -> None:
    for dtype in DTYPES:
        for sm_count in (1, 132):
            with configured(library, sm_count=sm_count):
                problem = stem(3, 1, 1, 24, (19, 70), n=2, c_per_group=channels, dtype=dtype, integers=True)
                check(library, problem, channels_last)


@LAYOUTS
def test_nan_gradient_reaches_its_window_alone(library: Library, channels_last: bool) -> None:
    for window, stride in ((3, 1), (5, 1), (7, 2), (11, 4), (2, 4)):
        run = CudaRun(stem(window, stride, 0, 9, (33, 43), n=1), channels_last)
        run.tensors["grad"][0, 4, 3, 5] = float("nan")
        grad_x = run.input_grad(library, "stem")
        touched = torch.zeros(grad_x.shape[2:], dtype=torch.bool)
        touched[3 * stride : 3 * stride + window, 5 * stride : 5 * stride + window] = True
        assert torch.equal(grad_x.isnan(), touched.expand_as(grad_x))


@LAYOUTS
@pytest.mark.parametrize("timing", list(Timing), ids=str)
def test_no_races(checked: Library, timing: Timing, channels_last: bool) -> None:
    with configured(checked, timing=timing, check_races=True, sm_count=1):
        check(checked, stem(3, 2, 1, 11, (30, 33), n=1, integers=True, dtype=torch.float16), channels_last)
        check(checked, stem(5, 1, 0, 6, (20, 21), n=2, integers=True, c_per_group=1), channels_last)


def test_refuses_with_a_reason(library: Library) -> None:
    for problem, reason in (
        (Conv(c_per_group=5), "at most 4 input channels"),
        (Conv(groups=2, c_per_group=2), "groups == 1"),
        (Conv(dilation=(1, 2)), "dilation 1"),
        (Conv(kernel=(3, 12), size=(16, 16)), "11x11"),
        (Conv(stride=(5, 1)), "strides of at most 4"),
        (Conv(dtype=torch.float64), "float64"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            CudaRun(problem).forward(library, "stem")
    with pytest.raises(RuntimeError, match="needs float16 or bfloat16"):
        CudaRun(Conv()).forward(library, "stem_mma")
