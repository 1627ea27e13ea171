"""Where the time of a fused network goes, by kind of layer, beside onnxruntime's and openvino's own profiles.

OMP_NUM_THREADS=1 python -m benchmarks.breakdown ResNet-50 1

Shares are of our whole forward pass; ratios are the peer's time for the same layers over ours. ``rest`` is what lies
between the layers: Python, allocation. Peers' profiling costs them a little as well.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastconv
from benchmarks import fma_peak, networks, peers, report
from benchmarks.layers import Conv
from fastconv._network_plan import ADAPTIVE_AVERAGE_POOL, AVERAGE_POOL, CONVOLVE, MAX_POOL, NUMBERS, STEP

ROUNDS = 15
Times = dict[str, float]  # milliseconds of one pass, by kind


def kinds_of(model: nn.Module, x: Tensor) -> tuple[list[str], Times]:
    """The kind of each convolution in the order of the calls, and the GFLOPs of each kind."""
    kinds: list[str] = []
    work: Times = defaultdict(float)

    def note(conv: Any, inputs: Any, _: Any) -> None:
        batch, channels, size = inputs[0].shape[:3]
        window = conv.kernel_size[0], conv.stride[0], conv.padding[0]
        layer = Conv(channels, size, conv.out_channels, *window, conv.groups)
        kinds.append(layer.family)
        work[layer.family] += layer.flops(batch) / 1e9

    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, nn.Conv2d)]
    model(x)
    for handle in handles:
        handle.remove()
    return kinds, work


def ours(model: nn.Module, x: Tensor) -> Times:
    """Of the steps of the fused network's program, each as a program of its own, and of the whole pass, in turns."""
    fused: Any = fastconv.fuse(model)
    fused(x)
    (network,) = fused.__dict__["_networks"].found.values()
    (run,) = network.runs
    (plan,) = run.plans.values()
    steps = plan.program[1:].view(-1, STEP)
    programs = [torch.cat([plan.program[:1], step]) for step in steps]
    kinds = [_kind(step) for step in steps.tolist()]
    tensors = [x, *(torch.empty_strided(shape, stride) for shape, stride, _ in plan.outputs)]
    workspace = torch.empty(plan.workspace, dtype=torch.uint8)
    samples: list[list[float]] = [[] for _ in programs]
    whole: list[float] = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        fused(x)
        whole.append(time.perf_counter() - start)
        for times, program in zip(samples, programs, strict=True):
            start = time.perf_counter()
            torch.ops.fastconv.network(program, tensors, plan.constants, workspace)
            times.append(time.perf_counter() - start)
    found: Times = defaultdict(float)
    for kind, times in zip(kinds, samples, strict=True):
        found[kind] += _typical(times) * 1e3
    found["rest"] = _typical(whole) * 1e3 - sum(found.values())
    return found


def _typical(times: list[float]) -> float:
    """The lower quartile: other work on the machine only adds."""
    return statistics.quantiles(times, n=4)[0]


def _kind(step: list[int]) -> str:
    """Of a row of a program (csrc/network/network.h)."""
    if step[0] != CONVOLVE:
        return "pool" if step[0] in (MAX_POOL, AVERAGE_POOL, ADAPTIVE_AVERAGE_POOL) else "reorders"
    _, channels, size, _, filters, kernel, _, stride, _, padding = step[STEP - NUMBERS :][:10]
    if size == 1:
        return "linear"
    return Conv(channels, size, filters, kernel, stride, padding, step[STEP - NUMBERS :][15]).family


def _other_kind(operation: str) -> str:
    """Of a peer's operation that is no convolution."""
    if "Pool" in operation or "Reduce" in operation:
        return "pool"
    if "Gemm" in operation or "MatMul" in operation or "FullyConnected" in operation:
        return "linear"
    return "reorders" if "eorder" in operation else "other"


