"""conv2d and its gradients.

Three maps, each linear in both operands, that are each other's derivatives::

    conv2d(input, weight)   conv2d_input_grad(grad, weight)   conv2d_weight_grad(grad, input)

so derivatives of any order, forward or reverse, stay inside the three kernels. Arguments are normalised: 4-D tensors,
``stride`` and ``dilation`` are (height, width), ``padding`` is (top, left, bottom, right).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastconv._library import NAMESPACE, ops
from fastconv.ops._apply import apply
from fastconv.ops._autograd import (
    allow_empty,
    call_raw,
    empty_like_format,
    fold,
    needs_function,
    save,
    suggested_format,
    sum_of,
    tracing,
)
from fastconv.tuning import call_tuned

Pair = tuple[int, int]
Padding = tuple[int, int, int, int]


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    algo: str | None = None,
) -> Tensor:
    if tracing():
        result: Tensor = ops.conv2d.default(input, weight, bias, stride, padding, dilation, groups, algo)
    elif needs_function(input, weight, bias):
        result = apply(Conv2d, input, weight, bias, stride, padding, dilation, groups, algo)
    else:
        result = call_tuned(ops.conv2d.default, input, weight, bias, stride, padding, dilation, groups, algo)
    return result


def conv2d_input_grad(
    grad_output: Tensor,
    weight: Tensor,
    input_size: Pair,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    algo: str | None = None,
) -> Tensor:
    args = (grad_output, weight, input_size, stride, padding, dilation, groups, algo)
    if tracing():
        result: Tensor = ops.conv2d_input_grad.default(*args)
    elif needs_function(grad_output, weight):
        result = apply(Conv2dInputGrad, *args)
    else:
        result = call_tuned(ops.conv2d_input_grad.default, *args)
    return result


def conv2d_weight_grad(
    grad_output: Tensor,
    input: Tensor,
    kernel_size: Pair,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    algo: str | None = None,
) -> Tensor:
    args = (grad_output, input, kernel_size, stride, padding, dilation, groups, algo)
    if tracing():
        result: Tensor = ops.conv2d_weight_grad.default(*args)
    elif needs_function(grad_output, input):
        result = apply(Conv2dWeightGrad, *args)
    else:
        result = call_tuned(ops.conv2d_weight_grad.default, *args)
    return result


def conv2d_bias_grad(grad_output: Tensor) -> Tensor:
    if tracing():
        result: Tensor = ops.conv2d_bias_grad.default(grad_output)
    elif needs_function(grad_output):
        result = apply(Conv2dBiasGrad, grad_output)
    else:
        result = call_raw(ops.conv2d_bias_grad.default, grad_output)
    return result


def per_channel(values: Tensor) -> Tensor:
    """(K) as (1, K, 1, 1)."""
    return values.reshape(1, -1, 1, 1)


class Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        result: Tensor = call_tuned(ops.conv2d.default, *args)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, _, *ctx.params = inputs
        # An operand is kept only if the other one's gradient is wanted.
        kept_input = input if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(kept_input, weight if ctx.needs_input_grad[0] else None)
        if hasattr(ctx, "save_for_forward"):
            ctx.save_for_forward(input, weight)
        ctx.input_size, ctx.kernel_size = input.shape[2:], weight.shape[2:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        input, weight = ctx.saved_tensors
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = conv2d_input_grad(grad, weight, ctx.input_size, *ctx.params)
        if ctx.needs_input_grad[1]:
            grad_weight = conv2d_weight_grad(grad, input, ctx.kernel_size, *ctx.params)
        if ctx.needs_input_grad[2]:
            grad_bias = conv2d_bias_grad(grad)
        return grad_input, grad_weight, grad_bias, *(None,) * len(ctx.params)

    @staticmethod
    def jvp(ctx: Any, input_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None, *_: Any) -> Any:
        input, weight = ctx.saved_tensors
        tangent = None
        if input_t is not None:
            tangent = conv2d(input_t, weight, None, *ctx.params)
        if weight_t is not None:
            part = conv2d(input, weight_t, None, *ctx.params)
            tangent = part if tangent is None else tangent + part
        if bias_t is not None:
            if tangent is None:
                tangent = conv2d(torch.zeros_like(input), weight, bias_t, *ctx.params)
            else:
                tangent = tangent + per_channel(bias_t)
        return tangent

    @staticmethod
    @allow_empty
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        input, weight, bias, stride, padding, dilation, groups, algo = args
        input_dim, weight_dim, bias_dim = in_dims[:3]
        size = info.batch_size
        params = (stride, padding, dilation)
        shared_bias = bias if bias_dim is None else None
        if weight_dim is None and input_dim is None:
            result = conv2d(input, weight, None, *params, groups, algo).unsqueeze(0)
            return result + bias.movedim(bias_dim, 0).reshape(size, 1, -1, 1, 1), 0
        if weight_dim is None:
            folded = conv2d(fold(input, input_dim, 0, size), weight, shared_bias, *params, groups, algo)
            result = folded.unflatten(0, (size, -1))
            if bias_dim is not None:
                result = result + bias.movedim(bias_dim, 0).reshape(size, 1, -1, 1, 1)
            return result, 0
        # A batch of weights is a batch of groups.
        weights = fold(weight, weight_dim, 0, size)
        biases = None if bias is None else fold(bias, bias_dim, 0, size)
        if input_dim is None and groups == 1:
            result = conv2d(input, weights, biases, *params, 1, algo)
        else:
            result = conv2d(fold(input, input_dim, 1, size), weights, biases, *params, groups * size, algo)
        return result.unflatten(1, (size, -1)), 1


class Conv2dInputGrad(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        result: Tensor = call_tuned(ops.conv2d_input_grad.default, *args)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad_output, weight, ctx.input_size, *ctx.params = inputs
        save(ctx, grad_output, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_output, weight = ctx.saved_tensors
        first = conv2d(grad, weight, None, *ctx.params) if ctx.needs_input_grad[0] else None
        second = None
        if ctx.needs_input_grad[1]:
            second = conv2d_weight_grad(grad_output, grad, weight.shape[2:], *ctx.params)
        return first, second, None, *(None,) * len(ctx.params)

    @staticmethod
    def jvp(ctx: Any, grad_t: Tensor | None, weight_t: Tensor | None, *_: Any) -> Any:
        grad_output, weight = ctx.saved_tensors
        return sum_of(
            None if grad_t is None else conv2d_input_grad(grad_t, weight, ctx.input_size, *ctx.params),
            None if weight_t is None else conv2d_input_grad(grad_output, weight_t, ctx.input_size, *ctx.params),
        )

    @staticmethod
    @allow_empty
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        grad_output, weight, input_size, stride, padding, dilation, groups, algo = args
        size = info.batch_size
        params = (input_size, stride, padding, dilation)
        if in_dims[1] is None:
            folded = conv2d_input_grad(fold(grad_output, in_dims[0], 0, size), weight, *params, groups, algo)
            return folded.unflatten(0, (size, -1)), 0
        grads, weights = fold(grad_output, in_dims[0], 1, size), fold(weight, in_dims[1], 0, size)
        return conv2d_input_grad(grads, weights, *params, groups * size, algo).unflatten(1, (size, -1)), 1


class Conv2dWeightGrad(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        result: Tensor = call_tuned(ops.conv2d_weight_grad.default, *args)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad_output, input, ctx.kernel_size, *ctx.params = inputs
        save(ctx, grad_output, input)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_output, input = ctx.saved_tensors
        first = conv2d(input, grad, None, *ctx.params) if ctx.needs_input_grad[0] else None
        second = None
        if ctx.needs_input_grad[1]:
            second = conv2d_input_grad(grad_output, grad, input.shape[2:], *ctx.params)
        return first, second, None, *(None,) * len(ctx.params)

    @staticmethod
    def jvp(ctx: Any, grad_t: Tensor | None, input_t: Tensor | None, *_: Any) -> Any:
        grad_output, input = ctx.saved_tensors
        return sum_of(
            None if grad_t is None else conv2d_weight_grad(grad_t, input, ctx.kernel_size, *ctx.params),
            None if input_t is None else conv2d_weight_grad(grad_output, input_t, ctx.kernel_size, *ctx.params),
        )

    @staticmethod
    @allow_empty
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        grad_output, input, kernel_size, stride, padding, dilation, groups, algo = args
        size = info.batch_size
        grads, inputs = fold(grad_output, in_dims[0], 1, size), fold(input, in_dims[1], 1, size)
        result = conv2d_weight_grad(grads, inputs, kernel_size, stride, padding, dilation, groups * size, algo)
        return result.unflatten(0, (size, -1)), 0


class Conv2dBiasGrad(torch.autograd.Function):
    @staticmethod
    def forward(grad_output: Tensor) -> Tensor:
        result: Tensor = call_raw(ops.conv2d_bias_grad.default, grad_output)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return per_channel(grad).expand(ctx.shape)

    @staticmethod
    def jvp(ctx: Any, grad_t: Tensor) -> Any:
        return conv2d_bias_grad(grad_t)

    @staticmethod
    @allow_empty
    def vmap(info: Any, in_dims: tuple[Any, ...], grad_output: Tensor) -> tuple[Tensor, int]:
        folded = conv2d_bias_grad(fold(grad_output, in_dims[0], 1, info.batch_size))
        return folded.unflatten(0, (info.batch_size, -1)), 0


for _name, _function in (
    ("conv2d", Conv2d),
    ("conv2d_input_grad", Conv2dInputGrad),
    ("conv2d_weight_grad", Conv2dWeightGrad),
    ("conv2d_bias_grad", Conv2dBiasGrad),
):
    torch.library.register_autograd(f"{NAMESPACE}::{_name}", _function.backward, setup_context=_function.setup_context)
    torch.library.register_vmap(f"{NAMESPACE}::{_name}", _function.vmap)


def output_size(size: Any, kernel: Any, stride: Pair, padding: Padding, dilation: Pair) -> tuple[Any, Any]:
    """Rows and columns of the output: floor((H_in - dilated H_k + padding) / stride) + 1."""
    rows = (size[0] + padding[0] + padding[2] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    columns = (size[1] + padding[1] + padding[3] - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    return rows, columns


@torch.library.register_fake(f"{NAMESPACE}::conv2d")
def _(input, weight, bias, stride, padding, dilation, groups, algo):  # type: ignore[no-untyped-def]
    rows, columns = output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    shape = (input.shape[0], weight.shape[0], rows, columns)
    return empty_like_format(input, shape, suggested_format(input, weight))


@torch.library.register_fake(f"{NAMESPACE}::conv2d_input_grad")
def _(grad_output, weight, input_size, stride, padding, dilation, groups, algo):  # type: ignore[no-untyped-def]
    shape = (grad_output.shape[0], weight.shape[1] * groups, *input_size)
    return empty_like_format(grad_output, shape, suggested_format(grad_output, weight))


@torch.library.register_fake(f"{NAMESPACE}::conv2d_weight_grad")
def _(grad_output, input, kernel_size, stride, padding, dilation, groups, algo):  # type: ignore[no-untyped-def]
    shape = (grad_output.shape[1], input.shape[1] // groups, *kernel_size)
    return empty_like_format(input, shape, suggested_format(grad_output, input))


@torch.library.register_fake(f"{NAMESPACE}::conv2d_bias_grad")
def _(grad_output):  # type: ignore[no-untyped-def]
    return grad_output.new_empty((grad_output.shape[1],))


# FLOPs are counted on shapes: two per multiply-add over the forward's output grid, in all three passes.


@register_flop_formula(ops.conv2d)
def _conv2d_flops(input, weight, *_, out_shape, **__):  # type: ignore[no-untyped-def]
    return 2 * _count(out_shape) * _count(weight[1:])


@register_flop_formula(ops.conv2d_input_grad)
def _input_grad_flops(grad_output, weight, *_, **__):  # type: ignore[no-untyped-def]
    return 2 * _count(grad_output) * _count(weight[1:])


@register_flop_formula(ops.conv2d_weight_grad)
def _weight_grad_flops(grad_output, *_, out_shape, **__):  # type: ignore[no-untyped-def]
    return 2 * _count(grad_output) * _count(out_shape[1:])


def _count(shape: Any) -> int:
    result = 1
    for size in shape:
        result *= int(size)
    return result
