"""Average and adaptive average pooling, and their gradients.

All are linear and come in adjoint pairs, each the derivative of its partner, so derivatives of any order, forward or
reverse, stay inside these kernels::

    avg_pool2d(input)                    avg_pool2d_backward(grad)
    adaptive_avg_pool2d(input)           adaptive_avg_pool2d_backward(grad)

Arguments are normalised: 4-D tensors; kernel, stride, padding and dilation are (height, width).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastconv._library import NAMESPACE, ops
from fastconv.ops._apply import apply
from fastconv.ops._autograd import (
    allow_empty,
    call_raw,
    empty_like_format,
    fold,
    needs_function,
    suggested_format,
    tracing,
)

Pair = tuple[int, int]


def avg_pool2d(
    input: Tensor,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    window = (kernel, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return call_linear(ops.avg_pool2d.default, AvgPool2d, input, *window)


def avg_pool2d_backward(grad_output: Tensor, input_size: Any, *window: Any) -> Tensor:
    return call_linear(ops.avg_pool2d_backward.default, AvgPool2dBackward, grad_output, input_size, *window)


def adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor:
    return call_linear(ops.adaptive_avg_pool2d.default, AdaptiveAvgPool2d, input, output_size)


def adaptive_avg_pool2d_backward(grad_output: Tensor, input_size: Any) -> Tensor:
    return call_linear(ops.adaptive_avg_pool2d_backward.default, AdaptiveAvgPool2dBackward, grad_output, input_size)


def call_linear(op: Any, function: Any, tensor: Tensor, *args: Any) -> Tensor:
    """``tensor`` is the operand that has derivatives, the first of both."""
    if tracing():
        result: Tensor = op(tensor, *args)
    elif needs_function(tensor):
        result = apply(function, tensor, *args)
    else:
        result = call_raw(op, tensor, *args)
    return result


class AvgPool2d(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        result: Tensor = call_raw(ops.avg_pool2d.default, *args)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, *ctx.window = inputs
        ctx.input_size, ctx.channels_last = input.shape[2:], _is_channels_last(input)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_input = avg_pool2d_backward(_formatted(grad, ctx.channels_last), ctx.input_size, *ctx.window)
        return grad_input, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, input_t: Tensor, *_: Any) -> Any:
        return avg_pool2d(input_t, *ctx.window)

    @staticmethod
    @allow_empty
    def vmap(info: Any, in_dims: tuple[Any, ...], input: Tensor, *window: Any) -> Any:
        folded = avg_pool2d(fold(input, in_dims[0], 0, info.batch_size), *window)
        return folded.unflatten(0, (info.batch_size, -1)), 0


class AvgPool2dBackward(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        result: Tensor = call_raw(ops.avg_pool2d_backward.default, *args)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.input_size, *ctx.window = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return avg_pool2d(grad, *ctx.window), None, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, grad_t: Tensor, *_: Any) -> Any:
        return avg_pool2d_backward(grad_t, ctx.input_size, *ctx.window)

    @staticmethod
    @allow_empty
    def vmap(info: Any, in_dims: tuple[Any, ...], grad_output: Tensor, *args: Any) -> Any:
        folded = avg_pool2d_backward(fold(grad_output, in_dims[0], 0, info.batch_size), *args)
        return folded.unflatten(0, (info.batch_size, -1)), 0


class AdaptiveAvgPool2d(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        result: Tensor = call_raw(ops.adaptive_avg_pool2d.default, *args)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, ctx.output_size = inputs
        ctx.input_size, ctx.channels_last = input.shape[2:], _is_channels_last(input)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return adaptive_avg_pool2d_backward(_formatted(grad, ctx.channels_last), ctx.input_size), None

    @staticmethod
    def jvp(ctx: Any, input_t: Tensor, *_: Any) -> Any:
        return adaptive_avg_pool2d(input_t, ctx.output_size)

    @staticmethod
    @allow_empty
    def vmap(info: Any, in_dims: tuple[Any, ...], input: Tensor, output_size: Any) -> Any:
        folded = adaptive_avg_pool2d(fold(input, in_dims[0], 0, info.batch_size), output_size)
        return folded.unflatten(0, (info.batch_size, -1)), 0


class AdaptiveAvgPool2dBackward(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        result: Tensor = call_raw(ops.adaptive_avg_pool2d_backward.default, *args)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad_output, ctx.input_size = inputs
        ctx.output_size = grad_output.shape[2:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return adaptive_avg_pool2d(grad, ctx.output_size), None

    @staticmethod
    def jvp(ctx: Any, grad_t: Tensor, *_: Any) -> Any:
        return adaptive_avg_pool2d_backward(grad_t, ctx.input_size)

    @staticmethod
    @allow_empty
    def vmap(info: Any, in_dims: tuple[Any, ...], grad_output: Tensor, input_size: Any) -> Any:
        folded = adaptive_avg_pool2d_backward(fold(grad_output, in_dims[0], 0, info.batch_size), input_size)
        return folded.unflatten(0, (info.batch_size, -1)), 0


def _is_channels_last(input: Tensor) -> bool:
    # By strides: inside vmap a tensor answers nothing else. With one channel both formats are the same memory.
    strides = input.stride()
    return bool(strides[1] == 1 and strides[3] != 1)


def _formatted(grad: Tensor, channels_last: bool) -> Tensor:
    """``grad`` in the input's memory format, which is that of the gradient to be computed."""
    if not channels_last:
        return grad
    if grad.shape[2] == 1 and grad.shape[3] == 1:
        # A single pixel counts as contiguous in either format; only its strides can say channels_last.
        return grad.reshape(grad.shape[0], 1, 1, grad.shape[1]).permute(0, 3, 1, 2)
    # Not contiguous(memory_format=...), which vmap refuses.
    return grad.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


