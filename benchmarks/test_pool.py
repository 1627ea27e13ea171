"""Every pooling layer of the lecture: forward without gradient, and the input gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import layers
from benchmarks.conftest import FORMATS
from benchmarks.report import Case
from fastconv._library import ops

LAYERS = layers.pools()
OP = "pool"
DIRECTIONS = ("forward", "input_grad")
aten = torch.ops.aten


def max_pool_calls(layer: layers.Pool, direction: str, x: torch.Tensor, grad: torch.Tensor) -> Any:
    window = ((layer.kernel,) * 2, (layer.stride,) * 2, (layer.padding,) * 2, (1, 1))
    if direction == "forward":
        return (
            lambda: ops.max_pool2d(x, *window, False),
            lambda: torch.nn.functional.max_pool2d(x, layer.kernel, layer.stride, layer.padding),
        )
    _, offsets = ops.max_pool2d_with_offsets(x, *window, False)
    _, indices = aten.max_pool2d_with_indices(x, *window, False)
    return (
        lambda: ops.max_pool2d_backward(grad, offsets, x.shape[2:], *window),
        lambda: aten.max_pool2d_with_indices_backward(grad, x, *window, False, indices),
    )


def avg_pool_calls(layer: layers.Pool, direction: str, x: torch.Tensor, grad: torch.Tensor) -> Any:
    window = ((layer.kernel,) * 2, (layer.stride,) * 2, (layer.padding,) * 2, False, True, None)
    if direction == "forward":
        return (
            lambda: ops.avg_pool2d(x, *window),
            lambda: torch.nn.functional.avg_pool2d(x, layer.kernel, layer.stride, layer.padding),
        )
    return (
        lambda: ops.avg_pool2d_backward(grad, x.shape[2:], *window),
        lambda: aten.avg_pool2d_backward(grad, x, *window),
    )


def global_avg_pool_calls(layer: layers.Pool, direction: str, x: torch.Tensor, grad: torch.Tensor) -> Any:
    if direction == "forward":
        return (
            lambda: ops.adaptive_avg_pool2d(x, (1, 1)),
            lambda: torch.nn.functional.adaptive_avg_pool2d(x, 1),
        )
    # torch takes a mean over the plane for this layer, whose gradient is an expanded view; making it dense is what the
    # next layer's backward pass would have to do.
    return (
        lambda: ops.adaptive_avg_pool2d_backward(grad, x.shape[2:]),
        lambda: aten._adaptive_avg_pool2d_backward(grad, x),
    )


CALLS = {"max": max_pool_calls, "avg": avg_pool_calls, "global avg": global_avg_pool_calls}


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_pool(layer, batch, direction, layout, measured, device, dtype):
    torch.manual_seed(0)
    x = torch.randn(layer.input_shape(batch), device=device, dtype=dtype).to(memory_format=FORMATS[layout])
    grad = torch.randn(layer.output_shape(batch), device=device, dtype=dtype).to(memory_format=FORMATS[layout])
    ours, theirs = CALLS[layer.family](layer, direction, x, grad)
    moved = layer.elements(batch) * x.element_size()
    case = Case(OP, layer.family, str(layer), direction, layout, batch, layer.flops(batch), moved)
    measured(case, ours, theirs, layer.kernel**2)