def openvino(model: nn.Module, x: Tensor, kinds: list[str], folder: Path) -> Times:
    runtime = peers._import("openvino")
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    settings |= {"PERFORMANCE_HINT": "LATENCY", "PERF_COUNT": True}
    request = runtime.Core().compile_model(peers._onnx(model, x, folder), "CPU", settings).create_infer_request()
    samples: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(ROUNDS + 1):
        request.infer([x.numpy()])
        for info in request.profiling_info:
            samples[info.node_name, info.node_type].append(info.real_time.total_seconds() * 1e3)
    # The exporter numbers the convolutions in the order of the calls.
    convolutions = sorted((key for key in samples if "Convolution" in key[1]), key=_number)
    order = dict(zip(convolutions, kinds, strict=True))
    return _summed({key: (order.get(key) or _other_kind(key[1]), times) for key, times in samples.items()})


def _number(key: tuple[str, str]) -> int:
    return int((re.findall(r"\d+", key[0].replace("conv2d", "").split("/")[0]) or ["0"])[-1])


def onnxruntime(model: nn.Module, x: Tensor, kinds: list[str], folder: Path) -> Times:
    runtime = peers._import("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    path = str(peers._onnx(model, x, folder))
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for _ in range(ROUNDS + 1):
        session.run(None, {session.get_inputs()[0].name: x.numpy()})
    samples: dict[str, tuple[str, list[float]]] = {}
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            kind = _session_kind(event["args"])
            samples.setdefault(event["name"], (kind, []))[1].append(event["dur"] / 1e3)
    return _summed(samples)


def _session_kind(facts: Any) -> str:
    if facts["op_name"] not in ("Conv", "FusedConv"):
        return _other_kind(facts["op_name"])
    (_, channels, size, _), (filters, depth, kernel, _) = (
        next(iter(s.values())) for s in facts["input_type_shape"][:2]
    )
    rows = next(iter(facts["output_type_shape"][0].values()))[2]
    return Conv(channels, size, filters, kernel, round(size / rows), kernel // 2, channels // depth).family


def _summed(samples: Mapping[Any, tuple[str, list[float]]]) -> Times:
    found: Times = defaultdict(float)
    for kind, times in samples.values():
        found[kind] += _typical(times)
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("network", choices=networks.NETWORKS)
    parser.add_argument("batch", type=int, nargs="?", default=1)
    parser.add_argument("--channels-last", action="store_true", help="of our input")
    arguments = parser.parse_args()
    model = networks.make(arguments.network).eval()
    x = torch.randn(arguments.batch, *networks.IMAGE)
    kinds, work = kinds_of(model, x)
    peak = fma_peak.flops_per_second(torch.get_num_threads(), 4, 1.0)
    layout = torch.channels_last if arguments.channels_last else torch.contiguous_format
    found = {"fused": ours(model, x.to(memory_format=layout))}
    with tempfile.TemporaryDirectory() as folder:
        for profile in (onnxruntime, openvino):
            try:
                found[profile.__name__] = profile(model, x, kinds, Path(folder))
            except peers.Missing as reason:
                print(f"{profile.__name__}: {reason}")
    mine, theirs = found.pop("fused"), found
    total = sum(mine.values())
    rows = []
    for kind in dict.fromkeys([*kinds, *mine, *(kind for times in theirs.values() for kind in times)]):
        ms = mine.get(kind, 0.0)
        share = f"{work[kind] / ms / peak * 1e12:.0%}" if peak and kind in work and ms else ""
        ratios = [f"{times[kind] / ms:.2f}" if ms and kind in times else "" for times in theirs.values()]
        shares = [f"{times.get(kind, 0) / total:.1%}" for times in theirs.values()]
        rows.append((kind, f"{ms / total:.1%}", share, *shares, *ratios))
    whole = [f"{sum(times.values()) / total:.2f}" for times in theirs.values()]
    peak_share = f"{sum(work.values()) / total / peak * 1e12:.0%}" if peak else ""
    rows.append(("all", "100%", peak_share, *["" for _ in theirs], *whole))
    headings = ("kind", "share", "of FMA peak", *(f"{n}, of ours" for n in theirs), *(f"{n} / ours" for n in theirs))
    print(f"{arguments.network}, batch {arguments.batch}, threads {torch.get_num_threads()}")
    for line in report.plain_table(headings, rows):
        print(line)


if __name__ == "__main__":
    main()
