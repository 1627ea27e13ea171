"""Convolution, batch normalisation, residual and activation as one kernel; and the blocks that are built from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary, has_torch_function_variadic

from fastconv import _arguments, _eager, functional
from fastconv._library import torch_calls
from fastconv._packed import KeepsPacked, PackedWeight
from fastconv.layers import Conv2d
from fastconv.ops import conv2d_fused as _conv2d_fused
from fastconv.ops.conv2d import output_size, per_channel

__all__ = ["ConvBNReLU2d", "DepthwiseSeparableConv2d", "FusedConv2d", "fused_conv2d"]

_ACTIVATION_LAYERS: dict[str, type[nn.Module]] = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "tanh": nn.Tanh,
}
_ACTIVATION_FUNCTIONS: dict[str, Any] = {"relu": torch.relu, "relu6": nn.functional.relu6, "tanh": torch.tanh}
_ACTIVATION_NAMES = {layer: name for name, layer in _ACTIVATION_LAYERS.items()}
_Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
_Geometry = tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int], int]
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def fused_conv2d(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    activation: str = "none",
) -> Tensor:
    """``activation(scale * conv2d(input, weight) + shift + residual)`` in one pass over the output.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, float64, float16 or bfloat16.
        weight: (K, C / groups, R, S), of input's dtype.
        scale, shift: (K) or None, of any floating-point dtype; float32 loses nothing.
        residual: None, or what is added before the activation; in the kernel if it has the output's shape and dtype,
            otherwise afterwards, with broadcasting.
        stride, dilation: rows, columns.
        padding: zeros at the top, left, bottom and right.
        groups: as in :func:`fastconv.functional.conv2d`.
        activation: ``"none"``, ``"relu"``, ``"relu6"`` or ``"tanh"``.

    Returns:
        (N, K, P, Q), channels_last if input or weight is.

    Raises:
        ValueError: for another activation.
        RuntimeError, TypeError: as :func:`torch.nn.functional.conv2d` does.
    """
    operands, geometry = (input, weight, scale, shift, residual), (stride, padding, dilation, groups)
    return _fused_conv2d(operands, geometry, activation, None)


def _fused_conv2d(operands: _Operands, geometry: _Geometry, activation: str, packed: PackedWeight | None) -> Tensor:
    if has_torch_function_variadic(*operands):
        result: Tensor = handle_torch_function(fused_conv2d, operands, *operands, *geometry, activation)
        return result
    input, weight, scale, shift, residual = operands
    stride, padding, dilation, groups = geometry
    code = _conv2d_fused.activation_code(activation)
    quick = _eager.conv2d_fused(*operands, stride, padding, dilation, groups, code, packed)
    if quick is not None:
        return quick
    cast = functional._autocast(input)
    if cast is not None:
        input, weight = functional._lower(input, cast), functional._lower(weight, cast)
    refusal = _arguments.conv2d_refusal(input, weight, None, stride, padding, dilation, groups)
    if refusal is None:
        refusal = _arguments.slow_on_cuda(input, weight, stride, dilation, groups, None)
    if refusal is not None or functional._emits_aten():
        return _by_torch(refusal, input, weight, scale, shift, residual, stride, padding, dilation, groups, activation)
    batched = input if input.dim() == 4 else input[None]
    added = _kernel_residual(batched, weight, residual, stride, padding, dilation)
    late = residual is not None and added is None
    result = _conv2d_fused.conv2d_fused(
        batched, weight, scale, shift, added, stride, padding, dilation, groups, "none" if late else activation
    )
    if input.dim() == 3:
        result = result[0]
    return _finish(result, residual, activation) if late else result


def _kernel_residual(
    input: Tensor, weight: Tensor, residual: Any, stride: Any, padding: Any, dilation: Any
) -> Tensor | None:
    """``residual`` if the kernel can add it, with input's dimensions."""
    if not isinstance(residual, Tensor) or residual.dtype != input.dtype or residual.device != input.device:
        return None
    size = output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    shape = (weight.shape[0], *size)
    if residual.dim() == 3 and input.shape[0] == 1 and residual.shape == shape:
        return residual[None]
    return residual if residual.shape == (input.shape[0], *shape) else None


def _finish(result: Tensor, residual: Any, activation: str) -> Tensor:
    if residual is not None:
        result = result + residual
    return result if activation == "none" else _ACTIVATION_FUNCTIONS[activation](result)


