"""The arithmetic of convolutional layers: output sizes, parameters, FLOPs and receptive fields.

One multiply-add is two FLOPs; FLOPs count the output's size and leave the bias out. Sizes are numbers of pixels or
elements.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def output_size(size: int, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> int:
    """Positions of a window along one axis: ``floor((size - kernel + 2 padding) / stride) + 1``.

    A dilated kernel counts with the span it covers, ``dilation * (kernel - 1) + 1``.

    Raises:
        ValueError: the kernel is larger than the padded input.
    """
    span = dilation * (kernel - 1) + 1
    if span > size + 2 * padding:
        raise ValueError(
            f"the kernel covers {span} pixels, but the padded input has {size + 2 * padding}; "
            "use a smaller kernel or more padding"
        )
    return (size - span + 2 * padding) // stride + 1


def same_output_size(size: int, stride: int = 1) -> int:
    """Output size with "same" padding: ``floor((size - 1) / stride) + 1``."""
    return (size - 1) // stride + 1


def conv_params(in_channels: int, out_channels: int, kernel: int, *, groups: int = 1, bias: bool = True) -> int:
    """Weights and biases of a convolution with a square kernel: ``K (C / groups * k^2 + 1)``."""
    return out_channels * (in_channels // groups * kernel * kernel + int(bias))


def conv_flops(in_channels: int, out_channels: int, kernel: int, height: int, width: int, *, groups: int = 1) -> int:
    """FLOPs of a convolution with a square kernel whose *output* has ``height x width`` pixels."""
    return 2 * out_channels * height * width * (in_channels // groups * kernel * kernel)


def linear_params(inputs: int, outputs: int, *, bias: bool = True) -> int:
    """Weights and biases of a fully connected layer."""
    return outputs * (inputs + int(bias))


def linear_flops(inputs: int, outputs: int) -> int:
    """FLOPs of a fully connected layer for one sample."""
    return 2 * inputs * outputs


def receptive_field(layers: Iterable[tuple[int, int]]) -> int:
    """Input pixels along one axis that one output pixel sees, through ``(kernel, stride)`` layers in order.

    ``r += (kernel - 1) * jump; jump *= stride``, from ``r = jump = 1``.
    """
    field, jump = 1, 1
    for kernel, stride in layers:
        field += (kernel - 1) * jump
        jump *= stride
    return field


@dataclass(frozen=True)
class LayerCost:
    """One call of one layer. ``flops`` are for the whole batch; pooling, norms and activations count none."""

    name: str
    kind: str
    output_shape: tuple[int, ...]
    params: int
    flops: int


@dataclass(frozen=True)
class ModelCost:
    """A model's layers in the order in which they finished, and its totals."""

    layers: tuple[LayerCost, ...]
    params: int

    @property
    def flops(self) -> int:
        return sum(layer.flops for layer in self.layers)

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [5])
        lines = [f"{'layer':{width}}  {'kind':20}{'output':>20}{'params':>14}{'MFLOPs':>12}"]
        for layer in self.layers:
            shape = "x".join(str(size) for size in layer.output_shape)
            lines.append(
                f"{layer.name:{width}}  {layer.kind:20}{shape:>20}{layer.params:>14,}{layer.flops / 1e6:>12,.2f}"
            )
        lines.append(f"{'total':{width}}  {'':40}{self.params:>14,}{self.flops / 1e6:>12,.2f}")
        return "\n".join(lines)


def analyse(model: nn.Module, input_shape: Sequence[int]) -> ModelCost:
    """Runs the model once on zeros of ``input_shape`` (batch first) and counts every layer.

    A layer is a module with no modules inside, or with parameters of its own. Parameters are those that an optimizer
    would get: a weight that a parametrization masks counts in full, and so do its FLOPs.
    """
    costs: list[LayerCost] = []

    def watch(name: str, layer: nn.Module) -> Any:
        def record(module: nn.Module, _: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                kind = type(module).__name__.removeprefix("Parametrized")
                costs.append(LayerCost(name, kind, tuple(output.shape), _own_params(module), _flops(module, output)))

        return layer.register_forward_hook(record)

    first = next(model.parameters(), None)
    zeros = torch.zeros(*input_shape) if first is None else first.new_zeros(*input_shape)
    modes = {module: module.training for module in model.modules()}
    handles = [
        watch(name, layer)
        for name, layer in model.named_modules()
        if "parametrizations" not in name.split(".") and _is_layer(layer)
    ]
    try:
        # BatchNorm must neither learn from the zeros nor refuse a batch of one.
        model.eval()
        with torch.no_grad():
            model(zeros)
    finally:
        for module, training in modes.items():
            module.training = training
        for handle in handles:
            handle.remove()
    return ModelCost(tuple(costs), sum(parameter.numel() for parameter in model.parameters()))


def _own_params(layer: nn.Module) -> int:
    own = sum(parameter.numel() for parameter in layer.parameters(recurse=False))
    # A parametrized weight moves into a child of this name.
    parametrizations = getattr(layer, "parametrizations", None)
    if isinstance(parametrizations, nn.ModuleDict):
        own += sum(parameter.numel() for parameter in parametrizations.parameters())
    return own


def _is_layer(module: nn.Module) -> bool:
    inside = [name for name, _ in module.named_children() if name != "parametrizations"]
    return not inside or _own_params(module) > 0


def _flops(module: nn.Module, output: Tensor) -> int:
    if isinstance(module, nn.Conv2d):
        per_output = module.in_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
        return 2 * output.numel() * per_output
    if isinstance(module, nn.Linear):
        return 2 * output.numel() * module.in_features
    return 0
