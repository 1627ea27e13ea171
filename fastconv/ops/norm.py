"""Local response normalisation and its derivatives.

With ``d = k + alpha / size * (sum of x^2 over the window)``::

    y  = x d^-beta
    dy = v d^-beta - 2 beta alpha / size x d^(-beta-1) (sum over the window of x v)         local_response_norm_jvp
    dx = g d^-beta - 2 beta alpha / size x (sum of g x d^(-beta-1) over mirrored windows)   local_response_norm_backward

First derivatives run in the kernels, forward and reverse. Second derivatives (a gradient of a gradient, a Hessian) are
composed of torch's own operations by the formulas below: they are needed seldom and then need derivatives of their own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
    save,
    suggested_format,
    sum_of,
    tracing,
)


def local_response_norm(input: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    return _call(ops.local_response_norm.default, LocalResponseNorm, (input,), size, alpha, beta, k)


def local_response_norm_jvp(input: Tensor, tangent: Tensor, *params: Any) -> Tensor:
    """The derivative of ``local_response_norm(input)`` along ``tangent``."""
    return _call(ops.local_response_norm_jvp.default, LocalResponseNormJvp, (input, tangent), *params)


def local_response_norm_backward(grad_output: Tensor, input: Tensor, *params: Any) -> Tensor:
    return _call(ops.local_response_norm_backward.default, LocalResponseNormBackward, (grad_output, input), *params)


def _call(op: Any, function: Any, tensors: tuple[Tensor, ...], *params: Any) -> Tensor:
    if tracing():
        result: Tensor = op(*tensors, *params)
    elif needs_function(*tensors):
        result = apply(function, *tensors, *params)
    else:
        result = call_raw(op, *tensors, *params)
    return result


class LocalResponseNorm(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        result: Tensor = call_raw(ops.local_response_norm.default, *args)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, *ctx.params = inputs
        save(ctx, input)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (input,) = ctx.saved_tensors
        return local_response_norm_backward(grad, input, *ctx.params), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, input_t: Tensor, *_: Any) -> Any:
        (input,) = ctx.saved_tensors
        return local_response_norm_jvp(input, input_t, *ctx.params)

    @staticmethod
    @allow_empty
    def vmap(info: Any, in_dims: tuple[Any, ...], input: Tensor, *params: Any) -> Any:
        folded = local_response_norm(fold(input, in_dims[0], 0, info.batch_size), *params)
        return folded.unflatten(0, (info.batch_size, -1)), 0


class LocalResponseNormJvp(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        result: Tensor = call_raw(ops.local_response_norm_jvp.default, *args)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, tangent, *ctx.params = inputs
        save(ctx, input, tangent)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        input, tangent = ctx.saved_tensors
        first = second = None
        if ctx.needs_input_grad[0]:
            first = _hessian_product(tangent, grad, input, *ctx.params)
        if ctx.needs_input_grad[1]:
            second = local_response_norm_backward(grad, input, *ctx.params)
        return first, second, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, input_t: Tensor | None, tangent_t: Tensor | None, *_: Any) -> Any:
        input, tangent = ctx.saved_tensors
        return sum_of(
            None if input_t is None else _second_derivative(input, tangent, input_t, *ctx.params),
            None if tangent_t is None else local_response_norm_jvp(input, tangent_t, *ctx.params),
        )

    @staticmethod
    @allow_empty
    def vmap(info: Any, in_dims: tuple[Any, ...], input: Tensor, tangent: Tensor, *params: Any) -> Any:
        size = info.batch_size
        folded = fold(input, in_dims[0], 0, size), fold(tangent, in_dims[1], 0, size)
        return local_response_norm_jvp(*folded, *params).unflatten(0, (size, -1)), 0


class LocalResponseNormBackward(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        result: Tensor = call_raw(ops.local_response_norm_backward.default, *args)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad_output, input, *ctx.params = inputs
        save(ctx, grad_output, input)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_output, input = ctx.saved_tensors
        first = second = None
        if ctx.needs_input_grad[0]:
            first = local_response_norm_jvp(input, grad, *ctx.params)
        if ctx.needs_input_grad[1]:
            second = _hessian_product(grad, grad_output, input, *ctx.params)
        return first, second, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, grad_t: Tensor | None, input_t: Tensor | None, *_: Any) -> Any:
        grad_output, input = ctx.saved_tensors
        return sum_of(
            None if grad_t is None else local_response_norm_backward(grad_t, input, *ctx.params),
            None if input_t is None else _hessian_product(input_t, grad_output, input, *ctx.params),
        )

    @staticmethod
    @allow_empty
    def vmap(info: Any, in_dims: tuple[Any, ...], grad_output: Tensor, input: Tensor, *params: Any) -> Any:
        size = info.batch_size
        folded = fold(grad_output, in_dims[0], 0, size), fold(input, in_dims[1], 0, size)
        return local_response_norm_backward(*folded, *params).unflatten(0, (size, -1)), 0


# ---------------------------------------------------------------- second derivatives, in torch's operations


def _window_sum(values: Tensor, before: int, after: int) -> Tensor:
    """Sum over the channels from ``before`` below to ``after`` above, as far as there are any."""
    channels = values.shape[1]
    padded = torch.nn.functional.pad(values, (0, 0, 0, 0, before, after))
    total = padded[:, :channels]
    for shift in range(1, before + after + 1):
        total = total + padded[:, shift : shift + channels]
    return total


class _Terms(NamedTuple):
    """What the second derivatives are made of: ``powers[i]`` is d^(-beta-i), ``window`` and ``mirrored`` sum over the
    window of a channel and over the channels whose window holds it."""

    scale: float
    before: int
    after: int
    powers: tuple[Tensor, Tensor, Tensor]

    def window(self, values: Tensor) -> Tensor:
        return _window_sum(values, self.before, self.after)

    def mirrored(self, values: Tensor) -> Tensor:
        return _window_sum(values, self.after, self.before)


def _terms(x: Tensor, size: int, alpha: float, beta: float, k: float) -> _Terms:
    scale, before, after = alpha / size, size // 2, (size - 1) // 2
    d = k + scale * _window_sum(x * x, before, after)
    return _Terms(scale, before, after, (d**-beta, d ** (-beta - 1), d ** (-beta - 2)))


def _hessian_product(v: Tensor, g: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """The Hessian of ``sum(g * local_response_norm(x))`` times ``v``; it is symmetric, so this is the derivative of the
    gradient along ``v`` as well as the gradient of (gradient, v)."""
    t = _terms(x, size, alpha, beta, k)
    _, power, power2 = t.powers
    along = t.window(x * v)
    first = g * power * along + v * t.mirrored(g * x * power) + x * t.mirrored(g * v * power)
    second = x * t.mirrored(g * x * power2 * along)
    return -2 * t.scale * beta * first + 4 * t.scale**2 * beta * (beta + 1) * second


def _second_derivative(x: Tensor, v: Tensor, w: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """The derivative of ``local_response_norm(x)`` along ``v`` and then along ``w``."""
    t = _terms(x, size, alpha, beta, k)
    _, power, power2 = t.powers
    along_v, along_w = t.window(x * v), t.window(x * w)
    first = (v * along_w + w * along_v + x * t.window(v * w)) * power
    second = x * along_v * along_w * power2
    return -2 * t.scale * beta * first + 4 * t.scale**2 * beta * (beta + 1) * second


# ---------------------------------------------------------------- registration

for _name, _function in (
    ("local_response_norm", LocalResponseNorm),
    ("local_response_norm_jvp", LocalResponseNormJvp),
    ("local_response_norm_backward", LocalResponseNormBackward),
):
    torch.library.register_autograd(f"{NAMESPACE}::{_name}", _function.backward, setup_context=_function.setup_context)
    torch.library.register_vmap(f"{NAMESPACE}::{_name}", _function.vmap)


@torch.library.register_fake(f"{NAMESPACE}::local_response_norm")
def _(input, size, alpha, beta, k):  # type: ignore[no-untyped-def]
    return empty_like_format(input, tuple(input.shape), suggested_format(input))


@torch.library.register_fake(f"{NAMESPACE}::local_response_norm_jvp")
def _(input, tangent, size, alpha, beta, k):  # type: ignore[no-untyped-def]
    return empty_like_format(input, tuple(input.shape), suggested_format(input))


@torch.library.register_fake(f"{NAMESPACE}::local_response_norm_backward")
def _(grad_output, input, size, alpha, beta, k):  # type: ignore[no-untyped-def]
    return empty_like_format(input, tuple(input.shape), suggested_format(input))