for _name, _function in (
    ("avg_pool2d", AvgPool2d),
    ("avg_pool2d_backward", AvgPool2dBackward),
    ("adaptive_avg_pool2d", AdaptiveAvgPool2d),
    ("adaptive_avg_pool2d_backward", AdaptiveAvgPool2dBackward),
):
    torch.library.register_autograd(f"{NAMESPACE}::{_name}", _function.backward, setup_context=_function.setup_context)
    torch.library.register_vmap(f"{NAMESPACE}::{_name}", _function.vmap)


def output_size(
    size: Any, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool
) -> tuple[Any, Any]:
    """Rows and columns of the output. With ``ceil_mode`` the last window may hang over the end of the input, but must
    start inside it or its left padding."""
    rows, columns = (
        _positions(size[axis], kernel[axis], stride[axis], padding[axis], dilation[axis], ceil_mode) for axis in (0, 1)
    )
    return rows, columns


def _positions(size: Any, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> Any:
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    if not ceil_mode:
        return span // stride + 1
    return torch.sym_min((span + stride - 1) // stride + 1, (size + padding - 1) // stride + 1)


@torch.library.register_fake(f"{NAMESPACE}::avg_pool2d")
def _(input, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override):  # type: ignore[no-untyped-def]
    rows, columns = output_size(input.shape[2:], kernel, stride, padding, (1, 1), ceil_mode)
    return empty_like_format(input, (*input.shape[:2], rows, columns), suggested_format(input))


@torch.library.register_fake(f"{NAMESPACE}::avg_pool2d_backward")
def _(grad_output, input_size, *_):  # type: ignore[no-untyped-def]
    return empty_like_format(grad_output, (*grad_output.shape[:2], *input_size), suggested_format(grad_output))


@torch.library.register_fake(f"{NAMESPACE}::adaptive_avg_pool2d")
def _(input, output_size):  # type: ignore[no-untyped-def]
    return empty_like_format(input, (*input.shape[:2], *output_size), suggested_format(input))


@torch.library.register_fake(f"{NAMESPACE}::adaptive_avg_pool2d_backward")
def _(grad_output, input_size):  # type: ignore[no-untyped-def]
    return empty_like_format(grad_output, (*grad_output.shape[:2], *input_size), suggested_format(grad_output))
