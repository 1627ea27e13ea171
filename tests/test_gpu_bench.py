"""benchmarks/gpu_bench.py on the CPU, by a clock that says what it is told: what it measures, and what it says of the
rest."""

from __future__ import annotations

import json
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not here", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from benchmarks import cases, gpu_bench, layers, measure  # noqa: E402
from benchmarks.gpu_bench import Bench, Series  # noqa: E402
from benchmarks.layers import Conv, Pool  # noqa: E402

CPU = torch.device("cpu")
CEILINGS = {"float32": measure.Ceilings(flops_per_second=1e12, bytes_per_second=1e11)}
CONV = Series("conv2d", Conv(8, 9, 6, 3, padding=1), "forward", "nchw", "float32")
POOL = Series("pool", Pool("max", 4, 9, 3, 2), "input_grad", "nhwc", "float32")


class Clock:
    """An image costs ``ours`` seconds in a call that reaches fastconv and ``theirs`` in another."""

    def __init__(self, ours: float, theirs: float) -> None:
        self.ours, self.theirs = ours, theirs

    def seconds(self, call: measure.Call) -> float:
        ours = measure.kernel_of(call) != ""
        return len(call()) * (self.ours if ours else self.theirs)


def bench(clock: measure.Clock, *, deadline: float = 1e9, now=lambda: 0.0, saved=None) -> Bench:
    return Bench(CPU, clock, CEILINGS, deadline, saved.append if saved is not None else lambda _: None, now)


STEMS = [layer for layer in layers.convolutions(depthwise=False) if layer.family == "stem"]
NORM = gpu_bench.Series("norm", layers.NORMS[1], "input_grad", "nhwc", "float32")


def test_normalisation_and_fused_convolutions_have_rows():
    fused = gpu_bench.Series("conv2d_fused", layers.convolutions(depthwise=True)[-1], "forward", "nchw", "float32")
    results = bench(Clock(1e-4, 2e-4)).run(iter([NORM, fused]))
    assert results.missing == []
    assert [row.kernel for _, row in results.rows] == ["rows", "rows", "depthwise", "depthwise"]


def test_every_layer_is_measured_in_every_direction_and_layout():
    everything = list(gpu_bench.every_series(["float16"]))
    assert len(set(everything)) == len(everything)
    counts = Counter(series.op for series in everything)
    assert counts == {
        "conv2d": 6 * len(layers.convolutions(depthwise=False)),
        "depthwise": 6 * len(layers.convolutions(depthwise=True)),
        "conv2d_fused": 2 * len([*layers.convolutions(depthwise=True), *STEMS]),
        "pool": 4 * len(layers.pools()),
        "norm": 4 * len(layers.NORMS),
    }
    assert [series.op for series in everything[:1]] == ["pool"]
    assert len(list(gpu_bench.every_series(["float16", "float32"]))) == 2 * len(everything)


def test_batches_are_halved_until_a_call_is_quick_enough():
    assert gpu_bench.affordable(128, 0.0) == 128
    assert gpu_bench.affordable(128, 0.001, limit=0.128) == 128
    assert gpu_bench.affordable(128, 0.001, limit=0.1) == 64
    assert gpu_bench.affordable(128, 10.0, limit=0.1) == 1


@pytest.mark.parametrize("series", [CONV, POOL], ids=["conv2d", "pool"])
def test_rows_have_ratio_kernel_and_share_of_the_roofline(series):
    results = bench(Clock(1e-4, 2e-4)).run(iter([series]))
    assert results.missing == []
    assert [row.case.batch for _, row in results.rows] == [1, 128]
    for _, row in results.rows:
        assert row.ratio == pytest.approx(0.5)
        assert row.kernel in ("tiled", "rows")
        assert row.our_share == pytest.approx(2 * row.torch_share)
        floor = max(row.case.flops / 1e12, row.case.bytes / 1e11)
        assert row.our_share == pytest.approx(floor / (row.case.batch * 1e-4))
        assert row.note == ""


def test_a_slow_kernel_is_measured_at_a_smaller_batch_and_marked():
    results = bench(Clock(0.03, 1e-4)).run(iter([CONV]))
    (_, first), (_, second) = results.rows
    assert (first.case.batch, first.note) == (1, "")
    assert second.case.batch == 2
    assert second.note == "measured at batch 2 in place of 128, a call would be too slow"
    assert second.case.flops == 2 * first.case.flops
    assert second.note in gpu_bench.markdown(results)
    assert gpu_bench.document(results)["rows"][1]["note"] == second.note


