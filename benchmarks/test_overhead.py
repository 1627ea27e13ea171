"""What a call costs when there is next to nothing to compute: a 1x1 convolution of one pixel, without gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastconv
from benchmarks.report import Case

CALLS = 200  # in one measurement: a single call is near the clock's own cost
BAR = 1.5  # of torch.nn's time; printed beside the result, not asserted, since a busy machine would fail it at random


def repeated(layer: torch.nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    def run() -> Any:
        for _ in range(CALLS):
            y = layer(x)
        return y

    return run


@pytest.mark.parametrize("case", ["conv 1x1", "conv 3x3", "max pool 2x2"])
def test_overhead(case, measured, device, dtype):
    torch.manual_seed(0)
    ours, theirs = {
        "conv 1x1": lambda: (fastconv.Conv2d(1, 1, 1), torch.nn.Conv2d(1, 1, 1)),
        "conv 3x3": lambda: (fastconv.Conv2d(4, 4, 3, padding=1), torch.nn.Conv2d(4, 4, 3, padding=1)),
        "max pool 2x2": lambda: (fastconv.MaxPool2d(2), torch.nn.MaxPool2d(2)),
    }[case]()
    ours.to(device, dtype).load_state_dict(theirs.to(device, dtype).state_dict())
    x = torch.randn(1, 4 if case == "conv 3x3" else 1, 4, 4, device=device, dtype=dtype)
    calls = repeated(ours, x), repeated(theirs, x)
    measured(Case("overhead", case, f"{CALLS} calls, bar {BAR}", "forward", "nchw", 1, 0, 0), *calls, terms=36)
