"""Layers: torch's own, with the forward pass on fastconv's kernels.

Each subclasses the torch layer of its name, so constructor, initialisation under a seed, repr, ``state_dict``,
pickling, parametrizations, pruning, hooks and ``isinstance`` are torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastconv import functional

__all__ = ["AdaptiveAvgPool2d", "AvgPool2d", "Conv2d", "GlobalAvgPool2d", "LocalResponseNorm", "MaxPool2d"]


class Conv2d(nn.Conv2d):
    """:class:`torch.nn.Conv2d` on fastconv's kernels; see :func:`fastconv.functional.conv2d`."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = torch.nn.functional.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        stride: Any = self.stride
        dilation: Any = self.dilation
        return functional.conv2d(input, weight, bias, stride, padding, dilation, self.groups)


class MaxPool2d(nn.MaxPool2d):
    """:class:`torch.nn.MaxPool2d` on fastconv's kernels; see :func:`fastconv.functional.max_pool2d`."""

    def forward(self, input: Tensor) -> Any:
        pool: Any = functional.max_pool2d
        window = (self.kernel_size, self.stride, self.padding, self.dilation)
        return pool(input, *window, self.ceil_mode, self.return_indices)


class AvgPool2d(nn.AvgPool2d):
    """:class:`torch.nn.AvgPool2d` on fastconv's kernels; see :func:`fastconv.functional.avg_pool2d`."""

    def forward(self, input: Tensor) -> Any:
        pool: Any = functional.avg_pool2d
        window = (self.kernel_size, self.stride, self.padding)
        return pool(input, *window, self.ceil_mode, self.count_include_pad, self.divisor_override)


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """torch's layer on fastconv's kernels; see :func:`fastconv.functional.adaptive_avg_pool2d`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(input, self.output_size)


class GlobalAvgPool2d(AdaptiveAvgPool2d):
    """Mean over the whole plane: (N, C, H, W) -> (N, C, 1, 1), the head of ResNet and MobileNet."""

    def __init__(self) -> None:
        super().__init__(1)

    def extra_repr(self) -> str:
        return ""


class LocalResponseNorm(nn.LocalResponseNorm):
    """torch's layer on fastconv's kernels; see :func:`fastconv.functional.local_response_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.local_response_norm(input, self.size, self.alpha, self.beta, self.k)