def _by_torch(
    refusal: str | None,
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Any,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
    activation: str,
) -> Tensor:
    """The definition in torch's operations: for exported graphs, and for what no kernel serves (``refusal`` is set)."""
    top, left, bottom, right = padding
    sides: tuple[int, int] = (top, left)
    if (top, left) != (bottom, right):
        input, sides = nn.functional.pad(input, (left, right, top, bottom)), (0, 0)
    bias = shift.to(weight.dtype) if scale is None and shift is not None else None
    try:
        result = functional._torch_conv2d(input, weight, bias, stride, sides, dilation, groups)
    except RuntimeError as error:
        if refusal is None or type(error) is not RuntimeError:
            raise
        raise RuntimeError(f"{error}\nfastconv.fused_conv2d: {refusal}") from None
    counted = functional.interception.handle is None and not torch.compiler.is_compiling()
    if refusal is not None and counted:
        torch_calls["conv2d_fused"] += 1
    if scale is not None:
        dtype = result.dtype
        result = result * per_channel(scale) + (0 if shift is None else per_channel(shift))
        result = result.to(dtype)
    return _finish(result, residual, activation)


def activation_name(layer: nn.Module) -> str | None:
    """The name of what ``layer`` computes, or None if the kernels do not compute it."""
    return _ACTIVATION_NAMES.get(type(layer))


def has_hooks(module: nn.Module) -> bool:
    """True if someone watches the calls of ``module`` itself, or has replaced its forward."""
    watchers = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(watchers) or "forward" in module.__dict__ or "_conv_forward" in module.__dict__


