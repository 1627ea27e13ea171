"""The layers that a network's program has steps for, and how each becomes a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fastconv import functional
from fastconv._eager import _two
from fastconv._network_plan import ADAPTIVE_AVERAGE_POOL, AVERAGE_POOL, MAX_POOL, Builder, Unplannable, Value
from fastconv.fused import FusedConv2d, four_sides
from fastconv.layers import AdaptiveAvgPool2d, AvgPool2d, Conv2d, GlobalAvgPool2d, MaxPool2d
from fastconv.ops._autograd import suggested_format
from fastconv.ops.conv2d_fused import activation_code

DENSE_BATCH = 32  # images at once; for more torch's nn.Linear is the better one
Emit = Callable[[Builder, fx.Node, Any], None]


def emitter(node: fx.Node, layers: dict[fx.Node, Any], emitters: dict[fx.Node, Any]) -> Emit | None:
    """What adds the step of ``node``, or None if there is none; the nodes before it have theirs."""
    layer = layers[node]
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if layer is None:
        found = _FUNCTIONS.get(node.target) if node.op == "call_function" else None
        known = {"start_dim", "end_dim"} if found is _flatten else set()
        return found if set(node.kwargs) <= known else None
    if node.kwargs or len(node.args) > (2 if type(layer) is FusedConv2d else 1):
        return None
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        return None
    if type(layer) is nn.ReLU:
        before = node.args[0]
        follows = type(layers.get(before)) is nn.Linear and emitters.get(before) is not None and len(before.users) == 1
        return _alias if follows else None
    return _LAYERS.get(type(layer))


def is_alias(node: fx.Node, layer: nn.Module | None) -> bool:
    """True if the result may be the argument, or a view of it: such a result is not given to others."""
    return isinstance(layer, (nn.Identity, nn.Dropout, nn.Flatten)) or node.target in (torch.flatten,)


def tensors_of(layer: nn.Module) -> list[Tensor]:
    """What the program depends on."""
    return [tensor for tensor in (*layer._parameters.values(), *layer._buffers.values()) if tensor is not None]


def trains(layer: nn.Module) -> bool:
    return any(tensor.requires_grad for tensor in tensors_of(layer))


def _fused_conv2d(builder: Builder, node: fx.Node, layer: FusedConv2d) -> None:
    geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
    residual = node.args[1] if len(node.args) > 1 else None
    added = None if residual is None else builder.image(residual)
    code = activation_code(layer.activation)
    packed = builder.packed_of(layer)
    builder.convolve(node, builder.image(node.args[0]), layer.weight, layer.bias, geometry, code, added, packed)


def _conv2d(builder: Builder, node: fx.Node, layer: Any) -> None:
    _check_bias(layer)
    stride, dilation = _two(layer.stride), _two(layer.dilation)
    if stride is None or dilation is None:
        raise Unplannable("its stride or dilation is no pair of integers")
    geometry = (stride, four_sides(layer), dilation, layer.groups)
    packed = builder.packed_of(layer)
    builder.convolve(node, builder.image(node.args[0]), layer.weight, layer.bias, geometry, 0, None, packed)


def _check_bias(layer: Any) -> None:
    if layer.bias is not None and layer.bias.dtype != layer.weight.dtype:
        raise Unplannable("weight and bias have two dtypes")


def _window(builder: Builder, node: fx.Node, layer: Any, dilation: Any) -> tuple[Value, tuple[int, ...]]:
    input = builder.image(node.args[0])
    kernel, padding, dilations = _two(layer.kernel_size), _two(layer.padding), _two(dilation)
    stride = kernel if layer.stride is None else _two(layer.stride)
    if kernel is None or stride is None or padding is None or dilations is None or type(layer.ceil_mode) is not bool:
        raise Unplannable("its window is not given by integers")
    return input, (*input.like.shape, *kernel, *stride, *padding, *dilations, int(layer.ceil_mode))


def _max_pool2d(builder: Builder, node: fx.Node, layer: Any) -> None:
    if layer.return_indices:
        raise Unplannable("it gives indices")
    input, numbers = _window(builder, node, layer, layer.dilation)
    window = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.ceil_mode)
    output = _pooled(builder, node, input, lambda like: F.max_pool2d(like, *window))
    builder.step(MAX_POOL, input.buffer, output, numbers)


def _avg_pool2d(builder: Builder, node: fx.Node, layer: Any) -> None:
    divisor = layer.divisor_override
    if type(layer.count_include_pad) is not bool or (divisor is not None and type(divisor) is not int):
        raise Unplannable("its divisor is not given by integers")
    input, numbers = _window(builder, node, layer, 1)
    window = (layer.kernel_size, layer.stride, layer.padding, layer.ceil_mode, layer.count_include_pad, divisor)
    output = _pooled(builder, node, input, lambda like: F.avg_pool2d(like, *window))
    builder.step(AVERAGE_POOL, input.buffer, output, (*numbers, int(layer.count_include_pad), divisor or 0))


def _adaptive_avg_pool2d(builder: Builder, node: fx.Node, layer: Any) -> None:
    input = builder.image(node.args[0])
    size: Any = node.args[1] if layer is None and len(node.args) > 1 else getattr(layer, "output_size", None)
    if size is None:
        raise Unplannable("its output size is missing")
    output = _pooled(builder, node, input, lambda like: F.adaptive_avg_pool2d(like, size))
    cells = builder.values[node].like.shape[2:]
    builder.step(ADAPTIVE_AVERAGE_POOL, input.buffer, output, (*input.like.shape, *cells))


def _pooled(builder: Builder, node: fx.Node, input: Value, by_torch: Callable[[Tensor], Tensor]) -> Any:
    try:
        shape = by_torch(input.like).shape
    except (RuntimeError, TypeError, ValueError):
        raise Unplannable("its window does not fit the input") from None
    return builder.result(node, shape, suggested_format(input.like), input)


def _alias(builder: Builder, node: fx.Node, layer: Any) -> None:
    builder.values[node] = builder.value(node.args[0])


def _flatten(builder: Builder, node: fx.Node, layer: Any) -> None:
    if layer is not None:
        dims = layer.start_dim, layer.end_dim
    else:
        given = {"start_dim": 0, "end_dim": -1, **dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False))}
        given.update(node.kwargs)
        dims = given["start_dim"], given["end_dim"]
    value = builder.value(node.args[0])
    if value.like.dim() != 4 or dims not in ((1, -1), (1, 3)):
        raise Unplannable("it does not flatten images")
    buffer = builder.contiguous(value)
    builder.values[node] = Value(value.like.new_empty(value.like.shape).flatten(1), buffer, False)


def _linear(builder: Builder, node: fx.Node, layer: nn.Linear) -> None:
    """A 1x1 convolution of images of one pixel."""
    value = builder.value(node.args[0])
    _check_bias(layer)
    if value.like.dim() != 2 or value.like.shape[1] != layer.in_features:
        raise Unplannable("its input is no batch of vectors")
    pixels = Value(value.like[:, :, None, None], value.buffer, True)
    window = ((1, 1), (0, 0, 0, 0), (1, 1), 1)
    weight = layer.weight[:, :, None, None]
    reader = next(iter(node.users), None)
    code = activation_code("relu") if reader in builder.folded else 0
    builder.convolve(node, pixels, weight, layer.bias, window, code, None, None)
    result = builder.values[node]
    builder.values[node] = Value(result.like.flatten(1), result.buffer, False)


_LAYERS: dict[Any, Emit] = {
    FusedConv2d: _fused_conv2d,
    Conv2d: _conv2d,
    MaxPool2d: _max_pool2d,
    AvgPool2d: _avg_pool2d,
    AdaptiveAvgPool2d: _adaptive_avg_pool2d,
    GlobalAvgPool2d: _adaptive_avg_pool2d,
    nn.Identity: _alias,
    nn.Dropout: _alias,  # in eval: layers that train are in no run
    nn.Flatten: _flatten,
    nn.Linear: _linear,
}
_FUNCTIONS: dict[Any, Emit] = {
    torch.flatten: _flatten,
    F.adaptive_avg_pool2d: _adaptive_avg_pool2d,
    functional.adaptive_avg_pool2d: _adaptive_avg_pool2d,
}
