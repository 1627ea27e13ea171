"""Arguments of torch.nn.functional's signatures, normalised; and the reason why a call cannot be served.

A refusal is a sentence that says what was got, what is wanted and the remedy. ``None`` means that a kernel serves the
call.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastconv._library import cuda_problem, device_problem, runs_cuda_kernels
from fastconv.ops._autograd import suggested_format

DTYPES = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})
DEVICES = frozenset({"cpu", "meta"} if cuda_problem else {"cpu", "meta", "cuda"})


def pair(value: Any) -> tuple[Any, Any] | None:
    """One number, or a sequence of one or two, as two; None if it is neither."""
    if type(value) is tuple and len(value) == 2 and type(value[0]) is int and type(value[1]) is int:
        return value
    number = integer(value)
    if number is not None:
        return number, number
    if isinstance(value, Sequence) and not isinstance(value, str) and 1 <= len(value) <= 2:
        numbers = [integer(item) for item in value]
        if None not in numbers:
            return numbers[0], numbers[-1]
    return None


def integer(value: Any) -> Any:
    """``value`` as an int if it is one of any kind (numpy's too) and of 64 bits, as a SymInt if it is that; else None.

    A bool is no integer here, and neither is a tensor.
    """
    if type(value) is int:
        return value if -(2**63) <= value < 2**63 else None
    if isinstance(value, torch.SymInt):
        return value
    if isinstance(value, (bool, Tensor)) or not hasattr(type(value), "__index__"):
        return None
    try:
        return integer(operator.index(value))
    except TypeError:
        return None  # numpy's bool has the method, and it raises


def tensor_refusal(function: str, name: str, tensor: Any) -> str | None:
    """Why ``tensor`` is nothing that the kernels can read."""
    if not isinstance(tensor, Tensor):
        return f"{name} is {type(tensor).__name__}, expected a Tensor"
    if tensor.dtype not in DTYPES:
        return (
            f"{name} is {tensor.dtype}, {function} has kernels for float32, float64, float16 and bfloat16; "
            "convert it with .to()"
        )
    if tensor.is_nested:
        return f"{name} is a nested tensor, expected a strided one; call torch.nested.to_padded_tensor"
    if tensor.layout is not torch.strided:
        return f"{name} has layout {tensor.layout}, expected torch.strided; call .to_dense() first"
    if tensor.device.type not in DEVICES:
        reason = f"; there are none for CUDA: {cuda_problem}" if tensor.is_cuda else ""
        where = "the CPU" if cuda_problem else "the CPU and CUDA"
        return f"{name} is on {tensor.device}, {function} has kernels for {where}; move it with .cpu(){reason}"
    if tensor.is_cuda and (problem := device_problem(tensor.device)) is not None:
        return f"{name} is on {tensor.device}: {problem}"
    if tensor.dtype == torch.float64 and runs_cuda_kernels(tensor):
        return f"{name} is torch.float64, the CUDA kernels compute in float32; convert it with .float()"
    return None


def flag_refusal(**flags: Any) -> str | None:
    """Why one of these is no flag that torch would take."""
    for name, flag in flags.items():
        if type(flag) is not bool:
            return f"{name} is {flag!r}, expected True or False"
    return None


def same_padding(kernel: Sequence[int], dilation: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) to keep the size at stride 1; an odd total puts one more at the end, as in torch."""
    rows, columns = dilation[0] * (kernel[0] - 1), dilation[1] * (kernel[1] - 1)
    return rows // 2, columns // 2, rows - rows // 2, columns - columns // 2


def conv2d_padding(padding: Any, kernel: Sequence[int], stride: Any, dilation: Any) -> Any:
    """``padding`` as (top, left, bottom, right), or a refusal."""
    if type(padding) is str:
        if padding == "valid":
            return 0, 0, 0, 0
        if padding == "same":
            if stride != (1, 1):
                return f"padding is 'same' and stride {stride}, expected stride 1; give the padding as numbers"
            return same_padding(kernel, dilation)
        return f"padding is {padding!r}, expected 'same', 'valid' or numbers"
    both = pair(padding)
    if both is None:
        return f"padding is {padding!r}, expected one or two integers, 'same' or 'valid'"
    if both[0] < 0 or both[1] < 0:
        return f"padding is {both}, expected no negative number; crop the input instead"
    return both[0], both[1], both[0], both[1]


def conv2d_refusal(
    input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any
) -> str | None:
    """Why no kernel serves this convolution; arguments as conv2d normalised them (padding may be a refusal already)."""
    reason = tensor_refusal("conv2d", "input", input) or tensor_refusal("conv2d", "weight", weight)
    if reason is None and bias is not None:
        reason = tensor_refusal("conv2d", "bias", bias)
    if reason is not None:
        return reason
    if input.dtype != weight.dtype or (bias is not None and bias.dtype != input.dtype):
        found = f"{input.dtype} and {weight.dtype}" + ("" if bias is None else f" and {bias.dtype}")
        return f"input, weight (and bias) are {found}, expected one dtype; convert, or use torch.autocast"
    if input.device != weight.device or (bias is not None and bias.device != input.device):
        return f"input is on {input.device} and weight on {weight.device}, expected one device; move one with .to()"
    if weight.dim() != 4 or input.dim() not in (3, 4):
        return (
            f"input has shape {tuple(input.shape)} and weight {tuple(weight.shape)}, expected (N, C, H, W) or "
            "(C, H, W) and (K, C / groups, R, S)"
        )
    if stride is None or dilation is None or min(stride) < 1 or min(dilation) < 1:
        return f"stride is {stride} and dilation {dilation}, expected integers of at least 1"
    if isinstance(padding, str):
        return padding
    if groups is None or groups < 1:
        return f"groups is {groups}, expected an integer of at least 1"
    if not torch.compiler.is_compiling() and torch._C._is_tracing():
        return None  # torch.jit.trace: sizes are tensors, and comparing them would bake them in; the op checks them
    return _conv2d_shape_refusal(input, weight, bias, padding, dilation, groups)


def slow_on_cuda(
    input: Tensor, weight: Tensor, stride: Any, dilation: Any, groups: int, algo: str | None
) -> str | None:
    """Why cuDNN should have a convolution that the CUDA kernels could compute."""
    if not input.is_cuda or algo is not None:
        return None
    if not only_general_kernels_serve(weight.shape, stride, dilation, groups, input.dtype):
        return None
    return (
        "of the CUDA kernels only those for any convolution serve this one, and they have not been timed beside cuDNN; "
        'pass algo="implicit_gemm_fp32" or "implicit_gemm_3xtf32" (float32 alone) or "direct" (the plain reference) '
        "to run one"
    )


def only_general_kernels_serve(
    weight_shape: Sequence[int], stride: Any, dilation: Any, groups: int, dtype: torch.dtype
) -> bool:
    """True if csrc/conv2d/cuda_select.h chooses direct or implicit_gemm_fp32, whatever the size of the images.

    The size of the images is left out, and the native library is not asked, because ``torch.compile`` goes through
    here: it would have to fix the sizes, and break the graph at the question.
    """
    filters, depth, rows, columns = weight_shape
    fewest, most = min(depth, filters // groups), max(depth, filters // groups)
    fills_tiles = most >= 4 and (groups == 1 or fewest >= 16)
    if dtype in (torch.float16, torch.bfloat16) and fills_tiles and max(rows, columns) <= 15:
        return False  # implicit_gemm_mma, which takes larger windows in channels_last alone
    if max(dilation) > 1:
        return True
    stem = groups == 1 and depth <= 4 and max(rows, columns) <= 11 and max(stride) <= 4
    window = rows == columns and rows in (3, 5, 7) and stride[0] == stride[1] <= 2
    depthwise = window and groups > 1 and depth == 1 and filters == groups
    return not (stem or depthwise)


def _conv2d_shape_refusal(
    input: Tensor, weight: Tensor, bias: Tensor | None, padding: Any, dilation: Any, groups: int
) -> str | None:
    channels, rows, columns = input.shape[-3:]
    filters, depth, kernel_rows, kernel_columns = weight.shape
    if depth * groups != channels:
        return (
            f"weight.size(1) is {depth} and input has {channels} channels, expected weight.size(1) == "
            f"in_channels / groups with groups = {groups}; check groups and the input's channels"
        )
    if filters % groups != 0 or filters == 0:
        return f"weight.size(0) is {filters}, expected a positive multiple of groups = {groups}"
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != filters):
        return f"bias has shape {tuple(bias.shape)}, expected ({filters},), one number per output channel"
    if depth == 0 or kernel_rows == 0 or kernel_columns == 0:
        return f"weight has shape {tuple(weight.shape)}, expected no empty dimension"
    if (
        rows + padding[0] + padding[2] < dilation[0] * (kernel_rows - 1) + 1
        or columns + padding[1] + padding[3] < dilation[1] * (kernel_columns - 1) + 1
    ):
        return (
            f"the kernel {kernel_rows} x {kernel_columns} with dilation {dilation} is larger than the padded input, "
            f"{rows + padding[0] + padding[2]} x {columns + padding[1] + padding[3]}; pad more or use a smaller kernel"
        )
    if rows == 0 or columns == 0:
        return f"input has shape {tuple(input.shape)}, expected no empty H or W"
    return None


def pool_refusal(
    function: str, input: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: Any
) -> str | None:
    """Why no kernel serves this pooling window; arguments as normalised by the caller."""
    reason = tensor_refusal(function, "input", input)
    if reason is not None:
        return reason
    if input.dim() not in (3, 4) or 0 in input.shape[-3:]:
        return f"input has shape {tuple(input.shape)}, expected (N, C, H, W) or (C, H, W) with no empty C, H or W"
    for name, value, least in (
        ("kernel_size", kernel, 1),
        ("stride", stride, 1),
        ("dilation", dilation, 1),
        ("padding", padding, 0),
    ):
        if value is None or min(value) < least:
            return f"{name} is {value}, expected one or two integers of at least {least}"
    if padding[0] * 2 > kernel[0] or padding[1] * 2 > kernel[1]:
        return f"padding is {padding}, expected at most half of kernel_size {kernel}"
    for axis in (0, 1):
        size = input.shape[axis - 2] + 2 * padding[axis]
        if size + (stride[axis] - 1 if ceil_mode else 0) < dilation[axis] * (kernel[axis] - 1) + 1:
            return (
                f"the window {kernel} with dilation {dilation} is larger than the padded input, {size} along "
                f"{'HW'[axis]}; pad more or use a smaller window"
            )
    return _cuda_pool_refusal(function, input, kernel, max(*kernel, *dilation))


def _cuda_pool_refusal(function: str, input: Tensor, kernel: Any, largest: Any) -> str | None:
    """Why the CUDA pooling kernels, which number the elements of a plane (in channels_last of an image) in 32 bits, do
    not serve these sizes. Strides beyond the input do not matter, and padding is at most half of the window."""
    if not runs_cuda_kernels(input):
        return None
    channels, rows, columns = input.shape[-3:]
    if rows * columns * (channels if suggested_format(input) == torch.channels_last else 1) >= 2**31 - 2**16:
        return f"an image is {channels} x {rows} x {columns}, too much for the CUDA kernels' counters; crop it"
    if max(rows, columns, largest) >= 2**29:
        return f"a size is {max(rows, columns, largest)}, the CUDA kernels want less than 2^29"
    if function == "avg_pool2d" and kernel[0] >= rows and kernel[1] >= columns and rows * columns >= 2**28:
        return f"a plane is {rows} x {columns}, the CUDA kernels average fewer than 2^28 elements as a whole"
    return None


def cuda_adaptive_refusal(input: Tensor, output_size: Sequence[int]) -> str | None:
    """The same for adaptive pooling, which multiplies positions by sizes."""
    if not runs_cuda_kernels(input):
        return None
    channels, rows, columns = input.shape[-3:]
    if rows * columns >= 2**28:
        return f"a plane is {rows} x {columns}, the CUDA kernels want fewer than 2^28 elements; crop it"
    if channels * max(rows, output_size[0]) * max(columns, output_size[1]) >= 2**31 - 2**16:
        return f"output_size is {tuple(output_size)}, the CUDA kernels want images of fewer than 2^31 elements"
    if max((rows + 1) * (output_size[0] + 1), (columns + 1) * (output_size[1] + 1)) >= 2**31:
        return f"output_size is {tuple(output_size)}, the CUDA kernels want its product with input's below 2^31"
    return None
