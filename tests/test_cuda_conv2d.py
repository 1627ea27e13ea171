"""The direct convolution and the bias gradient on CUDA, run by the emulator, against the CPU kernels and float64."""

from __future__ import annotations

import random

import pytest
import torch
from cuda_convolutions import (
    ACTIVATIONS,
    CudaEpilogue,
    CudaRun,
    assert_guarded,
    assert_matches,
    check_epilogue,
    configured,
    empty,
    placed,
)
from emulator_library import DType, Library, Timing, build, note_error
from reference import Conv

SOURCES = ["csrc/conv2d/cuda_direct.cu", "csrc/conv2d/cuda_bias_grad.cu"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])


@pytest.fixture(scope="module")
def library() -> Library:
    return build(SOURCES)


def random_problem(seed: int) -> Conv:
    dice = random.Random(seed)
    kernel = (dice.randint(1, 4), dice.randint(1, 4))
    dilation = (dice.randint(1, 3), dice.randint(1, 3))
    padding = tuple(dice.randint(0, 3) for _ in range(4))
    reach = [dilation[i] * (kernel[i] - 1) + 1 for i in range(2)]
    size = tuple(max(1, reach[i] - padding[i] - padding[i + 2]) + dice.randint(0, 6) for i in range(2))
    return Conv(
        n=dice.randint(1, 3),
        groups=dice.choice([1, 1, 2, 3]),
        c_per_group=dice.randint(1, 4),
        k_per_group=dice.randint(1, 4),
        size=(size[0], size[1]),
        kernel=kernel,
        stride=(dice.randint(1, 3), dice.randint(1, 3)),
        padding=(padding[0], padding[1], padding[2], padding[3]),
        dilation=dilation,
        dtype=DTYPES[seed % 3],
        integers=seed % 2 == 0,
        seed=seed,
    )


@LAYOUTS
@pytest.mark.parametrize("seed", range(24))
def test_random_problems(library: Library, seed: int, channels_last: bool) -> None:
    run = CudaRun(random_problem(seed), channels_last, offset=seed % 5)
    assert_matches(run, run.results(library, "direct"), "direct")


# AlexNet's grouped 5x5, ResNet's stem, a strided 1x1 and a 3x3, small.
LECTURE = [
    Conv(groups=2, c_per_group=6, k_per_group=8, size=(13, 13), kernel=(5, 5), padding=(2, 2, 2, 2)),
    Conv(c_per_group=3, k_per_group=8, size=(32, 32), kernel=(7, 7), stride=(2, 2), padding=(3, 3, 3, 3)),
    Conv(c_per_group=16, k_per_group=8, size=(14, 14), kernel=(1, 1), stride=(2, 2)),
    Conv(c_per_group=8, k_per_group=8, size=(14, 14), kernel=(3, 3), padding=(1, 1, 1, 1)),
]


@LAYOUTS
@pytest.mark.parametrize("problem", LECTURE, ids=lambda p: "x".join(map(str, p.kernel)))
def test_layers_of_the_lecture(library: Library, problem: Conv, channels_last: bool) -> None:
    for dtype in DTYPES:
        run = CudaRun(Conv(**{**problem.__dict__, "dtype": dtype, "integers": True}), channels_last)
        assert_matches(run, run.results(library, "direct"), "direct")


@LAYOUTS
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_epilogue(library: Library, dtype: torch.dtype, activation: str, channels_last: bool) -> None:
    check_epilogue(library, "direct", Conv(size=(6, 7), dtype=dtype, seed=3), activation, channels_last)


@LAYOUTS
def test_relu_keeps_nan(library: Library, channels_last: bool) -> None:
    run = CudaRun(Conv(c_per_group=1, k_per_group=1, size=(3, 3), kernel=(1, 1)), channels_last)
    run.tensors["x"][0, 0, 1, 1] = float("nan")
    for activation in ("relu", "relu6"):
        y = run.forward(library, "direct", CudaEpilogue.of(activation=activation))
        assert y[0, 0, 1, 1].isnan()
        assert int(y.isnan().sum()) == 1


def check_bias_grad(library: Library, dtype: torch.dtype, shape: tuple[int, ...], channels_last: bool) -> None:
    n, k, h, w = shape
    layout = torch.channels_last if channels_last else torch.contiguous_format
    values = torch.randint(-3, 4, shape).to(dtype).to(memory_format=layout)
    grad, result = placed(values, 1), empty((k, 1, 1, 1), dtype, False, 1)
    sizes = (n, k, h * w, int(channels_last))
    floats = library.call("conv2d_bias_grad_workspace", "rows", *sizes)
    assert floats is not None
    workspace = placed(torch.full((floats,), float("nan")), 0)
    dtype_code = DType[str(dtype).removeprefix("torch.")]
    library.call("conv2d_bias_grad", "rows", grad, result, workspace, *sizes, dtype_code)
    assert_guarded(result)
    assert_guarded(workspace)
    assert torch.equal(result.flatten(), values.double().sum((0, 2, 3)).to(dtype))
    note_error("conv2d_bias_grad", "rows", 0)


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (5, 70, 3, 3), (1, 1, 1, 1), (3, 130, 40, 1), (9, 2, 33, 31)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@LAYOUTS
def test_bias_grad(library: Library, dtype: torch.dtype, shape: tuple[int, ...], channels_last: bool) -> None:
    for sm_count in (1, 132):
        with configured(library, sm_count=sm_count):
            check_bias_grad(library, dtype, shape, channels_last)


@LAYOUTS
def test_no_races(channels_last: bool) -> None:
    checked = build(SOURCES, "checked")
    for timing in Timing:
        with configured(checked, timing=timing, check_races=True):
            run = CudaRun(
                Conv(n=1, c_per_group=2, k_per_group=2, size=(4, 5), kernel=(2, 2), integers=True), channels_last
            )
            assert_matches(run, run.results(checked, "direct"), "direct")
            workspace, result = torch.empty(4096 * 66), torch.full((66,), float("nan"))
            grad = torch.ones(2, 66, 3, 3)
            arguments = (2, 66, 9, int(channels_last), DType.float32)
            checked.call("conv2d_bias_grad", "rows", grad, result, workspace, *arguments)
            assert torch.equal(result, torch.full((66,), 18.0))


@LAYOUTS
def test_empty_batch(library: Library, channels_last: bool) -> None:
    """Empty results need no launch; a weight gradient of nothing is zero."""
    run = CudaRun(Conv(n=0, size=(5, 6)), channels_last)
    results = run.results(library, "direct")
    assert results["output"].shape[0] == results["input"].shape[0] == 0
    assert torch.equal(results["weight"], torch.zeros_like(results["weight"]))


def test_float64_is_refused(library: Library) -> None:
    with pytest.raises(RuntimeError, match="got float64, expected float32, float16 or bfloat16"):
        CudaRun(Conv(dtype=torch.float64)).forward(library, "direct")
