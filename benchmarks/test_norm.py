"""AlexNet's two local response normalisations: forward without gradient, and the input gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks.cases import FORMATS
from benchmarks.report import Case
from fastconv._library import ops

OP = "norm"
DIRECTIONS = ("forward", "input_grad")
PARAMS = (5, 5e-4, 0.75, 2.0)  # the paper's; torch divides alpha by the size


@dataclass(frozen=True)
class Norm:
    channels: int
    size: int
    family: str = "lrn"

    def elements(self, batch: int = 1) -> int:
        return 2 * batch * self.channels * self.size**2

    def flops(self, batch: int = 1) -> int:
        """The squares and their sums."""
        return batch * self.channels * self.size**2 * 2 * PARAMS[0]

    def __str__(self) -> str:
        return f"lrn {self.channels} at {self.size}"


LAYERS = [Norm(96, 55), Norm(256, 27)]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_norm(layer, batch, direction, layout, measured, device, dtype):
    torch.manual_seed(0)
    place: Any = {"device": device, "dtype": dtype}
    shape = (batch, layer.channels, layer.size, layer.size)
    x = torch.randn(shape, **place).to(memory_format=FORMATS[layout])
    grad = torch.randn(shape, **place).to(memory_format=FORMATS[layout])
    moved = (layer.elements(batch) + (x.numel() if direction == "input_grad" else 0)) * x.element_size()
    case = Case(OP, layer.family, str(layer), direction, layout, batch, layer.flops(batch), moved)
    if direction == "forward":
        measured(
            case,
            lambda: ops.local_response_norm(x, *PARAMS),
            lambda: torch.nn.functional.local_response_norm(x, *PARAMS),
            PARAMS[0],
        )
        return
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = torch.nn.functional.local_response_norm(leaf, *PARAMS)
    measured(
        case,
        lambda: ops.local_response_norm_backward(grad, x, *PARAMS),
        lambda: torch.autograd.grad(y, leaf, grad, retain_graph=True)[0],
        PARAMS[0],
        autograd=True,
    )
