"""The fastest kernel by measurement: torch.backends.cudnn.benchmark on CUDA tensors, fastconv.tuning."""

from __future__ import annotations

import pytest
import torch
from cuda_device import DEVICE, WHERE, cuda_kernels
from torch.utils.flop_counter import FlopCounterMode

import fastconv
from fastconv import functional
from fastconv.backends import can_run
from fastconv.stats import stats

pytestmark = cuda_kernels


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    fastconv.tuning.clear()
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    yield
    fastconv.tuning.clear()


def test_benchmark_mode_times_every_kernel_once(tuned, monkeypatch):
    slow = {"stem": 1.0, "implicit_gemm_fp32": 4.0, "direct": 3.0}
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
    assert [timed.count(algo) for algo in slow] == [4, 4, 4]
    slow["stem"] = 9.0  # another problem, another winner
    functional.conv2d(x, weight, padding=1)
    timed.clear()
    for padding, winner in ((0, "stem"), (1, "direct")):
        fastconv.reset_stats()
        functional.conv2d(x, weight, padding=padding)
        assert stats() == {f"{WHERE}/conv2d/{winner}": 1}
    assert not timed, "known problems are not timed again"
    assert sorted(fastconv.tuning.winners().values()) == ["direct", "stem"]


def test_tf32_wins_only_where_torch_allows_it(tuned, monkeypatch):
    def seconds(run, tensor):
        fastconv.reset_stats()
        run()
        [kernel] = stats()
        return 1.0 if kernel.endswith("tf32") else 2.0

    monkeypatch.setattr(fastconv.tuning, "_seconds", seconds)
    x, weight = torch.randn(1, 3, 8, 8).to(DEVICE), torch.randn(4, 3, 3, 3).to(DEVICE)
    for allowed, winner in ((False, "stem"), (True, "implicit_gemm_tf32"), (False, "stem")):
        torch.backends.cudnn.allow_tf32 = allowed
        fastconv.tuning.clear()
        functional.conv2d(x, weight)
        assert list(fastconv.tuning.winners().values()) == [winner]
    torch.backends.cudnn.allow_tf32 = True
    fastconv.tuning.clear()
    functional.conv2d(x, weight)
    torch.backends.cudnn.allow_tf32 = False
    fastconv.reset_stats()
    functional.conv2d(x, weight)
    assert list(stats())[-1] == f"{WHERE}/conv2d/stem", "a winner of looser settings"


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


def test_nothing_is_timed_without_data_or_under_a_mode(tuned):
    """explain and can_run look on fakes, whose times say nothing; a mode would see the timing runs as calls."""
    x, weight = torch.randn(1, 3, 8, 8).to(DEVICE), torch.randn(4, 3, 3, 3).to(DEVICE)
    can_run("conv2d", x, weight)
    report = fastconv.explain(lambda t: functional.conv2d(t, weight), (1, 3, 8, 8), device=DEVICE, quiet=True)
    assert report.kernels == {f"{WHERE}/conv2d/stem": 1}
    with FlopCounterMode(display=False) as counter:
        functional.conv2d(x, weight)
    assert counter.get_total_flops() == 2 * 4 * 27 * 36
    assert fastconv.tuning.winners() == {}
    functional.conv2d(x, weight)
    assert len(fastconv.tuning.winners()) == 1


def test_a_call_survives_that_winners_are_forgotten_meanwhile(tuned, monkeypatch):
    class Forgetful(dict):
        def __setitem__(self, key, value):
            """clear() of another thread, right after."""

    monkeypatch.setattr(fastconv.tuning, "_winners", Forgetful())
    functional.conv2d(torch.randn(1, 3, 8, 8).to(DEVICE), torch.randn(4, 3, 3, 3).to(DEVICE))
    assert fastconv.tuning.winners() == {}
