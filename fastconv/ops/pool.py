"""Max, average and adaptive average pooling, and their gradients.

Every map here but max pooling itself is linear, and they come in adjoint pairs::

    max_pool2d_backward(grad, offsets)   max_pool2d_gather(input, offsets)
    avg_pool2d(input)                    avg_pool2d_backward(grad)
    adaptive_avg_pool2d(input)           adaptive_avg_pool2d_backward(grad)

Each is the derivative of its partner, and the tangent of max pooling is the gather, so derivatives of any order,
forward or reverse, stay inside these kernels. Max pooling keeps neither its input nor torch's eight-byte indices for
the gradient, only which tap of its window each output came from: one byte (four for windows of more than 255 taps).

Arguments are normalised: 4-D tensors; kernel, stride, padding and dilation are (height, width).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastconv._library import ops
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
    return output, ops.max_pool2d_indices.default(offsets, input.shape[2:], *window)


def max_pool2d_gather(input: Tensor, offsets: Tensor, *window: Pair) -> Tensor:
    """The element of ``input`` that each offset names."""
    return _call(ops.max_pool2d_gather.default, MaxPool2dGather, input, offsets, *window)


def max_pool2d_backward(grad_output: Tensor, offsets: Tensor, input_size: Any, *window: Pair) -> Tensor:
    """Adds each gradient to the input element that its offset names."""
    return _call(ops.max_pool2d_backward.default, MaxPool2dBackward, grad_output, offsets, input_size, *window)


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
    return _call(ops.avg_pool2d.default, AvgPool2d, input, *window)


def avg_pool2d_backward(grad_output: Tensor, input_size: Any, *window: Any) -> Tensor:
    return _call(ops.avg_pool2d_backward.default, AvgPool2dBackward, grad_output, input_size, *window)


def adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor:
    return _call(ops.adaptive_avg_pool2d.default, AdaptiveAvgPool2d, input, output_size)


def adaptive_avg_pool2d_backward(grad_output: Tensor, input_size: Any) -> Tensor:
    return _call(ops.adaptive_avg_pool2d_backward.default, AdaptiveAvgPool2dBackward, grad_output, input_size)


def _call(op: Any, function: Any, tensor: Tensor, *args: Any) -> Tensor:
    """``tensor`` is the operand that has derivatives, the first of both."""
    if tracing():
        result: Tensor = op(tensor, *args)
    elif needs_function(tensor):
        result = apply(function, tensor, *args)
    else:
        result = call_raw(op, tensor, *args)
    return result


# ---------------------------------------------------------------- max


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
        _save(ctx, offsets)

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
        _save(ctx, offsets)
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


def _save(ctx: Any, offsets: Tensor) -> None:
    ctx.save_for_backward(offsets)
    if hasattr(ctx, "save_for_forward"):
        ctx.save_for_forward(offsets)


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


# ---------------------------------------------------------------- average


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


# ---------------------------------------------------------------- registration

for _name, _function in (
    ("max_pool2d_with_offsets", MaxPool2d),
    ("max_pool2d_gather", MaxPool2dGather),
    ("max_pool2d_backward", MaxPool2dBackward),
    ("avg_pool2d", AvgPool2d),
    ("avg_pool2d_backward", AvgPool2dBackward),
    ("adaptive_avg_pool2d", AdaptiveAvgPool2d),
    ("adaptive_avg_pool2d_backward", AdaptiveAvgPool2dBackward),
):
    torch.library.register_autograd(f"fastconv::{_name}", _function.backward, setup_context=_function.setup_context)
    torch.library.register_vmap(f"fastconv::{_name}", _function.vmap)
torch.library.register_autograd("fastconv::max_pool2d", _max_pool2d_backward, setup_context=_max_pool2d_setup)
torch.library.register_vmap("fastconv::max_pool2d", _max_pool2d_vmap)
torch.library.register_vmap("fastconv::max_pool2d_indices", _indices_vmap)


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


@torch.library.register_fake("fastconv::max_pool2d")
def _(input, kernel, stride, padding, dilation, ceil_mode):  # type: ignore[no-untyped-def]
    rows, columns = output_size(input.shape[2:], kernel, stride, padding, dilation, ceil_mode)
    return empty_like_format(input, (*input.shape[:2], rows, columns), suggested_format(input))


@torch.library.register_fake("fastconv::max_pool2d_with_offsets")
def _(input, kernel, stride, padding, dilation, ceil_mode):  # type: ignore[no-untyped-def]
    rows, columns = output_size(input.shape[2:], kernel, stride, padding, dilation, ceil_mode)
    output = empty_like_format(input, (*input.shape[:2], rows, columns), suggested_format(input))
    offset_type = torch.uint8 if kernel[0] * kernel[1] <= 255 else torch.int32
    return output, torch.empty_like(output, dtype=offset_type)


@torch.library.register_fake("fastconv::max_pool2d_indices")
def _(offsets, input_size, kernel, stride, padding, dilation):  # type: ignore[no-untyped-def]
    return torch.empty_like(offsets, dtype=torch.int64, memory_format=suggested_format(offsets))


@torch.library.register_fake("fastconv::max_pool2d_gather")
def _(input, offsets, kernel, stride, padding, dilation):  # type: ignore[no-untyped-def]
    return empty_like_format(input, tuple(offsets.shape), suggested_format(offsets))


@torch.library.register_fake("fastconv::max_pool2d_backward")
def _(grad_output, offsets, input_size, kernel, stride, padding, dilation):  # type: ignore[no-untyped-def]
    return empty_like_format(grad_output, (*grad_output.shape[:2], *input_size), suggested_format(offsets))


@torch.library.register_fake("fastconv::avg_pool2d")
def _(input, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override):  # type: ignore[no-untyped-def]
    rows, columns = output_size(input.shape[2:], kernel, stride, padding, (1, 1), ceil_mode)
    return empty_like_format(input, (*input.shape[:2], rows, columns), suggested_format(input))


@torch.library.register_fake("fastconv::avg_pool2d_backward")
def _(grad_output, input_size, *_):  # type: ignore[no-untyped-def]
    return empty_like_format(grad_output, (*grad_output.shape[:2], *input_size), suggested_format(grad_output))


@torch.library.register_fake("fastconv::adaptive_avg_pool2d")
def _(input, output_size):  # type: ignore[no-untyped-def]
    return empty_like_format(input, (*input.shape[:2], *output_size), suggested_format(input))


@torch.library.register_fake("fastconv::adaptive_avg_pool2d_backward")
def _(grad_output, input_size):  # type: ignore[no-untyped-def]
    return empty_like_format(grad_output, (*grad_output.shape[:2], *input_size), suggested_format(grad_output))
