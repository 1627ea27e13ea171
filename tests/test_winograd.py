"""Winograd's F(4x4, 3x3) and F(2x2, 3x3) on the CPU: transforms, errors, edges; test_winograd_choice.py: the choice."""

from __future__ import annotations

import itertools

import pytest
import torch
from reference import Conv, assert_within, guard_is_untouched, guarded, results_by_torch
from torch import Tensor
from torch.nn import functional as F

from fastconv import _C, functional
from fastconv.ops import conv2d as ops
from fastconv.ops.conv2d_fused import conv2d_fused
from fastconv.stats import reset_stats, stats

BOUND = 2e-5  # of the result's root mean square, for inputs of one scale


def results(problem: Conv) -> dict[str, Tensor]:
    """Output and input gradient, from operands inside buffers of NaN."""
    input, weight, bias, grad = problem.tensors()
    reset_stats()
    output = ops.conv2d(input, weight, bias, *problem.params, "winograd")
    input_grad = ops.conv2d_input_grad(grad, weight, problem.size, *problem.params, "winograd")
    assert stats() == {"conv2d/winograd": 1, "conv2d_input_grad/winograd": 1}
    assert all(guard_is_untouched(t) for t in (input, weight, grad))
    return {"output": output, "input": input_grad}


def tile_of(problem: Conv) -> object:
    """Rows of outputs of a tile: which form the forward pass has."""
    input, weight, *_ = problem.shapes()
    return _C.plan_conv2d(
        input, weight, stride=(1, 1), padding=problem.padding, dilation=(1, 1), groups=1,
        channels_last=problem.layouts[0], dtype="float32", pass_name="forward", algo="winograd",
    )["winograd_tile"]  # fmt: skip


def allowed(value: Tensor, dtype: torch.dtype) -> Tensor:
    return BOUND * value.square().mean().sqrt() + 0.51 * torch.finfo(dtype).eps * value.abs() * (dtype != torch.float32)


@pytest.mark.sanitize
@pytest.mark.parametrize("layouts", [(False,) * 3, (True,) * 3], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("tile", "n", "size"),
    [(2, 2, (1, 1)), (2, 2, (3, 4)), (2, 2, (5, 9)), (2, 1, (13, 12)), (4, 20, (3, 4)), (4, 20, (5, 9)), (4, 4, (8, 8)),
     (4, 2, (13, 70)), (4, 3, (31, 6))],
    ids=str,
)  # fmt: skip
def test_every_edge(tile, n, size, layouts, poisoned):
    """Tiles that hang over, rows of few and of many tiles, channels that fill no vector, on either side."""
    for (c, k), padding in itertools.product(((1, 1), (5, 3), (17, 13), (33, 70)), ((1, 1, 1, 1), (2, 0, 1, 2))):
        problem = Conv(n=n, c_per_group=c, k_per_group=k, size=size, padding=padding, layouts=layouts)
        if min(problem.shapes()[2]) < 1:
            continue
        assert padding != (1,) * 4 or tile_of(problem) == tile
        exact = results_by_torch(problem, torch.float64)
        for name, value in results(problem).items():
            assert_within(value, exact[name], allowed(exact[name], torch.float32) + 1e-6, f"{name} of {problem}")


@pytest.mark.parametrize("layouts", [(False,) * 3, (True,) * 3], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("channels", "tile", "size"), [(64, 2, (12, 14)), (512, 2, (12, 14)), (64, 4, (23, 25)),
                                                       (300, 4, (23, 25))])  # fmt: skip
def test_error_is_within_the_bound(channels, tile, size, dtype, layouts):
    problem = Conv(
        n=1, c_per_group=channels, k_per_group=channels, size=size, padding=(1,) * 4, layouts=layouts, dtype=dtype
    )
    assert tile_of(problem) == tile
    exact = results_by_torch(problem, torch.float64)
    for name, value in results(problem).items():
        assert_within(value, exact[name], allowed(exact[name], dtype), f"{name} of {problem}")


@pytest.mark.parametrize("layouts", [(False,) * 3, (True,) * 3], ids=["nchw", "nhwc"])
def test_small_tiles_are_exact_for_integers(layouts):
    """Their transforms add, subtract and halve."""
    problem = Conv(c_per_group=24, k_per_group=40, size=(9, 10), padding=(1,) * 4, integers=True, layouts=layouts)
    assert tile_of(problem) == 2
    exact = results_by_torch(problem, torch.float64)
    for name, value in results(problem).items():
        assert torch.equal(value, exact[name].float()), name


def test_integers_come_out_nearly_exact():
    """The points are irrational, so not exactly; but a mistake in a transform would be off by whole numbers."""
    problem = Conv(c_per_group=24, k_per_group=40, size=(18, 17), padding=(1,) * 4, integers=True)
    exact = results_by_torch(problem, torch.float64)
    for name, value in results(problem).items():
        assert torch.equal(value.round(), exact[name].float()), name


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "tanh"])
def test_epilogue(activation, memory_format, poisoned):
    x, weight = torch.randn(2, 19, 9, 11).to(memory_format=memory_format), torch.randn(37, 19, 3, 3)
    scale, shift, residual = torch.rand(37) + 0.5, torch.randn(37), torch.randn(2, 37, 9, 11)
    residual = guarded(residual.to(memory_format=memory_format))
    params = ((1, 1), (1, 1, 1, 1), (1, 1), 1, activation)
    mine = conv2d_fused(x, weight, scale, shift, residual, *params, "winograd")
    plain = F.conv2d(x.double(), weight.double(), padding=1) * scale.double().reshape(1, -1, 1, 1)
    total = plain + shift.double().reshape(1, -1, 1, 1) + residual.double()
    function = {"none": lambda t: t, "relu": torch.relu, "relu6": F.relu6, "tanh": torch.tanh}[activation]
    assert_within(mine, function(total), BOUND * total.square().mean().sqrt(), activation)


def test_threads_do_not_change_the_result():
    for memory_format, (h, w) in itertools.product((torch.contiguous_format, torch.channels_last), ((7, 9), (30, 33))):
        x, weight = torch.randn(2, 34, h, w).to(memory_format=memory_format), torch.randn(70, 34, 3, 3)
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(functional.conv2d(x, weight, padding=1, algo="winograd"))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


def test_direct_avoids_it_in_every_pass():
    x = torch.randn(1, 48, 28, 28, requires_grad=True)
    weight = torch.randn(48, 48, 3, 3, requires_grad=True)
    functional.conv2d(x, weight, padding=1, algo="direct").sum().backward()
    assert not [name for name in stats() if "winograd" in name]
    reset_stats()
    functional.conv2d(x, weight, padding=1, algo="winograd").sum().backward()
    assert stats() == {"conv2d/winograd": 1, "conv2d_input_grad/winograd": 1, "conv2d_weight_grad/tiled": 1}


def test_refusals():
    x, weight = torch.randn(1, 48, 28, 28), torch.randn(48, 48, 3, 3)
    with pytest.raises(RuntimeError, match="it needs stride 1 and dilation 1"):
        functional.conv2d(x, weight, stride=2, algo="winograd")
    with pytest.raises(RuntimeError, match="it needs a 3x3 kernel"):
        functional.conv2d(x, weight[:, :, :2], algo="winograd")
    with pytest.raises(RuntimeError, match="its error is for float32"):
        functional.conv2d(x.double(), weight.double(), algo="winograd")
