"""Max pooling, and its gradient.

Max pooling keeps neither its input nor torch's eight-byte indices for the gradient, only which tap of its window each
output came from: one byte (four for windows of more than 255 taps). Given those offsets two linear maps remain, each
the other's adjoint and derivative::

    max_pool2d_backward(grad, offsets)   max_pool2d_gather(input, offsets)

The tangent of max pooling is the gather, so derivatives of any order, forward or reverse, stay inside these kernels.
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
    call,
    call_raw,
    empty_like_format,
    fold,
    needs_function,
    save,
    suggested_format,
    tracing,
)
from fastconv.ops.pool import Pair, call_linear, output_size


def max_pool2d(
    input: Tensor,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
    return_indices: bool = False,
) -> Any:
    """The maxima; with ``return_indices`` also torch's int64 indices into the flattened (H, W) plane."""
    window = (kernel, stride, padding, dilation)
    if tracing():
        # torch.jit.trace records a call twice, with gradients on and off, and compares.
        recorded = torch.compiler.is_compiling() and torch.is_grad_enabled() and input.requires_grad
        if not return_indices and not recorded:
            return ops.max_pool2d.default(input, *window, ceil_mode)
        output, offsets = ops.max_pool2d_with_offsets.default(input, *window, ceil_mode)
    elif needs_function(input):
        output, offsets = apply(MaxPool2d, input, *window, ceil_mode)
    elif return_indices:
        output, offsets = call_raw(ops.max_pool2d_with_offsets.default, input, *window, ceil_mode)
    else:
        return call_raw(ops.max_pool2d.default, input, *window, ceil_mode)
    if not return_indices:
        return output
    return output, call(ops.max_pool2d_indices.default, offsets, input.shape[2:], *window)


def max_pool2d_gather(input: Tensor, offsets: Tensor, *window: Pair) -> Tensor:
    """The element of ``input`` that each offset names."""
    return call_linear(ops.max_pool2d_gather.default, MaxPool2dGather, input, offsets, *window)


def max_pool2d_backward(grad_output: Tensor, offsets: Tensor, input_size: Any, *window: Pair) -> Tensor:
    """Adds each gradient to the input element that its offset names."""
    return call_linear(ops.max_pool2d_backward.default, MaxPool2dBackward, grad_output, offsets, input_size, *window)


