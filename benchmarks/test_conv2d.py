"""Every convolution of the lecture that is not depthwise: forward, input gradient and weight gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import layers
from benchmarks.conftest import FORMATS, Measure
from benchmarks.report import DIRECTIONS, Case
from fastconv.ops import conv2d as ops

LAYERS = layers.convolutions(depthwise=False)
OP = "conv2d"


def run_convolution(
    op: str,
    measured: Measure,
    layer: layers.Conv,
    batch: int,
    direction: str,
    layout: str,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    place: Any = {"device": device, "dtype": dtype}
    x = torch.randn(layer.input_shape(batch), **place).to(memory_format=FORMATS[layout])
    weight = torch.randn(layer.weight_shape, **place).to(memory_format=FORMATS[layout])
    stride, dilation, padding = (layer.stride,) * 2, (1, 1), (layer.padding,) * 4
    params = (stride, padding, dilation, layer.groups)

    def forward_by_torch() -> torch.Tensor:
        return torch.nn.functional.conv2d(x, weight, None, layer.stride, layer.padding, 1, layer.groups)

    if direction == "forward":
        ours, theirs = (lambda: ops.conv2d(x, weight, None, *params)), forward_by_torch
    else:
        grad = torch.randn(layer.output_shape(batch), **place).to(memory_format=FORMATS[layout])
        mask = [direction == "input_grad", direction == "weight_grad", False]

        def theirs() -> torch.Tensor:
            results = torch.ops.aten.convolution_backward(
                grad, x, weight, None, stride, padding[:2], dilation, False, (0, 0), layer.groups, mask
            )
            return results[mask.index(True)]  # type: ignore[no-any-return]

        if direction == "input_grad":
            ours = lambda: ops.conv2d_input_grad(grad, weight, x.shape[2:], *params)  # noqa: E731
        else:
            ours = lambda: ops.conv2d_weight_grad(grad, x, weight.shape[2:], *params)  # noqa: E731
    terms = {
        "forward": layer.weights // layer.filters,
        "input_grad": layer.weights // layer.channels,
        "weight_grad": batch * layer.out_size**2,
    }[direction]
    moved = layer.elements(batch) * x.element_size()
    measured(
        Case(op, layer.family, str(layer), direction, layout, batch, layer.flops(batch), moved), ours, theirs, terms
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_conv2d(layer, batch, direction, layout, measured, device, dtype):
    run_convolution(OP, measured, layer, batch, direction, layout, device, dtype)
