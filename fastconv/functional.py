"""The functions of :mod:`torch.nn.functional` that fastconv has kernels for, with torch's signatures.

A call that no kernel serves (an integer dtype, a sparse tensor, wrong shapes) is handed to torch, which computes it or
raises its own error; :func:`fastconv.stats` counts what torch computed under ``"torch/..."``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary, has_torch_function_variadic

from fastconv import _arguments, _eager
from fastconv._arguments import pair
from fastconv._library import runs_cuda_kernels, torch_calls
from fastconv._precision import precision_refusal
from fastconv.ops import conv2d as _conv2d
from fastconv.ops import max_pool as _max_pool
from fastconv.ops import norm as _norm
from fastconv.ops import pool as _pool

__all__ = ["adaptive_avg_pool2d", "avg_pool2d", "conv2d", "local_response_norm", "max_pool2d"]

# What torch raises for bad arguments; subclasses with other constructors pass through as they are.
TORCH_ERRORS = (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError)

# torch's own functions, taken before fastconv.patch() can replace them.
_torch_conv2d: Callable[..., Tensor] = torch.nn.functional.conv2d
_torch_max_pool2d: Callable[..., Any] = torch.nn.functional.max_pool2d
_torch_avg_pool2d: Callable[..., Tensor] = torch.nn.functional.avg_pool2d
_torch_adaptive_avg_pool2d: Callable[..., Tensor] = torch.nn.functional.adaptive_avg_pool2d
_torch_local_response_norm: Callable[..., Tensor] = torch.nn.functional.local_response_norm


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: str | int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    algo: str | None = None,
) -> Tensor:
    """2-D convolution (cross-correlation): ``y[k] = bias[k] + sum over c of weight[k, c] * input[c]``.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, float64, float16 or bfloat16. Sums are
            kept in float32, for float64 in float64.
        weight: (K, C / groups, R, S), of input's dtype.
        bias: (K) or None.
        stride: step of the window in rows and columns.
        padding: zeros on each side, in rows and columns; ``"valid"`` for none, ``"same"`` to keep the size at stride 1.
        dilation: distance between taps.
        groups: input and output channels are split into this many independent convolutions.
        algo: name of a kernel (:func:`fastconv.explain` lists them); None chooses. ``"direct"`` is the plain reference
            on CUDA, and on the CPU the best kernel that computes the sum above without transforming its operands.

    Returns:
        (N, K, P, Q), channels_last if input or weight is, with
        P = floor((H + 2 padding - dilation (R - 1) - 1) / stride) + 1.

    Raises:
        RuntimeError, TypeError, ValueError: as :func:`torch.nn.functional.conv2d` does.
        RuntimeError: also if ``algo`` names no kernel, or one that refuses the problem.
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(
            conv2d, (input, weight, bias), input, weight, bias, stride, padding, dilation, groups, algo=algo
        )
    if algo is None:
        quick = _eager.conv2d(input, weight, bias, stride, padding, dilation, groups)
        if quick is not None:
            return quick
    if _emits_aten():
        return _torch_conv2d(input, weight, bias, stride, padding, dilation, groups)
    strides, dilations = pair(stride), pair(dilation)
    kernel = weight.shape[2:] if isinstance(weight, Tensor) and weight.dim() == 4 else (1, 1)
    paddings = _arguments.conv2d_padding(padding, kernel, strides, dilations or (1, 1))
    cast = _autocast(input)
    if cast is not None:
        input, weight, bias = _lower(input, cast), _lower(weight, cast), _lower(bias, cast)
    count = _arguments.integer(groups)
    refusal = _arguments.conv2d_refusal(input, weight, bias, strides, paddings, dilations, count)
    if refusal is None:
        refusal = _arguments.slow_on_cuda(input, weight, strides, dilations, count, algo)
    if refusal is None and algo is not None and runs_cuda_kernels(input):
        refusal = precision_refusal(algo)
    if refusal is not None or strides is None or dilations is None:
        by_torch: Tensor = _by_torch(
            "conv2d", _torch_conv2d, refusal, input, weight, bias, stride, padding, dilation, groups
        )
        if algo is not None:
            raise RuntimeError(f"fastconv.conv2d: algo={algo!r} does not serve this convolution: {refusal}")
        return by_torch
    if input.dim() == 3:
        return _conv2d.conv2d(input[None], weight, bias, strides, paddings, dilations, count, algo)[0]
    return _conv2d.conv2d(input, weight, bias, strides, paddings, dilations, count, algo)


