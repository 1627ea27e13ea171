"""Convolution, folded batch norm and ReLU in one pass, against torch's three calls: layers of every family, forward."""

from __future__ import annotations

import torch

from benchmarks import layers
from benchmarks.cases import FORMATS
from benchmarks.report import Case
from fastconv.ops.conv2d_fused import conv2d_fused

LAYERS = layers.representative(list(layers.distinct(layers.Conv)), 2)
OP = "conv2d_fused"


def test_conv2d_fused(layer, batch, layout, measured, device, dtype):
    torch.manual_seed(0)
    x = torch.randn(layer.input_shape(batch), device=device, dtype=dtype).to(memory_format=FORMATS[layout])
    weight = torch.randn(layer.weight_shape, device=device, dtype=dtype).to(memory_format=FORMATS[layout])
    norm = torch.nn.BatchNorm2d(layer.filters).to(device, dtype).eval()
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    scale = (norm.weight * torch.rsqrt(norm.running_var + norm.eps)).detach()
    shift = (norm.bias - norm.running_mean * scale).detach()
    stride, padding = (layer.stride,) * 2, (layer.padding,) * 4

    def ours() -> torch.Tensor:
        return conv2d_fused(x, weight, scale, shift, None, stride, padding, (1, 1), layer.groups, "relu")

    def theirs() -> torch.Tensor:
        y = torch.nn.functional.conv2d(x, weight, None, layer.stride, layer.padding, 1, layer.groups)
        return torch.relu_(norm(y))

    moved = layer.elements(batch) * x.element_size()
    case = Case(OP, layer.family, str(layer), "forward", layout, batch, layer.flops(batch), moved)
    measured(case, ours, theirs, layer.weights // layer.filters)