class MaxPool2d(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Any:
        return call_raw(ops.max_pool2d_with_offsets.default, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        input, *ctx.window, _ = inputs
        offsets = output[1]
        ctx.save_for_backward(offsets)
        if hasattr(ctx, "save_for_forward"):  # a Function's context, not that of torch.library
            ctx.save_for_forward(offsets)
            ctx.mark_non_differentiable(offsets)
        ctx.input_size = input.shape[2:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        (offsets,) = ctx.saved_tensors
        return max_pool2d_backward(grad, offsets, ctx.input_size, *ctx.window), None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, input_t: Tensor, *_: Any) -> Any:
        (offsets,) = ctx.saved_tensors
        return max_pool2d_gather(input_t, offsets, *ctx.window), None

    @staticmethod
    @allow_empty
    def vmap(info: Any, in_dims: tuple[Any, ...], input: Tensor, *args: Any) -> Any:
        kernel, stride, padding, dilation, ceil_mode = args
        folded = fold(input, in_dims[0], 0, info.batch_size)
        if needs_function(folded):
            both = apply(MaxPool2d, folded, *args)
        else:
            both = call_raw(ops.max_pool2d_with_offsets.default, folded, kernel, stride, padding, dilation, ceil_mode)
        return tuple(part.unflatten(0, (info.batch_size, -1)) for part in both), (0, 0)


class MaxPool2dBackward(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        result: Tensor = call_raw(ops.max_pool2d_backward.default, *args)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, offsets, ctx.input_size, *ctx.window = inputs
        save(ctx, offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (offsets,) = ctx.saved_tensors
        return max_pool2d_gather(grad, offsets, *ctx.window), None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, grad_t: Tensor, *_: Any) -> Any:
        (offsets,) = ctx.saved_tensors
        return max_pool2d_backward(grad_t, offsets, ctx.input_size, *ctx.window)

    @staticmethod
    @allow_empty
    def vmap(info: Any, in_dims: tuple[Any, ...], grad_output: Tensor, offsets: Tensor, *args: Any) -> Any:
        size = info.batch_size
        folded = fold(grad_output, in_dims[0], 0, size), fold(offsets, in_dims[1], 0, size)
        return max_pool2d_backward(*folded, *args).unflatten(0, (size, -1)), 0


class MaxPool2dGather(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        result: Tensor = call_raw(ops.max_pool2d_gather.default, *args)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, offsets, *ctx.window = inputs
        save(ctx, offsets)
        ctx.input_size = input.shape[2:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (offsets,) = ctx.saved_tensors
        return max_pool2d_backward(grad, offsets, ctx.input_size, *ctx.window), None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, input_t: Tensor, *_: Any) -> Any:
        (offsets,) = ctx.saved_tensors
        return max_pool2d_gather(input_t, offsets, *ctx.window)

    @staticmethod
    @allow_empty
    def vmap(info: Any, in_dims: tuple[Any, ...], input: Tensor, offsets: Tensor, *window: Any) -> Any:
        size = info.batch_size
        folded = fold(input, in_dims[0], 0, size), fold(offsets, in_dims[1], 0, size)
        return max_pool2d_gather(*folded, *window).unflatten(0, (size, -1)), 0


def _max_pool2d_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, *ctx.args = inputs
    ctx.save_for_backward(input)


def _max_pool2d_backward(ctx: Any, grad: Tensor) -> Any:
    """Of the op without offsets, for graphs that call it all the same: finds the winners again."""
    (input,) = ctx.saved_tensors
    *window, ceil_mode = ctx.args
    with torch.no_grad():
        _, offsets = ops.max_pool2d_with_offsets.default(input, *window, ceil_mode)
    return max_pool2d_backward(grad, offsets, input.shape[2:], *window), None, None, None, None, None


@allow_empty
def _max_pool2d_vmap(info: Any, in_dims: tuple[Any, ...], input: Tensor, *args: Any) -> Any:
    folded = ops.max_pool2d.default(fold(input, in_dims[0], 0, info.batch_size), *args)
    return folded.unflatten(0, (info.batch_size, -1)), 0


@allow_empty
def _indices_vmap(info: Any, in_dims: tuple[Any, ...], offsets: Tensor, *args: Any) -> Any:
    folded = ops.max_pool2d_indices.default(fold(offsets, in_dims[0], 0, info.batch_size), *args)
    return folded.unflatten(0, (info.batch_size, -1)), 0


for _name, _function in (
    ("max_pool2d_with_offsets", MaxPool2d),
    ("max_pool2d_gather", MaxPool2dGather),
    ("max_pool2d_backward", MaxPool2dBackward),
):
    torch.library.register_autograd(f"{NAMESPACE}::{_name}", _function.backward, setup_context=_function.setup_context)
    torch.library.register_vmap(f"{NAMESPACE}::{_name}", _function.vmap)
torch.library.register_autograd(f"{NAMESPACE}::max_pool2d", _max_pool2d_backward, setup_context=_max_pool2d_setup)
torch.library.register_vmap(f"{NAMESPACE}::max_pool2d", _max_pool2d_vmap)
torch.library.register_vmap(f"{NAMESPACE}::max_pool2d_indices", _indices_vmap)


@torch.library.register_fake(f"{NAMESPACE}::max_pool2d")
def _(input, kernel, stride, padding, dilation, ceil_mode):  # type: ignore[no-untyped-def]
    rows, columns = output_size(input.shape[2:], kernel, stride, padding, dilation, ceil_mode)
    return empty_like_format(input, (*input.shape[:2], rows, columns), suggested_format(input))


@torch.library.register_fake(f"{NAMESPACE}::max_pool2d_with_offsets")
def _(input, kernel, stride, padding, dilation, ceil_mode):  # type: ignore[no-untyped-def]
    rows, columns = output_size(input.shape[2:], kernel, stride, padding, dilation, ceil_mode)
    output = empty_like_format(input, (*input.shape[:2], rows, columns), suggested_format(input))
    offset_type = torch.uint8 if kernel[0] * kernel[1] <= 255 else torch.int32
    return output, torch.empty_like(output, dtype=offset_type)


@torch.library.register_fake(f"{NAMESPACE}::max_pool2d_indices")
def _(offsets, input_size, kernel, stride, padding, dilation):  # type: ignore[no-untyped-def]
    return torch.empty_like(offsets, dtype=torch.int64, memory_format=suggested_format(offsets))


@torch.library.register_fake(f"{NAMESPACE}::max_pool2d_gather")
def _(input, offsets, kernel, stride, padding, dilation):  # type: ignore[no-untyped-def]
    return empty_like_format(input, tuple(offsets.shape), suggested_format(offsets))


@torch.library.register_fake(f"{NAMESPACE}::max_pool2d_backward")
def _(grad_output, offsets, input_size, kernel, stride, padding, dilation):  # type: ignore[no-untyped-def]
    return empty_like_format(grad_output, (*grad_output.shape[:2], *input_size), suggested_format(offsets))
