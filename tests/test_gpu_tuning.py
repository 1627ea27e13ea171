"""The fastest kernel by measurement: torch.backends.cudnn.benchmark on CUDA tensors, fastconv.tuning."""

from __future__ import annotations

import pytest
import torch
from cuda_device import DEVICE, WHERE, cuda_kernels

import fastconv
from fastconv import functional
from fastconv.stats import stats

pytestmark = cuda_kernels


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    fastconv.tuning.clear()
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    yield
    fastconv.tuning.clear()


def test_benchmark_mode_times_every_kernel_once(tuned, monkeypatch):
    slow = {"stem": 1.0, "direct": 3.0}
    timed = []

    def seconds(run, tensor):
        fastconv.reset_stats()
        run()
        [kernel] = stats()
        timed.append(kernel.split("/")[-1])
        return slow[timed[-1]]

    monkeypatch.setattr(fastconv.tuning, "_seconds", seconds)
    x, weight = torch.randn(1, 3, 8, 8).to(DEVICE), torch.randn(4, 3, 3, 3).to(DEVICE)
    functional.conv2d(x, weight)
    assert timed.count("stem") == timed.count("direct") == 4
    slow["stem"] = 9.0  # another problem, another winner
    functional.conv2d(x, weight, padding=1)
    timed.clear()
    for padding, winner in ((0, "stem"), (1, "direct")):
        fastconv.reset_stats()
        functional.conv2d(x, weight, padding=padding)
        assert stats() == {f"{WHERE}/conv2d/{winner}": 1}
    assert not timed, "known problems are not timed again"
    assert sorted(fastconv.tuning.winners().values()) == ["direct", "stem"]


def test_gradients_are_tuned(tuned):
    layer = fastconv.Conv2d(8, 8, 3, groups=8).to(DEVICE)
    layer(torch.randn(1, 8, 6, 6).to(DEVICE).requires_grad_()).sum().backward()
    passes = {key.split("; ")[1] for key in fastconv.tuning.winners()}
    assert passes == {"conv2d", "conv2d_input_grad", "conv2d_weight_grad"}


def test_winners_can_be_shipped(tuned, tmp_path, monkeypatch):
    x, weight = torch.randn(1, 3, 8, 8).to(DEVICE), torch.randn(4, 3, 3, 3).to(DEVICE)
    functional.conv2d(x, weight)
    [key] = fastconv.tuning.winners()
    path = tmp_path / "winners.json"
    for algo, expected in (("direct", "direct"), ("of another release", "stem")):
        monkeypatch.setattr(fastconv.tuning, "_winners", {key: algo})
        fastconv.tuning.save(path)
        monkeypatch.setattr(fastconv.tuning, "_winners", {})
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
        fastconv.tuning.load(path)
        fastconv.reset_stats()
        functional.conv2d(x, weight)
        assert stats() == {f"{WHERE}/conv2d/{expected}": 1}
    path.write_text('{"something": "else"}')
    with pytest.raises(ValueError, match="no table of winners"):
        fastconv.tuning.load(path)
