"""Our call and torch's for a layer of the lecture: the same tensors, the same result."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks import layers
from benchmarks.measure import Call
from benchmarks.report import Case
from fastconv._library import ops
from fastconv._packed import PackedWeight
from fastconv.ops import conv2d as conv2d_ops
from fastconv.ops.conv2d_fused import conv2d_fused

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
POOL_DIRECTIONS = ("forward", "input_grad")
aten = torch.ops.aten


@dataclass(frozen=True)
class Pair:
    """``terms`` is the length of the sums: the disagreement that is allowed depends on it."""

    case: Case
    ours: Call
    theirs: Call
    terms: int


def convolution(
    op: str, layer: layers.Conv, batch: int, direction: str, layout: str, device: torch.device, dtype: torch.dtype
) -> Pair:
    torch.manual_seed(0)
    place: Any = {"device": device, "dtype": dtype}
    x = torch.randn(layer.input_shape(batch), **place).to(memory_format=FORMATS[layout])
    weight = torch.randn(layer.weight_shape, **place).to(memory_format=FORMATS[layout])
    stride, dilation, padding = (layer.stride,) * 2, (1, 1), (layer.padding,) * 4
    params = (stride, padding, dilation, layer.groups)

    def forward_by_torch() -> torch.Tensor:
        return torch.nn.functional.conv2d(x, weight, None, layer.stride, layer.padding, 1, layer.groups)

    if direction == "forward":
        ours, theirs = (lambda: conv2d_ops.conv2d(x, weight, None, *params)), forward_by_torch
    else:
        grad = torch.randn(layer.output_shape(batch), **place).to(memory_format=FORMATS[layout])
        mask = [direction == "input_grad", direction == "weight_grad", False]

        def theirs() -> torch.Tensor:
            results = aten.convolution_backward(
                grad, x, weight, None, stride, padding[:2], dilation, False, (0, 0), layer.groups, mask
            )
            return results[mask.index(True)]  # type: ignore[no-any-return]

        if direction == "input_grad":
            ours = lambda: conv2d_ops.conv2d_input_grad(grad, weight, x.shape[2:], *params)  # noqa: E731
        else:
            ours = lambda: conv2d_ops.conv2d_weight_grad(grad, x, weight.shape[2:], *params)  # noqa: E731
    terms = {
        "forward": layer.weights // layer.filters,
        "input_grad": layer.weights // layer.channels,
        "weight_grad": batch * layer.out_size**2,
    }[direction]
    moved = layer.elements(batch) * x.element_size()
    case = Case(op, layer.family, str(layer), direction, layout, batch, layer.flops(batch), moved)
    return Pair(case, ours, theirs, terms)


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


LRN_PARAMS = (5, 5e-4, 0.75, 2.0)  # the paper's; torch divides alpha by the size


def norm(layer: layers.Norm, batch: int, direction: str, layout: str, device: torch.device, dtype: torch.dtype) -> Pair:
    """The gradient by torch is its graph's: there is no operator of its own."""
    torch.manual_seed(0)
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.randn(layer.input_shape(batch), device=device, dtype=dtype).to(memory_format=FORMATS[layout])
        grad = torch.randn(layer.input_shape(batch), device=device, dtype=dtype).to(memory_format=FORMATS[layout])
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = torch.nn.functional.local_response_norm(leaf, *LRN_PARAMS) if direction == "input_grad" else x

    def gradient_by_torch() -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.autograd.grad(y, leaf, grad, retain_graph=True)[0]

    moved = (layer.elements(batch) + (x.numel() if direction == "input_grad" else 0)) * x.element_size()
    case = Case("norm", layer.family, str(layer), direction, layout, batch, layer.flops(batch), moved)
    if direction == "forward":
        ours, theirs = (
            lambda: ops.local_response_norm(x, *LRN_PARAMS),
            lambda: torch.nn.functional.local_response_norm(x, *LRN_PARAMS),
        )
    else:
        ours, theirs = (lambda: ops.local_response_norm_backward(grad, x, *LRN_PARAMS)), gradient_by_torch
    return Pair(case, ours, theirs, LRN_PARAMS[0])


def kept(layer: layers.Conv, batch: int, layout: str, dtype: torch.dtype) -> Pair:
    """A forward pass whose weight is kept in its kernel's form, as in fused models (fastconv/_packed.py)."""
    whole = convolution("kept", layer, batch, "forward", layout, torch.device("cpu"), dtype)
    torch.manual_seed(0)
    x = torch.randn(layer.input_shape(batch), dtype=dtype).to(memory_format=FORMATS[layout])
    weight = torch.randn(layer.weight_shape, dtype=dtype).to(memory_format=FORMATS[layout])
    geometry = (layer.stride,) * 2 + (layer.padding,) * 4 + (1, 1)
    packed = PackedWeight().find(x, weight, geometry, layer.groups)
    operands = (x, weight, None, None, None, geometry, layer.groups, 0)
    return replace(whole, ours=lambda: ops.conv2d_fused.eager(*operands, packed))


def fused(layer: layers.Conv, batch: int, layout: str, device: torch.device, dtype: torch.dtype) -> Pair:
    """Convolution, folded batch norm and ReLU in one pass; torch's three calls."""
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
    case = Case("conv2d_fused", layer.family, str(layer), "forward", layout, batch, layer.flops(batch), moved)
    return Pair(case, ours, theirs, layer.weights // layer.filters)


POOL_CALLS = {"max": max_pool_calls, "avg": avg_pool_calls, "global avg": global_avg_pool_calls}


def pool(layer: layers.Pool, batch: int, direction: str, layout: str, device: torch.device, dtype: torch.dtype) -> Pair:
    torch.manual_seed(0)
    x = torch.randn(layer.input_shape(batch), device=device, dtype=dtype).to(memory_format=FORMATS[layout])
    grad = torch.randn(layer.output_shape(batch), device=device, dtype=dtype).to(memory_format=FORMATS[layout])
    ours, theirs = POOL_CALLS[layer.family](layer, direction, x, grad)
    moved = layer.elements(batch) * x.element_size()
    case = Case("pool", layer.family, str(layer), direction, layout, batch, layer.flops(batch), moved)
    return Pair(case, ours, theirs, layer.kernel**2)
