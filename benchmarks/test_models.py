"""Whole networks: LeNet-5 against torch; the larger ones against every peer, a training step, and peak memory."""

from __future__ import annotations

import copy

import pytest
import torch

import fastconv
from benchmarks import layers, memory, networks, peers
from benchmarks.layers import Conv
from benchmarks.network_report import CONVERTED, EVAL, FUSED, FUSED_LAST, TRAINING, MemoryRow, NetworkRow
from benchmarks.report import WHOLE_STEP, Case
from fastconv.models import LeNet5

BATCHES = (1, 64)
QUICK_NETWORKS = ("ResNet-18", "MobileNet-v2")
TRAINED = {"ResNet-18": 16, "MobileNet-v2": 16}
LAYERS_OF = {name: layers.NETWORKS[name.lower().replace("-v", "_v").replace("-", "")] for name in networks.NETWORKS}
ALLOWED = 1e-4  # of the result's RMS: rounding through fifty layers
# Where an activation is nearly zero, rounding decides whether a gradient passes: 0.02 of the RMS from float64's result
# to torch's own, in either's first layer.
ALLOWED_GRADIENT = 0.1


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


@pytest.fixture
def chosen(request, device, dtype):
    """chosen(network, batch) skips what this run leaves out."""
    quick = request.config.getoption("--quick")

    def choose(network: str, batch: int) -> None:
        if device.type != "cpu" or dtype != torch.float32:
            pytest.skip("whole networks are measured on the CPU in float32")
        if quick and (batch != 1 or network not in QUICK_NETWORKS):
            pytest.skip("not in the quick run")

    return choose


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("network", networks.NETWORKS)
def test_eval(network, batch, chosen, contest, record, ceilings, request, tmp_path):
    chosen(network, batch)
    model = networks.make(network).eval()
    x = torch.randn(batch, *networks.IMAGE)
    calls, missing = {}, {}
    # Not inference_mode: inductor's frozen graphs do not take tensors made in it.
    with torch.no_grad():
        for name, prepare in peers.PEERS.items():
            if name == peers.INDUCTOR and request.config.getoption("--quick"):
                missing[name] = "not in the quick run"
                continue
            try:
                calls[name] = prepare(model, x, tmp_path)
            except peers.Missing as reason:
                missing[name] = str(reason)
        converted, fused = fastconv.convert(model), fastconv.fuse(model)
        last = x.to(memory_format=torch.channels_last)
        calls |= {CONVERTED: lambda: converted(x), FUSED_LAST: lambda: fused(last), FUSED: lambda: fused(x)}
        times = contest(calls, ALLOWED)
    flops = batch * sum(layer.flops() for layer in LAYERS_OF[network]() if isinstance(layer, Conv))
    record(NetworkRow(network, EVAL, batch, times, missing, flops, ceilings.fma_per_second))


@pytest.mark.parametrize("network", TRAINED)
def test_training_step(network, chosen, contest, record, request):
    batch = 1 if request.config.getoption("--quick") else TRAINED[network]
    chosen(network, batch)
    x, target = torch.randn(batch, *networks.IMAGE), torch.randint(networks.CLASSES, (batch,))

    def trainer(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)

        def step():
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            return next(model.parameters()).grad.clone()  # it came through every layer

        return step

    model = networks.make(network)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0  # the two would draw different masks
    theirs, ours = copy.deepcopy(model), fastconv.convert(copy.deepcopy(model))
    times = contest({peers.EAGER: trainer(theirs), CONVERTED: trainer(ours)}, ALLOWED_GRADIENT)
    record(NetworkRow(network, TRAINING, batch, times))


@pytest.mark.parametrize("network", networks.NETWORKS)
def test_peak_memory(network, chosen, benchmark, record, request):
    batch = 1 if request.config.getoption("--quick") else 16
    chosen(network, batch)
    found = benchmark.pedantic(memory.measure, (network, batch), rounds=1)
    if found is None:
        pytest.skip("the system does not tell the peak of resident memory")
    record(MemoryRow(network, batch, found))
