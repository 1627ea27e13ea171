"""LeNet-5 as a whole: inference, and one step of training."""

from __future__ import annotations

import pytest
import torch

from benchmarks.report import WHOLE_STEP, Case
from fastconv.models import LeNet5

BATCHES = (1, 64)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("what", ["inference", "training step"])
def test_lenet5(what, batch, measured, device, dtype):
    ours, theirs = LeNet5(), LeNet5(layers=torch.nn)
    theirs.load_state_dict(ours.state_dict())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 1, 32, 32, generator=generator).to(device, dtype)
    target = torch.randint(10, (batch,), generator=generator).to(device)

    def step(model: torch.nn.Module) -> torch.Tensor:
        model.zero_grad()
        loss = torch.nn.functional.cross_entropy(-model(x), target)
        loss.backward()
        return loss

    def inference(model: torch.nn.Module) -> torch.Tensor:
        return model(x)  # type: ignore[no-any-return]

    call = inference if what == "inference" else step
    pair = [model.to(device, dtype) for model in (ours, theirs)]
    case = Case("lenet5", what, "LeNet-5 at 32", "forward" if what == "inference" else WHOLE_STEP, "nchw", batch, 0, 0)
    measured(case, lambda: call(pair[0]), lambda: call(pair[1]), 400, autograd=what != "inference")
