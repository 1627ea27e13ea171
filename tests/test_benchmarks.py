"""The benchmarks' layer list, by the lecture's numbers; and that the benchmarks run and measure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not here", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from benchmarks import fma_peak, goals, layers, measure, network_report, networks, peers, picture, report  # noqa: E402
from benchmarks.layers import NETWORKS, Conv, Pool, distinct  # noqa: E402
from benchmarks.network_report import CONVERTED, EVAL, FUSED, MemoryRow, NetworkRow  # noqa: E402


def conv_flops(network):
    return sum(layer.flops() for layer in NETWORKS[network]() if isinstance(layer, Conv))


def test_counts():
    assert sum(len(walk()) for walk in NETWORKS.values()) == 504
    assert len(distinct(Conv)) == 79
    assert len(distinct(Pool)) == 14
    assert len(layers.convolutions(depthwise=True)) + len(layers.convolutions(depthwise=False)) == 79
    assert Counter(layer.family for layer in distinct(Conv)) == {
        "1x1": 31, "3x3": 15, "depthwise": 10, "3x3 stride 2": 6, "1x1 stride 2": 6, "stem": 5, "5x5": 3, "grouped": 3,
    }  # fmt: skip
    assert {layer.family for layer in distinct(Conv)} == set(layers.CONV_FAMILIES)
    assert {layer.family for layer in distinct(Pool)} == set(layers.POOL_FAMILIES)


def test_alexnets_table():
    table = [
        (96, 11, 4, 2, 55, 211),
        (256, 5, 1, 2, 27, 896),
        (384, 3, 1, 1, 13, 299),
        (384, 3, 1, 1, 13, 448),
        (256, 3, 1, 1, 13, 299),
    ]
    convolutions = [layer for layer in NETWORKS["alexnet"]() if isinstance(layer, Conv)]
    found = [(c.filters, c.kernel, c.stride, c.padding, c.out_size, c.flops() / 1e6) for c in convolutions]
    assert [row[:-1] for row in found] == [row[:-1] for row in table]
    assert [row[-1] for row in found] == pytest.approx(
        [row[-1] for row in table], abs=1
    )  # the lecture cuts decimals off
    assert [pool.out_size for pool in NETWORKS["alexnet"]() if isinstance(pool, Pool)] == [27, 13, 6]
    halves = [layer.groups for layer in NETWORKS["alexnet-2gpu"]() if isinstance(layer, Conv)]
    assert halves == [1, 2, 1, 2, 2]


def test_resnet18s_shares():
    convolutions = [layer for layer in NETWORKS["resnet18"]() if isinstance(layer, Conv)]
    assert round(convolutions[0].flops() / 1e6) == 236
    by_width = {
        width: [layer for layer in convolutions[1:] if layer.filters == width and layer.kernel == 3]
        for width in (64, 128, 256, 512)
    }
    assert sum(layer.flops() for layer in by_width[64]) / 1e9 == pytest.approx(0.9, abs=0.05)
    for width in (128, 256, 512):
        strided, *others = by_width[width]
        assert strided.stride == 2
        assert round(strided.flops() / 1e6) in (115, 116)
        assert sum(layer.flops() for layer in others) / 1e9 == pytest.approx(0.7, abs=0.05)


@pytest.mark.parametrize(
    ("network", "gflops", "tolerance"),
    [
        ("vgg16", 30.7, 0.1),
        ("resnet18", 3.6, 0.05),
        ("resnet34", 7.3, 0.1),
        ("resnet101", 15.6, 0.1),  # the lecture's 14.5 has the bottleneck's stride in its first 1x1
        ("mobilenet_v2", 0.6, 0.01),
    ],
)
def test_networks_flops(network, gflops, tolerance):
    assert conv_flops(network) / 1e9 == pytest.approx(gflops, abs=tolerance)


@pytest.mark.parametrize("layer", [*distinct(Conv), *distinct(Pool)], ids=str)
def test_shapes_are_torchs(layer):
    x = torch.empty(2, layer.channels, layer.size, layer.size, device="meta")
    if isinstance(layer, Conv):
        weight = torch.empty(layer.weight_shape, device="meta")
        y = torch.nn.functional.conv2d(x, weight, None, layer.stride, layer.padding, 1, layer.groups)
        assert layer.elements(2) == x.numel() + weight.numel() + y.numel()
        assert layer.flops(2) == 2 * y.numel() * weight[0].numel()
    else:
        y = torch.nn.functional.max_pool2d(x, layer.kernel, layer.stride, layer.padding)
        assert layer.elements(2) == x.numel() + y.numel()
    assert layer.input_shape(2) == tuple(x.shape)
    assert layer.output_shape(2) == tuple(y.shape)


def test_representative_layers_cover_every_family():
    for everything in (layers.convolutions(depthwise=False), layers.convolutions(depthwise=True), layers.pools()):
        for count in (1, 2, 3):
            chosen = layers.representative(everything, count)
            assert {layer.family for layer in chosen} == {layer.family for layer in everything}
            assert len(set(chosen)) == len(chosen)
            assert max(Counter(layer.family for layer in chosen).values()) <= count


class FakeBenchmark:
    """pedantic() as pytest-benchmark has it."""

    def pedantic(self, target, setup, rounds, iterations):
        assert iterations == 1
        for _ in range(rounds):
            setup()
            target()


def test_the_two_sides_take_turns():
    calls = []
    clock = SimpleNamespace(seconds=lambda call: call())
    turns = measure.take_turns(
        FakeBenchmark(), clock, lambda: calls.append("ours") or 2e-3, lambda: calls.append("theirs") or 4e-3, 0.06
    )
    measured = calls[2 * measure.PILOT_ROUNDS :]
    assert measured == ["theirs", "ours"] * 10
    assert turns.ratio == 0.5
    assert turns.spread == (0.5, 0.5)


def test_disagreement_is_noticed():
    reference = torch.randn(100, dtype=torch.float32)
    measure.require_agreement(reference + 1e-6, reference, terms=9)
    for wrong in (reference + 1e-3, torch.full_like(reference, torch.nan), reference[:99], reference.double()):
        with pytest.raises(AssertionError):
            measure.require_agreement(wrong, reference, terms=9)


def test_summary_has_geometric_means():
    case = report.Case("conv2d", "1x1", "", "forward", "nchw", 1, 10, 10)
    rows = [report.Row(case, "tiled", ratio, ratio, ratio, 0.5, 0.5, ratio, 1.0, 5) for ratio in (0.5, 2.0, 8.0)]
    ((title, headings, cells),) = report.summary_tables(rows)
    assert title == "batch 1"
    assert dict(zip(headings, cells[0], strict=True))["forward nchw"] == "2.00"
    assert "forward nhwc" not in headings
    assert "geometric mean 2.00" in report.totals(rows)
    assert "3.50" in report.totals(rows)


def convolution_row(layer, ratio, seconds=1e-3, layout="nchw", direction="forward", batch=1):
    case = report.Case("conv2d", layer.family, str(layer), direction, layout, batch, layer.flops(batch), 1000)
    return report.Row(case, "tiled", ratio, ratio, ratio, 0.5, 0.5, seconds, seconds / ratio, 5)


def goal_lines(rows=(), whole=(), memory=(), ceilings=None):
    _, headings, cells = goals.table(rows, whole, memory, ceilings)
    return {line[0]: dict(zip(headings, line, strict=True)) for line in cells}


def test_goals_are_told_met_or_missed():
    small = next(layer for layer in distinct(Conv) if layer.family == "1x1" and layer.channels < goals.PEAK_CHANNELS)
    wide = next(layer for layer in distinct(Conv) if layer.family == "3x3" and layer.channels >= goals.PEAK_CHANNELS)
    lines = goal_lines([convolution_row(small, 0.25), convolution_row(wide, 1.25)])
    line = lines["convolutions, batch 1, NCHW"]
    assert (line["of"], line["geometric mean"], line["lowest"], line["at"]) == ("2", "1.79", "0.80", str(wide))
    assert line["verdict"] == "missed"
    assert goal_lines([convolution_row(wide, 0.3)])["convolutions, batch 1, NCHW"]["verdict"] == "met"
    assert set(lines) == {"convolutions, batch 1, NCHW"}  # what was not measured has no line
    ceilings = measure.Ceilings(1e12, 1e10, fma_per_second=wide.flops() / 1e-3 * 2)
    lines = goal_lines([convolution_row(small, 0.25), convolution_row(wide, 1.25)], ceilings=ceilings)
    (peak,) = (line for what, line in lines.items() if what.startswith("share of the FMA peak"))
    assert (peak["of"], peak["lowest"], peak["verdict"]) == ("1", "0.50", "missed")


def test_forward_and_backward_is_the_sum_of_three_passes():
    layer = distinct(Conv).copy().popitem()[0]
    rows = [
        convolution_row(layer, ratio, seconds, direction=direction, batch=8)
        for direction, ratio, seconds in zip(report.DIRECTIONS, (0.5, 0.5, 2), (1, 1, 4), strict=True)
    ]
    assert goal_lines(rows)["forward and backward, batch 8, NCHW"]["lowest"] == "1.00"
    assert goal_lines(rows[:2]) == {}


def network_row(**times):
    missing = {name: "not installed" for name in peers.COMPILERS if name not in times}
    return NetworkRow("ResNet-18", EVAL, 16, {name: [1.0, value, 9.0] for name, value in times.items()}, missing)


def test_networks_are_compared_with_the_best_peer():
    row = network_row(**{peers.EAGER: 6.0, "openvino": 3.0, "onnxruntime": 2.5, CONVERTED: 4.0, FUSED: 2.0})
    assert row.best_peer == "onnxruntime"
    assert row.fused_ratio == 1.25
    assert row.ratio(peers.EAGER, CONVERTED) == 1.5
    lines = goal_lines(whole=[row], memory=[MemoryRow("AlexNet", 16, {"torch": 100, CONVERTED: 110, FUSED: 50})])
    assert lines["networks, best of three / fused"]["verdict"] == "met"
    assert lines["networks, eager NCHW / converted"]["verdict"] == "missed"
    assert lines["eval forward, torch's peak memory / ours fused"]["lowest"] == "2.00"
    ((_, headings, (cells,)),) = network_report.tables([row], [])
    shown = dict(zip(headings, cells, strict=True))
    assert (shown["inductor"], shown["openvino"], shown["best / fused"]) == ("not installed", "1.50", "1.25")


def test_a_network_without_peers_has_a_row():
    row = network_row(**{peers.EAGER: 6.0, CONVERTED: 4.0, FUSED: 2.0})
    assert row.best_peer is None
    assert "networks, best of three / fused" not in goal_lines(whole=[row])
    ((_, headings, (cells,)),) = network_report.tables([row], [])
    assert dict(zip(headings, cells, strict=True))["best of three"] == ""


def test_an_absent_peer_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(peers.Missing, match="not installed"):
        peers.PEERS["openvino"](torch.nn.ReLU(), torch.zeros(1), tmp_path)
    assert peers.versions()["openvino"] == "not installed"


@pytest.mark.parametrize("network", networks.NETWORKS)
def test_networks_have_the_lectures_layers(network):
    with torch.device("meta"):
        model = networks.NETWORKS[network]().eval()
        found = Counter()

        def note(module, inputs, _):
            shape = (*inputs[0].shape[1:3], module.kernel_size, module.stride, module.padding)
            found[(*shape, getattr(module, "out_channels", 0), getattr(module, "groups", 0))] += 1

        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(note)
        assert model(torch.empty(1, *networks.IMAGE)).shape == (1, networks.CLASSES)
    walk = NETWORKS[network.lower().replace("-v", "_v").replace("-", "")]()
    assert found == Counter(
        (c.channels, c.size, (c.kernel,) * 2, (c.stride,) * 2, (c.padding,) * 2, c.filters, c.groups)
        for c in walk
        if isinstance(c, Conv)
    )


def test_calls_of_a_round_take_turns():
    calls = []
    contestants = {name: lambda name=name: calls.append(name) for name in ("a", "b", "c")}
    times = measure.take_rounds(FakeBenchmark(), contestants, 0, min_rounds=5)
    warming, turn = 3 * 3, ["a", "a", "b", "b", "c", "c"]
    assert calls[warming:] == turn * 5
    assert {name: len(taken) for name, taken in times.items()} == {"a": 5, "b": 5, "c": 5}


def test_the_fma_peak_is_measured_beside_the_other_ceilings():
    if fma_peak.flops_per_second(1, 4, 0.01) is None:
        pytest.skip("no compiler")
    found = measure.measure_ceilings(torch.device("cpu"), torch.float32, 0.05)
    # How large it is depends on who else uses the machine: benchmarks say it.
    assert found.fma_per_second > 1e8
    assert found.flops_per_second > 1e8


def test_a_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [convolution_row(layer, 0.5) for layer in list(distinct(Conv))[:5]]
    ceilings = measure.Ceilings(1e12, 1e10)
    path = tmp_path / "new" / "cpu.png"
    assert picture.draw(path, "machine", rows, ceilings) == path
    assert path.read_bytes().startswith(b"\x89PNG")
    assert picture.draw(tmp_path / "none.png", "machine", [], ceilings) is None


def run_benchmarks(*arguments):
    # pytest-benchmark switches itself off where it believes to be a worker of pytest-xdist.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "-p", "no:cacheprovider", "-q", *arguments],
        cwd=ROOT,
        env={**outside, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_benchmark_runs_and_saves_ratios(tmp_path):
    table = tmp_path / "results" / "cpu.md"
    result = run_benchmarks("--benchmark-only", "--quick", "-k", "5x5 and b1", "--save-table", str(table))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Geometric means, batch 1" in result.stdout
    saved = json.loads(table.with_suffix(".json").read_text())
    assert saved["torch"] == torch.__version__
    assert {(row["direction"], row["layout"]) for row in saved["rows"]} == {
        (direction, layout) for direction in report.DIRECTIONS for layout in report.LAYOUTS
    }
    for row in saved["rows"]:
        assert row["ratio"] > 0
        assert row["kernel"] in ("tiled", "rows")  # as the selection has it on this machine
        assert not any("seconds" in name for name in row)
    assert "| 5x5 |" in table.read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said_plainly():
    result = run_benchmarks("--benchmark-only", "--device", "cuda")
    assert result.returncode != 0
    assert "torch finds no CUDA device" in result.stderr + result.stdout
