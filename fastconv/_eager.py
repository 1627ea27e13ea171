"""The short way of a call, for plain eager inference: from the arguments straight to the kernel.

A tiny convolution takes less time than Python takes to look at its arguments, so here they are not looked at: the
kernel's own checks are relied on. Each function returns None for a call that must take the long way through
:mod:`fastconv.functional`, which explains what is wrong with it or finds who can serve it. That is any call that
something watches or alters (a gradient, a transform, a trace, a mode, autocast), and any that a kernel refuses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from fastconv import tuning
from fastconv._library import EMULATED, cuda_problem, ops
from fastconv._packed import PackedWeight


def _direct(overload: Any) -> Any:
    # What the overload's own __call__ calls, in one Python frame more.
    return getattr(overload, "_op", overload)


# Overloads without autograd, fakes or vmap, whose registrations in Python cost more than a small convolution.
_conv2d = _direct(ops.conv2d.eager)
_conv2d_fused = _direct(ops.conv2d_fused.eager)
_max_pool2d = _direct(ops.max_pool2d.eager)
_avg_pool2d = _direct(ops.avg_pool2d.eager)
_adaptive_avg_pool2d = _direct(ops.adaptive_avg_pool2d.eager)

_TYPES = (Tensor, Parameter)  # exactly: a subclass may want to see its operators
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_level = torch._C._functorch.maybe_current_level
_is_tracing = torch._C._is_tracing
_ON_GPU = cuda_problem is None


def _is_plain(input: Any) -> bool:
    """True if nothing watches or alters calls here, and ``input`` is a batch of images where there are kernels."""
    return (
        not torch.compiler.is_compiling()
        and type(input) in _TYPES
        and (input.is_cpu or (_ON_GPU and input.is_cuda))
        and input.dim() == 4
        and _dispatch_modes() == 0
        and _functorch_level() is None
        and forward_ad._current_level < 0
        and not _is_tracing()
        and not (torch.is_grad_enabled() and input.requires_grad)
    )


def _two(value: Any) -> tuple[Any, Any] | None:
    """``value`` as torch's layers keep it, or None: plain integers, since the operator would take a bool for one."""
    if type(value) is int:
        return value, value
    if type(value) is tuple and len(value) == 2 and type(value[0]) is int and type(value[1]) is int:
        return value
    return None


def _are_constants(*tensors: Any) -> bool:
    """True if none of the tensors, or Nones, is trained or of a type of its own."""
    recording = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _TYPES or (recording and tensor.requires_grad)):
            return False
    return True


def _is_plain_conv(input: Any) -> bool:
    """The same for convolutions, which autocast would lower; on CUDA cuDNN may be the better choice."""
    return (
        _is_plain(input)
        and not input.is_cuda
        and not torch.is_autocast_enabled("cpu")
        and not (EMULATED and tuning.applies(input))
    )


def conv2d(input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any) -> Tensor | None:
    # _are_constants(weight, bias), in place: this is the call that the overhead is measured on.
    if not _is_plain_conv(input) or type(weight) not in _TYPES:
        return None
    if bias is not None and type(bias) not in _TYPES:
        return None
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        return None
    strides, sides, dilations = _two(stride), _two(padding), _two(dilation)
    if strides is None or sides is None or dilations is None or type(groups) is not int:
        return None
    try:
        result: Tensor = _conv2d(input, weight, bias, strides + sides + sides + dilations, groups)
    except RuntimeError:
        return None
    return result


def conv2d_fused(
    input: Any,
    weight: Any,
    scale: Any,
    shift: Any,
    residual: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    activation: int,
    packed: PackedWeight | None = None,
) -> Tensor | None:
    if not _is_plain_conv(input):
        return None
    if not _are_constants(weight, scale, shift, residual):
        return None
    if type(padding) is not tuple or len(padding) != 4:
        return None
    strides, dilations = _two(stride), _two(dilation)
    if strides is None or dilations is None:
        return None
    geometry = strides + padding + dilations
    try:
        form = None if packed is None else packed.find(input, weight, geometry, groups)
        last = () if form is None else (form,)
        result: Tensor = _conv2d_fused(input, weight, scale, shift, residual, geometry, groups, activation, *last)
    except RuntimeError:
        return None
    return result


def max_pool2d(input: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: Any) -> Tensor | None:
    if not _is_plain(input) or type(ceil_mode) is not bool:
        return None
    taps, sides, dilations = _two(kernel), _two(padding), _two(dilation)
    strides = taps if stride is None else _two(stride)
    if taps is None or strides is None or sides is None or dilations is None:
        return None
    try:
        result: Tensor = _max_pool2d(input, taps + strides + sides + dilations, ceil_mode)
    except RuntimeError:
        return None
    return result


def avg_pool2d(
    input: Any, kernel: Any, stride: Any, padding: Any, ceil_mode: Any, count_include_pad: Any, divisor_override: Any
) -> Tensor | None:
    if not _is_plain(input) or type(ceil_mode) is not bool or type(count_include_pad) is not bool:
        return None
    if divisor_override is not None and (type(divisor_override) is not int or divisor_override == 0):
        return None
    taps, sides = _two(kernel), _two(padding)
    strides = taps if stride is None else _two(stride)
    if taps is None or strides is None or sides is None:
        return None
    try:
        result: Tensor = _avg_pool2d(input, taps + strides + sides, ceil_mode, count_include_pad, divisor_override)
    except RuntimeError:
        return None
    return result


def adaptive_avg_pool2d(input: Any, output_size: Any) -> Tensor | None:
    size = _two(output_size)
    if size is None or not _is_plain(input):
        return None
    try:
        result: Tensor = _adaptive_avg_pool2d(input, size)
    except RuntimeError:
        return None
    return result
