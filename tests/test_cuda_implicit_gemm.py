"""The CUDA implicit GEMMs, run by the emulator, against the CPU kernels and float64."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from cuda_convolutions import ACTIVATIONS, OPS, CudaEpilogue, CudaRun, assert_matches, check_epilogue, configured
from emulator_library import ConvProblem, Library, Timing, build
from reference import Conv

ALGO = "implicit_gemm_fp32"
SOURCES = [f"csrc/conv2d/cuda_{ALGO}{part}.cu" for part in ("", "_input_grad", "_weight_grad")]
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])


@pytest.fixture(scope="module")
def library() -> Library:
    return build(SOURCES)


def tiling(library: Library, op: str, problem: ConvProblem) -> tuple[int, int, int]:
    """Rows and columns of the tiles, and into how many parts the depth is split."""
    number = library.call(f"explain_{op}", ALGO, problem)
    assert number is not None
    return number // 1000000, number // 1000 % 1000, number % 1000


def tilings(library: Library, run: CudaRun) -> dict[str, tuple[int, int, int]]:
    return {name: tiling(library, op, run.described) for name, op in OPS.items()}


def check(library: Library, problem: Conv, channels_last: bool, offset: int = 0) -> None:
    run = CudaRun(problem, channels_last, offset)
    results = run.results(library, ALGO)
    assert_matches(run, results, ALGO)
    if problem.seed % 4 == 0:
        again = run.results(library, ALGO)
        assert all(torch.equal(again[name], results[name]) for name in results), "not the same bits twice"


def random_problem(seed: int) -> Conv:
    """Small, odd, padded on one side; every fourth one pixel wide windows, where whole planes are vectors."""
    dice = random.Random(seed)
    pointwise = seed % 4 == 1
    kernel = (1, 1) if pointwise else (dice.randint(1, 4), dice.randint(1, 4))
    dilation = (dice.randint(1, 3), dice.randint(1, 3))
    padding = (0, 0, 0, 0) if pointwise else tuple(dice.randint(0, 3) for _ in range(4))
    reach = [dilation[i] * (kernel[i] - 1) + 1 for i in range(2)]
    size = tuple(max(1, reach[i] - padding[i] - padding[i + 2]) + dice.choice([0, 1, 3, 6, 7]) for i in range(2))
    return Conv(
        n=dice.randint(1, 3),
        groups=dice.choice([1, 1, 2, 3]),
        c_per_group=dice.choice([1, 3, 4, 8, 12]),
        k_per_group=dice.choice([1, 2, 4, 5, 12]),
        size=(size[0], size[1]),
        kernel=kernel,
        stride=(1, 1) if seed % 8 == 1 else (dice.randint(1, 4), dice.randint(1, 3)),
        padding=padding,  # type: ignore[arg-type]
        dilation=dilation,
        integers=seed % 3 != 0,
        seed=seed,
    )


@LAYOUTS
@pytest.mark.parametrize("seed", range(40))
def test_random_problems(library: Library, seed: int, channels_last: bool) -> None:
    with configured(library, sm_count=(1, 3, 132)[seed % 3], capability=(80, 86, 90)[seed % 3]):
        check(library, random_problem(seed), channels_last, (0, 0, 4, 1, 3)[seed % 5])


# One or two tiles and a piece along both sides of the products: channels of whole vectors and odd ones, windows and
# single pixels. The tiles of output and input are pixels x channels, those of the weight channels x taps.
LARGE = Conv(n=1, c_per_group=120, k_per_group=252, size=(16, 15), padding=(1, 0, 1, 0), kernel=(3, 1))
LONG = Conv(n=1, c_per_group=60, k_per_group=61, size=(17, 14), padding=(1, 0, 1, 1))
SMALL = Conv(n=2, c_per_group=28, k_per_group=68, size=(9, 7), padding=(1, 1, 1, 1))
TILES = [
    (LARGE, 1, (128, 128), (128, 128)),
    (replace(LARGE, k_per_group=251), 1, (128, 128), (128, 128)),
    (replace(LARGE, kernel=(1, 1), padding=(0, 0, 0, 0)), 1, (128, 128), (128, 128)),
    (LONG, 1, (128, 64), (64, 128)),
    (replace(LONG, k_per_group=60), 1, (128, 64), (64, 128)),
    (replace(LONG, kernel=(1, 1), padding=(0, 0, 0, 0), k_per_group=64, c_per_group=124), 1, None, (64, 128)),
    (replace(LONG, kernel=(1, 1), padding=(0, 0, 0, 0), k_per_group=60), 1, (128, 64), (64, 64)),
    (SMALL, 132, (64, 64), (64, 64)),
    (replace(SMALL, k_per_group=69), 132, (64, 64), (64, 64)),
    (replace(SMALL, kernel=(1, 1), padding=(0, 0, 0, 0), size=(10, 8)), 132, (64, 64), (64, 64)),
]


@LAYOUTS
@pytest.mark.parametrize("number", range(len(TILES)))
def test_every_tile(library: Library, number: int, channels_last: bool) -> None:
    problem, sm_count, pixels_by_channels, channels_by_taps = TILES[number]
    with configured(library, sm_count=sm_count):
        for integers in (True, False):
            run = CudaRun(replace(problem, integers=integers), channels_last)
            chosen = {name: tiling[:2] for name, tiling in tilings(library, run).items()}
            assert chosen["weight"] == channels_by_taps
            if pixels_by_channels:
                wanted = pixels_by_channels if channels_last else pixels_by_channels[::-1]
                assert chosen["output"] == chosen["input"] == wanted
            assert_matches(run, run.results(library, ALGO), ALGO)


# AlexNet's grouped 5x5, a ResNet's stem, its strided 1x1 and 3x3, a dilated 3x3 and a patch embedding, small.
LECTURE = {
    "grouped": Conv(groups=2, c_per_group=6, k_per_group=8, size=(13, 13), kernel=(5, 5), padding=(2, 2, 2, 2)),
    "stem": Conv(c_per_group=3, k_per_group=8, size=(32, 32), kernel=(7, 7), stride=(2, 2), padding=(3, 3, 3, 3)),
    "1x1": Conv(c_per_group=16, k_per_group=8, size=(14, 14), kernel=(1, 1), stride=(2, 2)),
    "3x3": Conv(c_per_group=8, k_per_group=12, size=(14, 15), padding=(1, 1, 1, 1), stride=(2, 2)),
    "dilated": Conv(c_per_group=5, k_per_group=7, size=(15, 17), padding=(4, 1, 0, 3), dilation=(2, 3)),
    "dilated stride": Conv(c_per_group=4, k_per_group=4, size=(19, 17), stride=(4, 3), dilation=(2, 3)),
    "patches": Conv(c_per_group=3, k_per_group=20, size=(16, 16), kernel=(8, 8), stride=(8, 8)),
    "long windows": Conv(c_per_group=1, k_per_group=4, size=(34, 3), kernel=(32, 1), padding=(1, 0, 2, 0)),
    "wide windows": Conv(c_per_group=2, k_per_group=4, size=(2, 35), kernel=(1, 32), padding=(0, 3, 0, 0)),
    "longest stride": Conv(size=(3, 2), kernel=(2, 1), stride=(2**31 - 1, 2**31 - 2), padding=(0, 1, 1, 0)),
    "stride past the image": Conv(size=(3, 2), kernel=(2, 2), stride=(7, 5), padding=(3, 2, 1, 1)),
}


@LAYOUTS
@pytest.mark.parametrize("name", LECTURE)
def test_layers(library: Library, name: str, channels_last: bool) -> None:
    for integers in (True, False):
        check(library, replace(LECTURE[name], integers=integers), channels_last)


SPLIT = Conv(n=1, c_per_group=40, k_per_group=24, size=(6, 7), padding=(1, 1, 1, 1))


@LAYOUTS
def test_split_depth(library: Library, channels_last: bool) -> None:
    """Few tiles on a large device: parts of the depth are added in a second pass, and the bits are the same again."""
    many_pixels = replace(SPLIT, n=16, c_per_group=3)
    with configured(library, sm_count=132):
        for problem, name in ((SPLIT, "output"), (replace(SPLIT, k_per_group=50), "input"), (many_pixels, "weight")):
            for integers in (True, False):
                run = CudaRun(replace(problem, integers=integers), channels_last)
                assert tilings(library, run)[name][2] > 1
                first, second = run.results(library, ALGO), run.results(library, ALGO)
                assert_matches(run, first, ALGO)
                assert all(torch.equal(first[key], second[key]) for key in first)


# Channels in and out, rows and columns of the image, window, stride: of ResNet-50 and VGG.
RESNET = [(64, 64, 56, 3, 1), (256, 64, 56, 1, 1), (128, 128, 56, 3, 2), (512, 512, 7, 3, 1), (64, 64, 224, 3, 1)]


@LAYOUTS
@pytest.mark.parametrize("images", [1, 128])
def test_blocks_fill_a_large_device(library: Library, images: int, channels_last: bool) -> None:
    """Whatever the pass, nearly every multiprocessor gets a block; nothing is split where there are tiles enough."""
    with configured(library, sm_count=132):
        for c, k, size, window, stride in RESNET:
            x, weight = torch.empty(images, c, size, size, device="meta"), torch.empty(k, c, window, window)
            problem = ConvProblem.of(x, weight, (stride, stride), (window // 2,) * 4)
            problem.layout = int(channels_last)
            pixels, outputs = images * size**2, images * (-(-size // stride)) ** 2
            for op, sides, products in (
                ("conv2d", (outputs, k), 1),
                ("conv2d_input_grad", (pixels // stride**2, c), stride**2),
                ("conv2d_weight_grad", (k, c * window**2), 1),
            ):
                rows, columns, splits = tiling(library, op, problem)
                if op != "conv2d_weight_grad" and not channels_last:
                    rows, columns = columns, rows
                tiles = products * -(-sides[0] // rows) * -(-sides[1] // columns)
                assert tiles * splits >= 0.7 * 132
                assert splits == 1 or tiles < 8 * 132


@LAYOUTS
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue(library: Library, activation: str, channels_last: bool) -> None:
    for groups in (1, 2):
        problem = Conv(groups=groups, c_per_group=5, k_per_group=6, size=(6, 9), seed=3)
        check_epilogue(library, ALGO, problem, activation, channels_last)
    with configured(library, sm_count=132):
        assert tilings(library, CudaRun(SPLIT, channels_last))["output"][2] > 1
        check_epilogue(library, ALGO, SPLIT, activation, channels_last)


@LAYOUTS
def test_relu_keeps_nan(library: Library, channels_last: bool) -> None:
    run = CudaRun(Conv(c_per_group=1, k_per_group=1, size=(3, 3), kernel=(1, 1)), channels_last)
    run.tensors["x"][0, 0, 1, 1] = float("nan")
    for activation in ("relu", "relu6"):
        y = run.forward(library, ALGO, CudaEpilogue.of(activation=activation))
        assert y[0, 0, 1, 1].isnan()
        assert int(y.isnan().sum()) == 1


@LAYOUTS
@pytest.mark.parametrize(("window", "stride"), [(1, 1), (3, 1), (3, 2), (2, 3)])
def test_nan_stays_in_its_windows(library: Library, window: int, stride: int, channels_last: bool) -> None:
    """What lies beside a window, or between the steps of a stride, is not multiplied."""
    problem = Conv(n=1, c_per_group=4, k_per_group=9, size=(12, 12), kernel=(window,) * 2, stride=(stride,) * 2)
    run = CudaRun(problem, channels_last)
    run.tensors["x"][0, 1, 6, 6] = float("nan")
    run.tensors["grad"][0, 4, 2, 1] = float("nan")
    y, grad_x = run.forward(library, ALGO), run.input_grad(library, ALGO)
    reads = torch.tensor([i * stride <= 6 < i * stride + window for i in range(y.shape[2])])
    assert torch.equal(y.isnan(), (reads[:, None] & reads).expand_as(y))
    touched = torch.zeros(grad_x.shape[2:], dtype=torch.bool)
    touched[2 * stride : 2 * stride + window, stride : stride + window] = True
    assert torch.equal(grad_x.isnan(), touched.expand_as(grad_x))


@LAYOUTS
@pytest.mark.parametrize("timing", list(Timing), ids=str)
def test_no_races(timing: Timing, channels_last: bool) -> None:
    checked = build(SOURCES, "checked")
    padded = Conv(n=1, c_per_group=20, k_per_group=8, size=(6, 5), padding=(1, 1, 1, 1), integers=True)
    problems = [padded, replace(padded, k_per_group=7), replace(padded, stride=(2, 1)), LECTURE["1x1"], SPLIT]
    for problem in problems:
        with configured(checked, timing=timing, check_races=True, sm_count=132):
            run = CudaRun(replace(problem, integers=True), channels_last)
            assert_matches(run, run.results(checked, ALGO), ALGO)


@LAYOUTS
def test_empty_batch(library: Library, channels_last: bool) -> None:
    """Empty results need no launch; a weight gradient of nothing is zero."""
    results = CudaRun(Conv(n=0, size=(5, 6)), channels_last).results(library, ALGO)
    assert results["output"].shape[0] == results["input"].shape[0] == 0
    assert torch.equal(results["weight"], torch.zeros_like(results["weight"]))


def test_refuses_with_a_reason(library: Library) -> None:
    for problem, reason in (
        (Conv(dtype=torch.float16), "serves float32 alone"),
        (Conv(dtype=torch.float64), "serves float32 alone"),
        (Conv(kernel=(33, 1), size=(40, 3)), "at most 32x32"),
        (Conv(kernel=(1, 1), dilation=(1, 2**31 - 1)), "span fewer"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            CudaRun(problem).results(library, ALGO)
