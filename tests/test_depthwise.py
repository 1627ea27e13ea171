"""Depthwise convolution against torch's in float64: exact on integers, bounded by the rounding of the dtype on reals.

Every output is filled with NaN before a kernel sees it, so an element that is not written fails the comparison.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from fastconv import _C
from fastconv._library import ops

PASSES = ("conv2d", "conv2d_input_grad", "conv2d_weight_grad")
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One problem; padding is (top, left, bottom, right)."""

    size: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    channels: int = 11
    multiplier: int = 1
    batch: int = 2

    def __str__(self) -> str:
        fields = (self.size, self.kernel, self.stride, self.padding, self.dilation)
        text = "-".join("x".join(map(str, field)) for field in fields)
        return f"{self.batch}x{self.channels}m{self.multiplier}-{text}"


# The maps of MobileNet-v2 and sizes on either side of every vector length.
SQUARES = [
    Case((size, size), (kernel, kernel), (stride, stride), (kernel // 2,) * 4)
    for kernel in (3, 5)
    for stride in (1, 2)
    for size in (1, 2, 7, 8, 9, 14, 17, 28)
]
SHAPES = [
    Case((112, 112), channels=3, batch=1),
    Case((112, 113), stride=(2, 2), channels=3, batch=1),
    Case((5, 33), padding=(0, 0, 0, 0)),
    Case((33, 5), padding=(0, 0, 0, 0), stride=(2, 2)),
    Case((200, 3), channels=2),
    Case((6, 15), stride=(2, 1)),
    Case((6, 15), stride=(1, 2)),
    Case((9, 10), stride=(3, 4)),
    Case((13, 12), dilation=(2, 2), padding=(2, 2, 2, 2)),
    Case((13, 12), dilation=(2, 3), stride=(2, 2), padding=(2, 3, 2, 3)),
    Case((13, 12), dilation=(3, 2), stride=(2, 3), padding=(4, 0, 1, 3)),
    Case((8, 9), (2, 2), (2, 2), (0, 0, 0, 0)),
    Case((8, 9), (1, 1), (2, 2), (0, 0, 0, 0)),
    Case((8, 9), (1, 7), (1, 1), (0, 3, 0, 3)),
    Case((9, 8), (7, 1), (2, 1), (3, 0, 3, 0)),
    Case((12, 11), (7, 7), (1, 1), (3, 3, 3, 3)),
    Case((12, 11), (4, 6), (2, 2), (1, 2, 2, 3)),
    # A phase of this gradient has all five taps or none.
    Case((8, 1), (5, 5), (2, 2), (5, 5, 5, 5), (2, 2)),
    Case((7, 7), padding=(0, 1, 2, 0)),
    Case((4, 5), padding=(5, 6, 4, 3)),
    Case((1, 3), padding=(3, 9, 3, 0), stride=(2, 2)),
    Case((9, 9), channels=2),
    Case((9, 9), channels=64, stride=(2, 2)),
    Case((9, 9), channels=70),
    Case((3, 8), channels=1921, batch=1),
    Case((7, 9), channels=5, multiplier=2),
    Case((7, 9), channels=5, multiplier=3, stride=(2, 2)),
    Case((40, 9), (5, 5), (1, 1), (2, 2, 2, 2), channels=3, multiplier=2),
    Case((200, 3), channels=2, multiplier=2),
]


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """torch then fills what it allocates with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def calls(op: str, algo: str = "depthwise") -> int:
    return int(ops.kernel_counts()[_C.kernel_names().index(f"{op}/{algo}")])


def draw(shape: tuple[int, ...], dtype: torch.dtype, layout: str, integers: bool, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if integers:
        values = torch.randint(-3, 4, shape, generator=generator).to(dtype)
    else:
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return values.contiguous(memory_format=LAYOUTS[layout])


def reference(case: Case, x: torch.Tensor, weight: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded input with gradient, and the output, in float64 (torch pads both sides alike, so pad first)."""
    top, left, bottom, right = case.padding
    padded = F.pad(x.double(), (left, right, top, bottom)).requires_grad_()
    return padded, F.conv2d(padded, weight, None, case.stride, 0, case.dilation, case.channels)


def run_passes(case: Case, dtype: torch.dtype, layout: str, integers: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ours, float64 reference) for output, input gradient and weight gradient."""
    filters = case.channels * case.multiplier
    x = draw((case.batch, case.channels, *case.size), dtype, layout, integers, 1)
    weight = draw((filters, 1, *case.kernel), dtype, layout, integers, 2)
    weight64 = weight.double().requires_grad_()
    padded, wanted = reference(case, x, weight64, 3)
    grad = draw(tuple(wanted.shape), dtype, layout, integers, 4)
    wanted_x, wanted_weight = torch.autograd.grad(wanted, (padded, weight64), grad.double())
    top, left = case.padding[:2]
    wanted_x = wanted_x[:, :, top : top + case.size[0], left : left + case.size[1]]

    settings = (case.stride, case.padding, case.dilation, case.channels)
    before = [calls(op) for op in PASSES]
    ours = [
        ops.conv2d(x, weight, None, *settings, None),
        ops.conv2d_input_grad(grad, weight, list(case.size), *settings, None),
        ops.conv2d_weight_grad(grad, x, list(case.kernel), *settings, None),
    ]
    assert [calls(op) - count for op, count in zip(PASSES, before, strict=True)] == [1, 1, 1]
    assert ours[0].is_contiguous(memory_format=LAYOUTS[layout]) or 1 in ours[0].shape
    return list(zip(ours, (wanted.detach(), wanted_x, wanted_weight), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", SQUARES + SHAPES, ids=str)
def test_integers_are_exact(case: Case, layout: str) -> None:
    for ours, wanted in run_passes(case, torch.float32, layout, integers=True):
        assert torch.equal(ours.double(), wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [SQUARES[2], SQUARES[10], SQUARES[19], SQUARES[29], *SHAPES[6:16:3], *SHAPES[-4:]], ids=str
)
def test_every_dtype_rounds_once(case: Case, dtype: torch.dtype, layout: str) -> None:
    for ours, wanted in run_passes(case, dtype, layout, integers=True):
        assert torch.equal(ours, wanted.to(dtype))
    eps = torch.finfo(dtype).eps
    sums_eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for ours, wanted in run_passes(case, dtype, layout, integers=False):
        rms = wanted.square().mean().sqrt()
        # Half a step of the result's own rounding, and a random walk of at most 400 additions.
        bound = 0.51 * eps * wanted.abs() + 20 * sums_eps * rms + torch.finfo(dtype).smallest_normal * eps
        assert ((ours.double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "case",
    [Case((7, 7)), Case((14, 20), stride=(2, 2), multiplier=2), Case((6, 5), (2, 3)), Case((9, 9), channels=3)],
    ids=str,
)
def test_epilogue(case: Case, activation: int, layout: str) -> None:
    filters = case.channels * case.multiplier
    x = draw((case.batch, case.channels, *case.size), torch.float32, layout, True, 1)
    weight = draw((filters, 1, *case.kernel), torch.float32, layout, True, 2)
    _, wanted = reference(case, x, weight.double(), 3)
    scale, shift = draw((filters, 1, 1, 1), torch.float32, "nchw", True, 4).flatten() / 16, torch.arange(filters) / 4
    residual = draw(tuple(wanted.shape), torch.float32, layout, True, 5)
    wanted = wanted.detach() * scale.double().view(-1, 1, 1) + shift.double().view(-1, 1, 1) + residual
    wanted = [lambda t: t, F.relu, F.relu6, torch.tanh][activation](wanted)
    before = calls("conv2d")
    ours = ops.conv2d_fused(
        x, weight, scale, shift, residual, case.stride, case.padding, case.dilation, case.channels, activation, None
    )
    assert calls("conv2d") == before + 1
    torch.testing.assert_close(ours.double(), wanted, rtol=0, atol=1e-6 if activation == 3 else 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_result_does_not_depend_on_the_thread_count(layout: str) -> None:
    case, threads = Case((31, 30), channels=6, batch=3), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append([ours for ours, _ in run_passes(case, torch.float32, layout, integers=False)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_selection() -> None:
    x, weight = torch.ones(1, 4, 5, 5), torch.ones(4, 2, 3, 3)
    with pytest.raises(RuntimeError, match='algo="depthwise" refuses: it needs groups == in_channels'):
        ops.conv2d(x, weight, None, [1, 1], [1, 1, 1, 1], [1, 1], 2, "depthwise")
    before = calls("conv2d"), calls("conv2d", "tiled")
    ops.conv2d(x, weight, None, [1, 1], [1, 1, 1, 1], [1, 1], 2, None)
    ops.conv2d(x, torch.ones(4, 1, 3, 3), None, [1, 1], [1, 1, 1, 1], [1, 1], 4, "tiled")
    assert (calls("conv2d"), calls("conv2d", "tiled")) == (before[0], before[1] + 2)


def test_generic_build_agrees() -> None:
    """The same exact cases on the instruction set that every machine has, in a process of its own."""
    if os.environ.get("FASTCONV_CPU_ISA") == "generic":
        pytest.skip("this run uses the generic build already")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "exact or rounds"]
    environment = {**os.environ, "FASTCONV_CPU_ISA": "generic"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