def max_pool2d(
    input: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Maximum over windows. NaN wins; among equals the first does.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, float64, float16 or bfloat16.
        kernel_size: rows and columns of the window.
        stride: step of the window; ``kernel_size`` if None.
        padding: minus infinity on each side, at most half of the window.
        dilation: distance between the elements of a window.
        ceil_mode: round the output size up, so that the last window may hang over the end.
        return_indices: also return the winners.

    Returns:
        (N, C, P, Q) in input's memory format; with ``return_indices`` a pair of it and int64 indices into the flattened
        (H, W) plane.

    Raises:
        RuntimeError, TypeError, ValueError: as :func:`torch.nn.functional.max_pool2d` does.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(
            max_pool2d, (input,), input, kernel_size, stride, padding, dilation, ceil_mode, return_indices
        )
    if return_indices is False:
        quick = _eager.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)
        if quick is not None:
            return quick
    arguments = (input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    if _emits_aten():
        return _torch_max_pool2d(*arguments)
    kernel, paddings, dilations = pair(kernel_size), pair(padding), pair(dilation)
    strides = kernel if _is_absent(stride) else pair(stride)
    refusal = _arguments.pool_refusal("max_pool2d", input, kernel, strides, paddings, dilations, ceil_mode)
    if refusal is None:
        refusal = _arguments.flag_refusal(ceil_mode=ceil_mode, return_indices=return_indices)
    if refusal is not None or kernel is None or strides is None or paddings is None or dilations is None:
        return _by_torch("max_pool2d", _torch_max_pool2d, refusal, *arguments)
    if input.dim() == 4:
        return _max_pool.max_pool2d(input, kernel, strides, paddings, dilations, ceil_mode, return_indices)
    result = _max_pool.max_pool2d(input[None], kernel, strides, paddings, dilations, ceil_mode, return_indices)
    return (result[0][0], result[1][0]) if return_indices else result[0]


def avg_pool2d(
    input: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Mean over windows.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, float64, float16 or bfloat16.
        kernel_size: rows and columns of the window.
        stride: step of the window; ``kernel_size`` if None.
        padding: zeros on each side, at most half of the window.
        ceil_mode: round the output size up, so that the last window may hang over the end.
        count_include_pad: count the padding in the divisor.
        divisor_override: divide by this instead of the window's size.

    Returns:
        (N, C, P, Q) in input's memory format.

    Raises:
        RuntimeError, TypeError, ValueError: as :func:`torch.nn.functional.avg_pool2d` does.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(
            avg_pool2d,
            (input,),
            input,
            kernel_size,
            stride,
            padding,
            ceil_mode,
            count_include_pad,
            divisor_override,
        )
    arguments = (input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    quick = _eager.avg_pool2d(*arguments)
    if quick is not None:
        return quick
    if _emits_aten():
        return _torch_avg_pool2d(*arguments)
    kernel, paddings = pair(kernel_size), pair(padding)
    strides = kernel if _is_absent(stride) else pair(stride)
    refusal = _arguments.pool_refusal("avg_pool2d", input, kernel, strides, paddings, (1, 1), ceil_mode)
    divisor = _arguments.integer(divisor_override)
    if divisor == 0 or (divisor is None and divisor_override is not None):
        refusal = f"divisor_override is {divisor_override!r}, expected an integer other than 0, or None"
    if refusal is None:
        refusal = _arguments.flag_refusal(ceil_mode=ceil_mode, count_include_pad=count_include_pad)
    if refusal is not None or kernel is None or strides is None or paddings is None:
        return _by_torch("avg_pool2d", _torch_avg_pool2d, refusal, *arguments)  # type: ignore[no-any-return]
    options = (ceil_mode, count_include_pad, divisor)
    if input.dim() == 3:
        return _pool.avg_pool2d(input[None], kernel, strides, paddings, *options)[0]
    return _pool.avg_pool2d(input, kernel, strides, paddings, *options)


def adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor:
    """Mean over windows that divide the plane into ``output_size`` cells.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, float64, float16 or bfloat16.
        output_size: rows and columns of the output, one number for both; None keeps that of the input.

    Returns:
        (N, C, P, Q) in input's memory format.

    Raises:
        RuntimeError, TypeError, ValueError: as :func:`torch.nn.functional.adaptive_avg_pool2d` does.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(adaptive_avg_pool2d, (input,), input, output_size)
    quick = _eager.adaptive_avg_pool2d(input, output_size)
    if quick is not None:
        return quick
    if _emits_aten():
        return _torch_adaptive_avg_pool2d(input, output_size)
    refusal = _arguments.tensor_refusal("adaptive_avg_pool2d", "input", input)
    size = None
    if refusal is None:
        if input.dim() not in (3, 4) or 0 in input.shape[-3:]:
            refusal = f"input has shape {tuple(input.shape)}, expected (N, C, H, W) or (C, H, W), none of C, H, W empty"
        else:
            size = _adaptive_size(output_size, input.shape[-2:])
            if size is None or min(size) < 0:
                refusal = f"output_size is {output_size!r}, expected one or two integers of at least 0, or None"
            else:
                refusal = _arguments.cuda_adaptive_refusal(input, size)
    if refusal is not None or size is None:
        return _by_torch(  # type: ignore[no-any-return]
            "adaptive_avg_pool2d", _torch_adaptive_avg_pool2d, refusal, input, output_size
        )
    if input.dim() == 3:
        return _pool.adaptive_avg_pool2d(input[None], size)[0]
    return _pool.adaptive_avg_pool2d(input, size)


def local_response_norm(input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """Local response normalisation: ``y = x / (k + alpha / size * sum of x^2 over size channels)^beta``.

    Krizhevsky, Sutskever, Hinton: ImageNet Classification with Deep Convolutional Neural Networks (2012), section 3.3;
    the paper's alpha is torch's alpha / size.

    Args:
        input: (N, C, *); float32, float64, float16 or bfloat16.
        size: channels in the window.
        alpha, beta, k: as in the formula.

    Returns:
        The shape of input.

    Raises:
        RuntimeError, TypeError, ValueError: as :func:`torch.nn.functional.local_response_norm` does.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(local_response_norm, (input,), input, size, alpha, beta, k)
    if _emits_aten():
        return _torch_local_response_norm(input, size, alpha, beta, k)
    refusal = _arguments.tensor_refusal("local_response_norm", "input", input)
    width = _arguments.integer(size)
    if refusal is None:
        if input.dim() < 3 or input.numel() == 0:
            refusal = f"input has shape {tuple(input.shape)}, expected (N, C, *) with at least 3 dimensions, none empty"
        elif width is None or width < 1:
            refusal = f"size is {size!r}, expected an integer of at least 1"
        elif any(isinstance(value, Tensor) for value in (alpha, beta, k)):
            refusal = "alpha, beta and k include a tensor, expected numbers: their gradients have no kernel"
    if refusal is not None:
        return _by_torch(  # type: ignore[no-any-return]
            "local_response_norm", _torch_local_response_norm, refusal, input, size, alpha, beta, k
        )
    if input.element_size() == 2 and (input.dim() >= 4 or input.is_cuda) and _autocast(input) is not None:
        # torch's steps have one that autocast runs in float32: avg_pool3d of planes, and on CUDA pow.
        input = input.float()
    if input.dim() == 4:
        return _norm.local_response_norm(input, width, float(alpha), float(beta), float(k))
    # Only the channels are looked across: any further dimensions are one plane.
    planes = input.flatten(2)[..., None]
    return _norm.local_response_norm(planes, width, float(alpha), float(beta), float(k)).view(input.shape)


def _emits_aten() -> bool:
    """True while a graph for other runtimes is exported: it must hold torch's own operators."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return bool(torch._C._is_tracing() and torch.onnx.is_in_onnx_export())


def _autocast(input: Any) -> torch.dtype | None:
    """The dtype that autocast wants convolutions in on input's device, or None."""
    if not isinstance(input, Tensor):
        return None
    device = input.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _lower(tensor: Any, dtype: torch.dtype) -> Any:
    # As autocast does: float64 is left alone, and so is what is not floating point.
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def _is_absent(stride: Any) -> bool:
    # torch takes an empty list for "as the kernel".
    return stride is None or (isinstance(stride, (list, tuple)) and len(stride) == 0)


def _adaptive_size(output_size: Any, input_size: Any) -> tuple[int, int] | None:
    if isinstance(output_size, (list, tuple)) and len(output_size) == 2:
        output_size = tuple(
            own if wanted is None else wanted for wanted, own in zip(output_size, input_size, strict=True)
        )
    elif output_size is None:
        output_size = tuple(input_size)
    return pair(output_size)


class _Interception(threading.local):
    """What this thread does instead of counting a call that goes to torch (:func:`fastconv.backends.intercepted`)."""

    handle: Callable[[str, str | None, tuple[Any, ...], Callable[[], Any]], Any] | None = None


interception = _Interception()


def _by_torch(name: str, function: Callable[..., Any], refusal: str | None, *arguments: Any) -> Any:
    """Lets torch compute what no kernel serves, or raise; its error then also says what fastconv expected."""
    if torch.compiler.is_compiling():
        return function(*arguments)
    if interception.handle is not None:
        return interception.handle(name, refusal, arguments, lambda: _run_by_torch(name, function, refusal, arguments))
    result = _run_by_torch(name, function, refusal, arguments)
    torch_calls[name] += 1
    return result


def _run_by_torch(name: str, function: Callable[..., Any], refusal: str | None, arguments: tuple[Any, ...]) -> Any:
    try:
        return function(*arguments)
    except TORCH_ERRORS as error:
        if type(error) not in TORCH_ERRORS:
            raise
        raise type(error)(f"{error}\nfastconv.{name}: {refusal}") from None