def test_when_the_time_is_up_the_rest_is_listed():
    times = iter([0.0, 1.0, 2.0, *[200.0] * 100])
    results = bench(Clock(1e-4, 1e-4), deadline=100, now=lambda: next(times)).run(iter([CONV, POOL]))
    assert len(results.rows) == 2
    assert [(entry.series, entry.batch) for entry in results.missing] == [(POOL, 1), (POOL, 128)]
    assert {entry.reason for entry in results.missing} == {gpu_bench.OUT_OF_TIME}
    assert f"| float32 | pool | 128 | {gpu_bench.OUT_OF_TIME} | 1 |" in gpu_bench.markdown(results)


def test_a_wrong_result_is_listed_and_not_timed(monkeypatch):
    right = cases.convolution

    def wrong(*arguments):
        pair = right(*arguments)
        return cases.Pair(pair.case, pair.ours, lambda: pair.theirs() + 1, pair.terms)

    monkeypatch.setattr(cases, "convolution", wrong)
    results = bench(Clock(1e-4, 1e-4)).run(iter([CONV, POOL]))
    assert [row.case.op for _, row in results.rows] == ["pool", "pool"]
    assert len(results.missing) == 2
    assert all("fastconv and torch differ by" in entry.reason for entry in results.missing)
    [entry, _] = gpu_bench.document(results)["missing"]
    assert (entry["op"], entry["layer"], entry["family"], entry["batch"]) == ("conv2d", str(CONV.layer), "3x3", 1)


def test_a_call_that_went_to_torch_is_no_result_of_ours(monkeypatch):
    monkeypatch.setattr(measure, "kernel_of", lambda call: "torch/conv2d")
    results = bench(Clock(1, 1)).run(iter([CONV]))
    assert results.rows == []
    assert "no kernel of ours ran (torch/conv2d)" in results.missing[0].reason


def test_nothing_runs_in_a_broken_cuda_context(monkeypatch):
    def fails(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nlonger text")

    monkeypatch.setattr(cases, "convolution", fails)
    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    subject = bench(Clock(1, 1))
    subject.device = torch.device("cuda")
    results = subject.run(iter([CONV, POOL]))
    first, *others = [entry.reason for entry in results.missing]
    assert first == "CUDA error: an illegal memory access was encountered"
    assert others == [f"the CUDA context broke before: {first}"] * 3


def test_results_are_saved_on_the_way_and_whole(tmp_path):
    saved = []
    clock = iter(range(0, 10000, 20))
    bench(Clock(1e-4, 1e-4), now=lambda: float(next(clock)), saved=saved).run(iter([CONV, POOL]))
    assert len(saved) == 3  # after each, and at the end
    gpu_bench.save(tmp_path, saved[-1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.md"]
    assert len(json.loads((tmp_path / "bench.json").read_text())["rows"]) == 4
    text = (tmp_path / "bench.md").read_text()
    assert "### Geometric means, batch 128" in text
    assert "| 3x3 | 8->6 3x3 at 9 | forward | nchw | 128 | 1.00 |" in text


@pytest.fixture
def device_log(monkeypatch):
    """The calls that reach torch.cuda, which here only writes them down."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("synchronize")

        def elapsed_time(self, end):
            return 5.0  # milliseconds

    class Graph:
        def replay(self):
            log.append("replay")

    @contextmanager
    def noted(name):
        log.append(f"{name} begins")
        yield
        log.append(f"{name} ends")

    side, main = (SimpleNamespace(wait_stream=lambda other: None) for _ in range(2))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: noted("warm-up"))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: noted("capture"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=100 << 20))
    return log


def test_the_cache_is_flushed_before_the_time_begins(device_log):
    clock = measure.CudaClock(CPU)
    assert clock.flush.numel() == 400 << 20  # larger than the cache
    clock.flush = SimpleNamespace(zero_=lambda: device_log.append("flush"))
    assert clock.seconds(lambda: device_log.append("call")) == 5e-3
    assert device_log == ["flush", "record", "call", "record", "synchronize"]


def test_a_graph_is_captured_after_a_warm_up_and_then_only_replayed(device_log):
    replay = measure.replayed(lambda: device_log.append("call") or "result")
    warm_up = ["warm-up begins", *["call"] * measure.PILOT_ROUNDS, "warm-up ends"]
    assert device_log == [*warm_up, "capture begins", "call", "capture ends"]
    device_log.clear()
    assert replay() == "result"
    assert device_log == ["replay"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_cuda_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_bench", "--out", str(tmp_path)])
    assert gpu_bench.main() == 1
    assert "CUDA" in capsys.readouterr().err
