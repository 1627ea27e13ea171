"""The problems of csrc/common/problem.h, as launchers of emulated kernels take them."""

from __future__ import annotations

import ctypes
import enum

import torch


class DType(enum.IntEnum):
    float32, float64, float16, bfloat16 = range(4)


class Layout(enum.IntEnum):
    nchw, nhwc = range(2)


def _dtype_and_layout(tensor: torch.Tensor) -> tuple[int, int]:
    dtype = DType[str(tensor.dtype).removeprefix("torch.")]
    contiguous = tensor.is_contiguous()
    if not contiguous and not tensor.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"a tensor of strides {tensor.stride()}, expected a dense one; call .contiguous()")
    return dtype, Layout.nchw if contiguous else Layout.nhwc


class Size2(ctypes.Structure):
    _fields_ = [("h", ctypes.c_int64), ("w", ctypes.c_int64)]


class Pad4(ctypes.Structure):
    _fields_ = [(side, ctypes.c_int64) for side in ("top", "left", "bottom", "right")]


class ConvProblem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in "nchwkrs"),
        ("stride", Size2),
        ("dilation", Size2),
        ("padding", Pad4),
        ("groups", ctypes.c_int64),
        ("layout", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("weight_is_nchw", ctypes.c_bool),
    ]

    @classmethod
    def of(
        cls,
        x: torch.Tensor,
        weight: torch.Tensor,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int, int, int] = (0, 0, 0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
    ) -> ConvProblem:
        """Of an input (N, C, H, W), a weight (K, C / groups, R, S) and padding (top, left, bottom, right)."""
        dtype, layout = _dtype_and_layout(x)
        k, _, r, s = weight.shape
        return cls(*x.shape, k, r, s, Size2(*stride), Size2(*dilation), Pad4(*padding), groups, layout, dtype)


class PoolProblem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in "nchwrs"),
        ("stride", Size2),
        ("dilation", Size2),
        ("padding", Size2),
        ("ceil_mode", ctypes.c_bool),
        ("layout", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    ]

    @classmethod
    def of(
        cls,
        x: torch.Tensor,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        ceil_mode: bool = False,
    ) -> PoolProblem:
        dtype, layout = _dtype_and_layout(x)
        return cls(*x.shape, *kernel, Size2(*stride), Size2(*dilation), Size2(*padding), ceil_mode, layout, dtype)
