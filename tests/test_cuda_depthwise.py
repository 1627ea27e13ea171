"""The depthwise CUDA kernels, run by the emulator, against the CPU kernels and float64."""

from __future__ import annotations

import pytest
import torch
from cuda_convolutions import ACTIVATIONS, CudaRun, assert_matches, check_epilogue, configured
from emulator_library import Library, Timing, build
from reference import Conv

KERNELS = ("launch", "planes", "channels", "weight_grad_planes", "weight_grad_channels")
SOURCES = [f"csrc/depthwise/cuda_{name}.cu" for name in KERNELS]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])


@pytest.fixture(scope="module")
def library() -> Library:
    return build(SOURCES)


@pytest.fixture(scope="module")
def checked() -> Library:
    return build(SOURCES, "checked")


def depthwise(channels: int, size: tuple[int, int], window: int = 3, stride: int = 1, **rest: object) -> Conv:
    padding = rest.pop("padding", (window // 2,) * 4)
    return Conv(
        groups=channels,
        c_per_group=1,
        k_per_group=1,
        size=size,
        kernel=(window, window),
        stride=(stride, stride),
        padding=padding,  # type: ignore[arg-type]
        **rest,  # type: ignore[arg-type]
    )


def check(library: Library, problem: Conv, channels_last: bool, offset: int = 0) -> None:
    run = CudaRun(problem, channels_last, offset)
    assert_matches(run, run.results(library, "depthwise"), "depthwise")


# MobileNet-v2's maps, with fewer channels: (channels, size, stride).
LECTURE = [
    (8, 112, 1),
    (8, 112, 2),
    (12, 56, 1),
    (12, 56, 2),
    (24, 28, 1),
    (24, 28, 2),
    (40, 14, 1),
    (72, 14, 2),
    (160, 7, 1),
]


@LAYOUTS
@pytest.mark.parametrize(("channels", "size", "stride"), LECTURE)
def test_layers_of_mobilenet(library: Library, channels: int, size: int, stride: int, channels_last: bool) -> None:
    dtype = DTYPES[(size // 7 + stride) % 3]
    check(library, depthwise(channels, (size, size), 3, stride, n=2, dtype=dtype, integers=True), channels_last)


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("window", [3, 5, 7])
def test_every_kernel(library: Library, window: int, stride: int, dtype: torch.dtype, channels_last: bool) -> None:
    for offset, channels, size in ((0, 8, (15, 18)), (1, 8, (12, 13)), (0, 5, (9, 10))):
        for integers in (True, False):
            problem = depthwise(channels, size, window, stride, n=3, dtype=dtype, integers=integers)
            check(library, problem, channels_last, offset)


@LAYOUTS
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_epilogue(library: Library, dtype: torch.dtype, activation: str, channels_last: bool) -> None:
    for size in ((6, 6), (5, 7)):  # even rows of outputs are stored in pairs
        check_epilogue(library, "depthwise", depthwise(8, size, dtype=dtype), activation, channels_last)


PADDINGS = [(0, 0, 0, 0), (1, 0, 0, 2), (0, 1, 3, 0), (4, 3, 2, 5), (7, 8, 9, 7)]


@LAYOUTS
@pytest.mark.parametrize("padding", PADDINGS, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("window", [3, 5, 7])
def test_any_padding(
    library: Library, window: int, stride: int, padding: tuple[int, int, int, int], channels_last: bool
) -> None:
    for size in ((8, 9), (11, 7)):
        check(library, depthwise(6, size, window, stride, padding=padding, integers=True), channels_last)


@LAYOUTS
@pytest.mark.parametrize("stride", [1, 2])
def test_maps_smaller_than_the_window(library: Library, stride: int, channels_last: bool) -> None:
    for size in ((1, 1), (2, 1), (1, 5)):
        for window in (3, 7):
            check(library, depthwise(33, size, window, stride, n=5, integers=True), channels_last)


@LAYOUTS
@pytest.mark.parametrize("sm_count", [1, 132])
@pytest.mark.parametrize("stride", [1, 2])
def test_work_divided_among_few_and_many_multiprocessors(
    library: Library, stride: int, sm_count: int, channels_last: bool
) -> None:
    with configured(library, sm_count=sm_count):
        for problem in (
            depthwise(3, (70, 130), 5, stride, n=1, integers=True),  # one strip, or many
            depthwise(7, (6, 5), 3, stride, n=31, integers=True),  # planes of several images in a block
            depthwise(300, (5, 3), 3, stride, n=2, integers=True),  # several tiles of channels
        ):
            check(library, problem, channels_last)


@LAYOUTS
@pytest.mark.parametrize("timing", list(Timing), ids=str)
def test_no_races(checked: Library, timing: Timing, channels_last: bool) -> None:
    with configured(checked, timing=timing, check_races=True, sm_count=1):
        for stride in (1, 2):
            check(checked, depthwise(9, (14, 14), 3, stride, n=3, dtype=torch.float16, integers=True), channels_last, 1)
            check(checked, depthwise(2, (40, 300), 5, stride, n=1, integers=True), channels_last)


def test_refuses_with_a_reason(library: Library) -> None:
    for problem, reason in (
        (depthwise(4, (8, 8), 3, 3), "stride 1 or 2"),
        (depthwise(4, (8, 8), 4), "3x3, 5x5 or 7x7"),
        (depthwise(4, (8, 8), 3, dilation=(2, 2)), "dilation 1"),
        (depthwise(4, (8, 8), dtype=torch.float64), "float64"),
        (Conv(groups=4, c_per_group=1, k_per_group=2), "as many output channels"),
        (Conv(groups=1), "groups == in_channels"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            CudaRun(problem).forward(library, "depthwise")


def test_more_channels_than_blocks_along_y_are_refused(library: Library) -> None:
    run = CudaRun(depthwise(4, (3, 3)), channels_last=True)
    run.described.c = run.described.k = run.described.groups = 65535 * 64 + 1
    run.described.layout = 1
    with pytest.raises(RuntimeError, match="fewer than 2\\^22 channels"):
        run.forward(library, "depthwise")
