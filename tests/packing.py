"""Fused models of one layer that keeps its weight packed, and what it keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fastconv
from fastconv.fused import FusedConv2d


def fused(channels: int = 64, filters: int = 64, kernel: int = 3, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, filters, kernel, **{"padding": kernel // 2, **options})
    return fastconv.fuse(nn.Sequential(conv, nn.BatchNorm2d(filters), nn.ReLU()).eval())


def layer_of(model: nn.Module) -> Any:
    (layer,) = (module for module in model.modules() if isinstance(module, FusedConv2d))
    return layer


def images(channels: int = 64, size: int = 28, n: int = 1, seed: int = 1) -> Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def kept(model: nn.Module) -> int:
    return int(layer_of(model).packed.bytes())