def fold_batch_norm(norm: Any, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What ``norm`` does to ``x + bias`` in eval, as ``scale * x + shift``: (K), float32 or wider, differentiable."""
    dtype = torch.promote_types(norm.running_mean.dtype, torch.float32)
    scale = torch.rsqrt(norm.running_var.to(dtype) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.to(dtype)
    mean = norm.running_mean.to(dtype)
    if bias is not None:
        mean = mean - bias.to(dtype)
    if norm.bias is None:
        return scale, -mean * scale
    return scale, torch.addcmul(norm.bias.to(dtype), mean, scale, value=-1)


def four_sides(conv: nn.Conv2d) -> tuple[int, int, int, int]:
    """The padding of ``conv`` as (top, left, bottom, right)."""
    if isinstance(conv.padding, str):
        left, right, top, bottom = conv._reversed_padding_repeated_twice
        return top, left, bottom, right
    rows, columns = _pair(conv.padding)
    return rows, columns, rows, columns


def _pair(value: Any) -> tuple[int, int]:
    rows, columns = value
    return rows, columns


def _make_conv(*arguments: Any, **options: Any) -> nn.Module:
    # torch's annotations are narrower than what its constructor takes.
    return Conv2d(*arguments, **options)


def _pad(input: Tensor, padding: tuple[int, int, int, int], mode: str) -> Tensor:
    top, left, bottom, right = padding
    return nn.functional.pad(input, (left, right, top, bottom), mode=mode)


class ConvBNReLU2d(nn.Module):
    """Convolution without bias, batch normalisation, activation.

    In training these are three operations. In eval they are one kernel, which takes the normalisation as a scale and a
    shift that are computed from the running statistics at every call: nothing is cached, so nothing can be stale.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode: of the convolution.
        eps, momentum: of the normalisation.
        activation: ``"relu"``, ``"relu6"``, ``"tanh"`` or ``"none"``.

    Shape:
        (N, in_channels, H, W) -> (N, out_channels, P, Q), as :class:`torch.nn.Conv2d`.

    Raises:
        ValueError: for another activation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        *,
        padding_mode: str = "zeros",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        activation: str = "relu",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _conv2d_fused.activation_code(activation)
        where: dict[str, Any] = {"bias": False, "padding_mode": padding_mode, "device": device, "dtype": dtype}
        shape = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        self.conv: nn.Module = _make_conv(*shape, **where)
        self.bn: nn.Module = nn.BatchNorm2d(out_channels, eps, momentum, device=device, dtype=dtype)
        self.activation: nn.Module = _ACTIVATION_LAYERS[activation]()

    def forward(self, input: Tensor) -> Tensor:
        if self._separately(input):
            result: Tensor = self.activation(self.bn(self.conv(input)))
            return result
        conv: Any = self.conv
        padding = four_sides(conv)
        if conv.padding_mode != "zeros":
            input, padding = _pad(input, padding, conv.padding_mode), (0, 0, 0, 0)
        scale, shift = fold_batch_norm(self.bn, conv.bias)
        geometry = (conv.stride, padding, conv.dilation, conv.groups)
        return fused_conv2d(input, conv.weight, scale, shift, None, *geometry, _ACTIVATION_NAMES[type(self.activation)])

    def _separately(self, input: Tensor) -> bool:
        """True if the three layers must be called: batch statistics, replaced or watched layers, tracing, export."""
        conv, norm, activation = self.conv, self.bn, self.activation
        return (
            norm.training
            or not isinstance(conv, Conv2d)
            or type(conv)._conv_forward is not Conv2d._conv_forward
            or type(conv).forward is not nn.Conv2d.forward
            or not isinstance(norm, BATCH_NORMS)
            or type(norm) not in BATCH_NORMS
            or norm.running_mean is None
            or norm.running_var is None
            or type(activation) not in _ACTIVATION_NAMES
            or has_hooks(conv)
            or has_hooks(norm)
            or has_hooks(activation)
            or nn.modules.module._has_any_global_hook()
            or has_torch_function_unary(input)
            or input.dim() != 4
            or functional._emits_aten()
        )


class FusedConv2d(KeepsPacked):
    """A convolution for inference, with batch normalisation folded into its weight: what :func:`fastconv.fuse` puts in.

    ``activation(conv2d(input, weight) + bias + residual)``. Weight and bias are buffers: no optimizer sees them, while
    gradients still pass through to the input. Bias is float32, for a float64 weight float64.

    Args:
        weight: (K, C / groups, R, S).
        bias: (K) or None.
        stride, dilation: rows, columns.
        padding: top, left, bottom, right.
        groups, padding_mode: as in :class:`torch.nn.Conv2d`.
        activation: ``"none"``, ``"relu"``, ``"relu6"`` or ``"tanh"``.

    Shape:
        input (N, C, H, W) or (C, H, W); residual broadcastable to the output; output (N, K, P, Q) or (K, P, Q).

    Raises:
        ValueError: for another activation.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int, int, int] = (0, 0, 0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        padding_mode: str = "zeros",
        activation: str = "none",
    ) -> None:
        super().__init__()
        _conv2d_fused.activation_code(activation)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.padding_mode, self.activation = padding_mode, activation
        self.packed = None
        self.eval()

    @classmethod
    def from_layers(cls, conv: nn.Conv2d, norm: nn.Module | None = None, activation: str = "none") -> FusedConv2d:
        """Folds ``norm``, as it acts in eval, into a copy of the weight of ``conv``, in float32 or wider."""
        with torch.no_grad():
            weight, bias = conv.weight.detach(), conv.bias
            wide = torch.promote_types(weight.dtype, torch.float32)
            if norm is not None:
                scale, bias = fold_batch_norm(norm, bias)
                # Rounded once, to the weight's dtype; the product takes the weight's memory format.
                weight = (weight.to(wide) * scale.reshape(-1, 1, 1, 1)).to(weight.dtype)
            else:
                weight = weight.clone()
            bias = None if bias is None else bias.detach().to(wide, copy=True)
        stride, dilation = _pair(conv.stride), _pair(conv.dilation)
        return cls(weight, bias, stride, four_sides(conv), dilation, conv.groups, conv.padding_mode, activation)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = _pad(input, padding, self.padding_mode), (0, 0, 0, 0)
        geometry = (self.stride, padding, self.dilation, self.groups)
        return _fused_conv2d((input, self.weight, None, self.bias, residual), geometry, self.activation, self.packed)

    def extra_repr(self) -> str:
        filters, depth, *kernel = self.weight.shape
        parts = [f"{depth * self.groups}, {filters}, kernel_size={tuple(kernel)}, stride={self.stride}"]
        parts += [f"padding={self.padding}"] if any(self.padding) else []
        parts += [f"dilation={self.dilation}"] if self.dilation != (1, 1) else []
        parts += [f"groups={self.groups}"] if self.groups != 1 else []
        parts += ["bias=False"] if self.bias is None else []
        parts += [f"padding_mode={self.padding_mode}"] if self.padding_mode != "zeros" else []
        return ", ".join([*parts, f"activation={self.activation}"])


class DepthwiseSeparableConv2d(nn.Module):
    """A depthwise convolution, which looks across the plane, then a pointwise one, which looks across the channels.

    For 3x3 kernels and C channels in and out about 8 to 9 times fewer operations than a dense convolution: 18 C + 2 C^2
    for 18 C^2 per pixel. There is no non-linearity between the two, so only the pointwise one has a bias.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, padding_mode: as in :class:`torch.nn.Conv2d`.
        padding: of the depthwise convolution; None keeps the size at stride 1 for odd kernels.
        bias: of the pointwise convolution.

    Shape:
        (N, in_channels, H, W) -> (N, out_channels, P, Q), as :class:`torch.nn.Conv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] | None = None,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if padding is None:
            kernels, dilations = _arguments.pair(kernel_size) or (1, 1), _arguments.pair(dilation) or (1, 1)
            padding = (dilations[0] * (kernels[0] - 1) // 2, dilations[1] * (kernels[1] - 1) // 2)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        window = (kernel_size, stride, padding, dilation)
        options = {"groups": in_channels, "bias": False, "padding_mode": padding_mode}
        self.depthwise: nn.Module = _make_conv(in_channels, in_channels, *window, **options, **where)
        self.pointwise: nn.Module = Conv2d(in_channels, out_channels, 1, bias=bias, **where)

    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = self.pointwise(self.depthwise(input))
        return result
