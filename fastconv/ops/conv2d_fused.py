"""conv2d_fused: convolution, per-channel scale and shift, residual and activation in one pass.

``y = activation(scale * conv2d(input, weight) + shift + residual)``. Its derivatives are conv2d's three gradients, and
the activation's derivative as a function of the saved ``y``. Arguments are normalised as in :mod:`fastconv.ops.conv2d`.
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
    empty_like_format,
    fold,
    needs_function,
    suggested_format,
    tracing,
)
from fastconv.ops.conv2d import (
    Padding,
    Pair,
    _count,
    conv2d,
    conv2d_bias_grad,
    conv2d_input_grad,
    conv2d_weight_grad,
    output_size,
    per_channel,
)
from fastconv.tuning import call_tuned

# Numbers of csrc/common/problem.h's Activation.
ACTIVATIONS = {"none": 0, "relu": 1, "relu6": 2, "tanh": 3}
_NONE, _RELU, _RELU6, _TANH = ACTIVATIONS.values()


def activation_code(activation: str) -> int:
    """The op's number for an activation's name."""
    code = ACTIVATIONS.get(activation) if isinstance(activation, str) else None
    if code is None:
        raise ValueError(f"activation is {activation!r}, expected one of {', '.join(map(repr, ACTIVATIONS))}")
    return code


def conv2d_fused(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    activation: str = "none",
    algo: str | None = None,
) -> Tensor:
    code = activation_code(activation)
    return _conv2d_fused(input, weight, scale, shift, residual, stride, padding, dilation, groups, code, algo)


def _conv2d_fused(*args: Any) -> Tensor:
    if tracing():
        result: Tensor = ops.conv2d_fused.default(*args)
    elif needs_function(*args[:5]):
        result = apply(Conv2dFused, *args)
    else:
        result = call_tuned(ops.conv2d_fused.default, *args)
    return result


def activation_grad(grad: Tensor, output: Tensor, code: int) -> Tensor:
    """``grad`` times the activation's derivative, by torch's own formulas: 0 at ties, ``grad`` where output is NaN.

    relu and relu6 are 0 or 6 exactly where their argument is outside (0, 6): the output tells as much as the argument.
    """
    if code == _RELU:
        result: Tensor = torch.ops.aten.threshold_backward(grad, output, 0)
    elif code == _RELU6:
        result = torch.ops.aten.hardtanh_backward(grad, output, 0, 6)
    elif code == _TANH:
        result = torch.ops.aten.tanh_backward(grad, output)
    else:
        result = grad
    return result


def _per_filter(values: Tensor) -> Tensor:
    """(K) as (K, 1, 1, 1)."""
    return values.reshape(-1, 1, 1, 1)


class Conv2dFused(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        result: Tensor = call_tuned(ops.conv2d_fused.default, *args)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, scale, shift, _, *ctx.params, ctx.activation, ctx.algo = inputs
        needs_input, needs_weight, needs_scale = ctx.needs_input_grad[:3]
        ctx.save_for_backward(
            input if needs_weight or needs_scale else None,
            weight if needs_input or needs_scale else None,
            scale if needs_input or needs_weight else None,
            output if ctx.activation != _NONE else None,
        )
        if hasattr(ctx, "save_for_forward"):
            ctx.save_for_forward(input, weight, scale, output)
        ctx.input_size, ctx.kernel_size = input.shape[2:], weight.shape[2:]
        ctx.scale_dtype = None if scale is None else scale.dtype
        ctx.shift_dtype = None if shift is None else shift.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        input, weight, scale, output = ctx.saved_tensors
        needs_input, needs_weight, needs_scale, needs_shift, needs_residual = ctx.needs_input_grad[:5]
        params = (*ctx.params, ctx.algo)
        grad = activation_grad(grad, output, ctx.activation)
        grad_input = grad_weight = grad_scale = grad_shift = None
        scaled = grad
        if scale is not None and (needs_input or (needs_weight and not needs_scale)):
            scaled = (grad * per_channel(scale)).to(grad.dtype)
        if needs_input:
            grad_input = conv2d_input_grad(scaled, weight, ctx.input_size, *params)
        if needs_scale:
            # The sum of grad * conv2d(input, weight) over a channel's pixels is that of the unscaled weight gradient
            # times the weight over the filter's taps: no second convolution where the weight is trained too.
            unscaled = conv2d_weight_grad(grad, input, ctx.kernel_size, *params)
            accumulator = torch.promote_types(grad.dtype, torch.float32)
            grad_scale = (unscaled.to(accumulator) * weight).sum((1, 2, 3)).to(ctx.scale_dtype)
            if needs_weight:
                grad_weight = (unscaled * _per_filter(scale)).to(grad.dtype)
        elif needs_weight:
            grad_weight = conv2d_weight_grad(scaled, input, ctx.kernel_size, *params)
        if needs_shift:
            grad_shift = conv2d_bias_grad(grad.to(ctx.shift_dtype))
        grad_residual = grad if needs_residual else None
        return grad_input, grad_weight, grad_scale, grad_shift, grad_residual, *(None,) * 6

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        input, weight, scale, output = ctx.saved_tensors
        input_t, weight_t, scale_t, shift_t, residual_t = tangents[:5]
        params = (*ctx.params, ctx.algo)
        parts = []
        if input_t is not None:
            parts.append(conv2d(input_t, weight, None, *params))
        if weight_t is not None:
            parts.append(conv2d(input, weight_t, None, *params))
        if scale is not None:
            parts = [part * per_channel(scale) for part in parts]
        if scale_t is not None:
            parts.append(conv2d(input, weight, None, *params) * per_channel(scale_t))
        if shift_t is not None:
            parts.append(per_channel(shift_t).expand(output.shape))
        if residual_t is not None:
            parts.append(residual_t)
        tangent = parts[0]
        for part in parts[1:]:
            tangent = tangent + part
        return activation_grad(tangent.to(output.dtype), output, ctx.activation)

    @staticmethod
    @allow_empty
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        input, weight, scale, shift, residual, *params, groups, activation, algo = args
        input_dim, weight_dim, scale_dim, shift_dim, residual_dim = in_dims[:5]
        size = info.batch_size
        if weight_dim is None and scale_dim is None and shift_dim is None:
            inputs = fold(input, input_dim, 0, size)
            residuals = None if residual is None else fold(residual, residual_dim, 0, size)
            result = _conv2d_fused(inputs, weight, scale, shift, residuals, *params, groups, activation, algo)
            return result.unflatten(0, (size, -1)), 0
        # A batch of weights, scales or shifts is a batch of groups.
        weights = fold(weight, weight_dim, 0, size)
        scales = None if scale is None else fold(scale, scale_dim, 0, size)
        shifts = None if shift is None else fold(shift, shift_dim, 0, size)
        residuals = None if residual is None else fold(residual, residual_dim, 1, size)
        inputs = input
        if input_dim is not None or groups != 1:
            inputs, groups = fold(input, input_dim, 1, size), groups * size
        result = _conv2d_fused(inputs, weights, scales, shifts, residuals, *params, groups, activation, algo)
        return result.unflatten(1, (size, -1)), 1


torch.library.register_autograd(
    f"{NAMESPACE}::conv2d_fused", Conv2dFused.backward, setup_context=Conv2dFused.setup_context
)
torch.library.register_vmap(f"{NAMESPACE}::conv2d_fused", Conv2dFused.vmap)


@torch.library.register_fake(f"{NAMESPACE}::conv2d_fused")
def _(input, weight, scale, shift, residual, stride, padding, dilation, groups, activation, algo):  # type: ignore[no-untyped-def]
    rows, columns = output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    shape = (input.shape[0], weight.shape[0], rows, columns)
    return empty_like_format(input, shape, suggested_format(input, weight))


@register_flop_formula(ops.conv2d_fused)
def _conv2d_fused_flops(input, weight, *_, out_shape, **__):  # type: ignore[no-untyped-def]
    return 2 * _count(out_shape) * _count(weight[1:])
