"""The kernel behind one call of an operator of this package, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastconv import _C
from fastconv._library import EMULATED, runs_cuda_kernels
from fastconv.ops._autograd import suggested_format

_CONV_PASSES = {
    "conv2d": "forward",
    "conv2d_fused": "forward",
    "conv2d_input_grad": "input_grad",
    "conv2d_weight_grad": "weight_grad",
}
_WINDOW_OPS = frozenset({
    "max_pool2d", "max_pool2d_with_offsets", "max_pool2d_indices", "max_pool2d_gather", "max_pool2d_backward",
    "avg_pool2d", "avg_pool2d_backward",
})  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """The kernel that serves a call, and on what condition; why others do not; what it costs."""

    kernel: str
    flops: int
    tile: str | None = None
    refused: dict[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    condition: str | None = None


def plan_of(func: Any, args: Sequence[Any], result: Any) -> Plan | None:
    """The plan of ``torch.ops.fastconv.<func>(*args)``; None for operators that are no kernels."""
    op = func._schema.name.split("::")[-1]
    named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
    tensor = next((value for value in args if isinstance(value, Tensor)), None)
    if tensor is None:
        return None
    device = "cuda" if runs_cuda_kernels(tensor) else "cpu"
    if op in _CONV_PASSES:
        plan = _conv_plan(op, named, device)
    elif op in _WINDOW_OPS:
        plan = _window_plan(op, named, device)
    elif op.startswith("adaptive_avg_pool2d"):
        plan = _adaptive_plan(op, named, result, device)
    else:
        kernels = [name for name in _C.kernel_names(device) if name.split("/")[0] == op]
        if not kernels:
            return None
        plan = Plan(kernels[0], 0)
    return replace(plan, kernel=kernel_key(device, plan.kernel))


def kernel_key(device: str, kernel: str) -> str:
    """A device's kernel as :func:`fastconv.stats` names it: ``"<op>/<algo>"`` on the CPU, with a prefix for CUDA's."""
    if device == "cpu":
        return kernel
    return f"{'emulated' if EMULATED else 'cuda'}/{kernel}"


def _conv_plan(op: str, named: dict[str, Any], device: str) -> Plan:
    if op == "conv2d_input_grad":
        operands = named["grad_output"], named["weight"]
        channels = named["weight"].shape[1] * named["groups"]
        input_shape = (named["grad_output"].shape[0], channels, *named["input_size"])
        weight_shape = tuple(named["weight"].shape)
    elif op == "conv2d_weight_grad":
        operands = named["grad_output"], named["input"]
        input_shape = tuple(named["input"].shape)
        depth = named["input"].shape[1] // named["groups"]
        weight_shape = (named["grad_output"].shape[1], depth, *named["kernel_size"])
    else:
        operands = named["input"], named["weight"]
        input_shape, weight_shape = tuple(named["input"].shape), tuple(named["weight"].shape)
    plan = _C.plan_conv2d(
        input_shape,
        weight_shape,
        stride=named["stride"],
        padding=named["padding"],
        dilation=named["dilation"],
        groups=named["groups"],
        channels_last=suggested_format(*operands) == torch.channels_last,
        dtype=_dtype_name(operands[0]),
        pass_name=_CONV_PASSES[op],
        device=device,
        algo=named.get("algo"),
    )
    others = tuple(name for name in plan["able"] if name != plan["algo"])
    return Plan(plan["kernel"], plan["flops"], _tile_text(plan["tile"]), plan["refused"], others, plan["condition"])


def _tile_text(tile: Any) -> str | None:
    return None if tile is None else f"{tile['rows']} {tile['rows_are']} x {tile['columns']} {tile['columns_are']}"


def _window_plan(op: str, named: dict[str, Any], device: str) -> Plan:
    # Backward operators know the input's plane by its size only.
    tensor: Tensor = next(named[name] for name in ("input", "grad_output", "offsets") if name in named)
    plane = named["input"].shape[2:] if "input" in named else named["input_size"]
    plan = _C.plan_pool(
        op,
        (*tensor.shape[:2], *plane),
        kernel=named["kernel"],
        stride=named["stride"],
        padding=named["padding"],
        dilation=named.get("dilation", (1, 1)),
        ceil_mode=named.get("ceil_mode", False),
        divisor_override=named.get("divisor_override") is not None,
        dtype=_dtype_name(tensor) if tensor.is_floating_point() else "float32",
        device=device,
    )
    return Plan(plan["kernel"], plan["flops"])


def _adaptive_plan(op: str, named: dict[str, Any], result: Tensor, device: str) -> Plan:
    backward = op.endswith("_backward")
    cells = named["grad_output"].shape[2:] if backward else result.shape[2:]
    whole = result if backward else named["input"]
    # One addition for each element of the larger side.
    windows = "windows" if device == "cuda" else "rows"
    return Plan(f"{op}/{'global' if tuple(cells) == (1, 1) else windows}", whole.numel())


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
