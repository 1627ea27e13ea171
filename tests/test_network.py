"""Fused models as native programs: the same results as layer by layer, and when the layers must run instead."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastconv
from fastconv import _C
from fastconv._network import FusedGraph, Network
from fastconv._network_plan import NOTHING
from fastconv.stats import reset_stats, stats

pytestmark = [
    pytest.mark.sanitize,
    pytest.mark.skipif(fastconv._library.EMULATED, reason="of the CPU's own kernels"),
]
FORMATS = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])


class Block(nn.Module):
    """A residual block with a projection: two values live at once."""

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, filters, 3, stride, 1, bias=False), nn.BatchNorm2d(filters)
        self.conv2, self.bn2 = nn.Conv2d(filters, filters, 3, 1, 1, bias=False), nn.BatchNorm2d(filters)
        self.skip = nn.Sequential(nn.Conv2d(channels, filters, 1, stride), nn.BatchNorm2d(filters))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.skip(x))


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU6(), nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
        *(Block(16, 32, 2), nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.AvgPool2d(2)),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 40), nn.ReLU(), nn.Dropout(), nn.Linear(40, 7)),
    ).eval()


def backbone() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), Block(16, 24, 2)).eval()


def images(n: int = 2, size: int = 45, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def network_of(model: Any) -> Network:
    """The network that served the last call."""
    assert isinstance(model, FusedGraph)
    (network,) = model.__dict__["_networks"].found.values()
    assert isinstance(network, Network)
    return network


def planned(model: Any) -> list[bool]:
    return [plan is not None for run in network_of(model).runs for plan in run.plans.values()]


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [small, backbone])
@torch.no_grad()
def test_a_program_gives_what_the_layers_give(make, dtype, memory_format, poisoned):
    model = fastconv.fuse(make().to(dtype).to(memory_format=memory_format))
    x = images(dtype=dtype).to(memory_format=memory_format)
    expected = model.forward(x)
    reset_stats()
    for _ in range(2):
        found = model(x)
        scale = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.03)
        torch.testing.assert_close(found, expected, rtol=scale, atol=scale)
        assert found.stride() == expected.stride()
        assert found.dtype == dtype
    assert planned(model) == [True]
    assert len(network_of(model).runs) == 1
    counts = stats()
    assert not any(key.startswith("torch/") for key in counts)
    assert sum(count for key, count in counts.items() if key.startswith("conv2d/")) >= 2 * (7 if make is small else 4)


@torch.inference_mode()
def test_fused_in_inference_mode():
    model, x = fastconv.fuse(small()), images()
    torch.testing.assert_close(model(x), model.forward(x), rtol=1e-5, atol=1e-5)
    assert planned(model) == [True]
    torch.testing.assert_close(model(x), model.forward(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_every_kind_of_input_has_its_program():
    model = fastconv.fuse(backbone())
    for n, size in ((1, 32), (3, 32), (2, 51)):
        x = images(n, size)
        torch.testing.assert_close(model(x), model.forward(x), rtol=1e-5, atol=1e-5)
        last = x.to(memory_format=torch.channels_last)
        assert model(last).is_contiguous(memory_format=torch.channels_last)
    apart = images(4, 64)[::2, :, ::2, 1::2]
    torch.testing.assert_close(model(apart), model.forward(apart), rtol=1e-5, atol=1e-5)
    assert planned(model) == [True] * 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_images_outside_winograds_condition(dtype):
    """They are computed from the weight itself, in the layout that it came in."""
    torch.manual_seed(0)
    model = fastconv.fuse(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()).eval().to(dtype))
    x = torch.randn(2, 64, 28, 28).to(dtype)
    x[1, :, 9, 9] = 6e4
    reset_stats()
    found = model(x)
    pairs = dtype == torch.bfloat16 and _C.active_isa() == "avx512_bf16"
    others = "conv2d/pairs" if pairs else "conv2d/tiled"
    assert {key for key in stats() if key.startswith("conv2d")} == {"conv2d/winograd", others}
    rtol, atol = (1e-5, 1e-2) if dtype == torch.float32 else (2**-7, 2**-5)
    torch.testing.assert_close(found, model.get_submodule("0")(x), rtol=rtol, atol=atol)


@pytest.mark.skipif(_C.active_isa() != "avx512_bf16", reason="pairs of bfloat16 are of that level")
@torch.no_grad()
def test_networks_of_bfloat16_multiply_pairs():
    model = fastconv.fuse(backbone().bfloat16())
    x = images(dtype=torch.bfloat16)
    reset_stats()
    found = model(x)
    assert {key for key in stats() if key.startswith("conv2d/")} == {"conv2d/pairs"}
    assert planned(model) == [True]
    torch.testing.assert_close(found, model.forward(x), rtol=0.03, atol=0.03)


@torch.no_grad()
def test_a_result_is_the_callers_own():
    model, x = fastconv.fuse(backbone()), images()
    first = model(x)
    kept = first.clone()
    second = model(2 * x)
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, kept)
    assert first.untyped_storage().nbytes() == first.nbytes


@torch.no_grad()
def test_steps_never_share_living_memory():
    """Every step's result stands apart from what it reads and from what is read later."""
    model = fastconv.fuse(small())
    model(images())
    (plan,) = network_of(model).runs[0].plans.values()
    assert plan is not None
    places: dict[int, int] = {}
    steps = plan.program[1:].view(-1, 28).tolist()
    for kind, source, _, target, _, residual, *_ in steps:
        assert target not in (source, residual)
        assert source < 0 or source in places, f"step of kind {kind} reads what nobody wrote"
        assert residual in (NOTHING, *places) or residual < 0
        places[target] = kind
    assert 0 < plan.workspace < 4 * images().nbytes


@torch.no_grad()
def test_changed_weights_are_seen():
    model, x = fastconv.fuse(small()), images()
    layer = next(module for module in model.modules() if isinstance(module, fastconv.fused.FusedConv2d))
    before = model(x)
    layer.weight.mul_(0.5)
    halved = model(x)
    torch.testing.assert_close(halved, model.forward(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, halved)
    linear = next(module for module in model.modules() if isinstance(module, nn.Linear))
    linear.bias.data = torch.ones_like(linear.bias)
    torch.testing.assert_close(model(x), model.forward(x), rtol=1e-5, atol=1e-5)
    linear.load_state_dict({"weight": torch.ones(40, 128), "bias": torch.zeros(40)})
    torch.testing.assert_close(model(x), model.forward(x), rtol=1e-5, atol=1e-5)
    model.double()
    torch.testing.assert_close(model(x.double()), model.forward(x.double()))


@torch.no_grad()
def test_memory_written_behind_torchs_back_is_seen_after_train_eval():
    model, x = fastconv.fuse(backbone()), images()
    model(x)
    for module in model.modules():
        if isinstance(module, fastconv.fused.FusedConv2d):
            module.weight.numpy()[...] *= 2
    model.train().eval()
    torch.testing.assert_close(model(x), model.forward(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_exchanged_layer_is_seen():
    model, x = fastconv.fuse(small()), images()
    model(x)
    model.get_submodule("8")  # it is there
    model._modules["11"] = nn.Linear(40, 3)
    assert model(x).shape == (2, 3)


@torch.no_grad()
def test_hooks_are_called():
    model, x = fastconv.fuse(small()), images()
    model(x)
    seen: list[str] = []
    layer = next(module for module in model.modules() if isinstance(module, nn.MaxPool2d))
    handle = layer.register_forward_hook(lambda *_: seen.append("layer"))
    model(x)
    assert seen == ["layer"]
    assert len(network_of(model).runs) == 2
    handle.remove()
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.append("any")):
        model(x)
    assert seen.count("any") > 5
    seen.clear()
    with model.register_forward_pre_hook(lambda *_: seen.append("root")):
        model(x)
    assert seen == ["root"]


def test_gradients_pass():
    model, x = fastconv.fuse(small()), images()
    with torch.no_grad():
        expected = model(x)
    found = model(x)  # the linear layers train
    assert found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    x = x.requires_grad_()
    (grad,) = torch.autograd.grad(model(x).sum(), x)
    assert grad.abs().sum() > 0


@torch.no_grad()
def test_dropout_that_trains_drops():
    model, x = fastconv.fuse(small()), images()
    once = model(x)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    assert not torch.equal(once, model(x))


@torch.no_grad()
def test_a_layer_that_cannot_run_raises_what_it_would():
    model = fastconv.fuse(backbone())
    with pytest.raises(RuntimeError, match="channels"):
        model(torch.randn(1, 4, 32, 32))
    with pytest.raises(RuntimeError):
        model(torch.randn(1, 3, 32, 32, dtype=torch.float64))
    with pytest.raises(TypeError):
        model()
    assert model(torch.randn(0, 3, 32, 32)).shape == (0, 24, 8, 8)
    assert model(torch.randn(3, 32, 32)).shape == (24, 8, 8)


class Branches(nn.Module):
    """Nodes that have no steps between layers that do, an argument in place, two results, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())
        self.pool, self.same = nn.MaxPool2d(2), nn.Identity()

    def forward(self, x: Tensor, y: Tensor) -> Any:
        a = self.first(x)
        b = self.first(y)
        b += 1
        c = torch.cat([self.second(a), self.second(b).sigmoid()], 1)
        d = self.pool(c)
        return {"all": (self.same(d), d), "sum": d.sum(), "input": self.same(x)}


@FORMATS
@torch.no_grad()
def test_nodes_without_steps_run_in_between(memory_format):
    torch.manual_seed(0)
    model = fastconv.fuse(Branches().eval())
    x, y = (images(2, size).to(memory_format=memory_format) for size in (20, 20))
    expected, found = model.forward(x, y), model(x, y)
    torch.testing.assert_close(found["all"][0], expected["all"][0], rtol=1e-5, atol=1e-5)
    assert found["all"][0].stride() == expected["all"][0].stride()
    torch.testing.assert_close(found["sum"], expected["sum"], rtol=1e-4, atol=1e-4)
    assert found["all"][0] is found["all"][1]
    assert found["input"] is x
    assert len(network_of(model).runs) >= 2
    assert all(planned(model))


@torch.no_grad()
def test_copies_start_anew_and_work():
    model, x = fastconv.fuse(small()), images()
    expected = model(x)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        fastconv.fuse(model),
        fastconv.convert(model),
    ):
        assert isinstance(twin, FusedGraph)
        assert "_networks" not in twin.__dict__ or not twin.__dict__["_networks"].found
        torch.testing.assert_close(twin(x), expected, rtol=1e-5, atol=1e-5)
        assert planned(twin) == [True]


@torch.no_grad()
def test_threads_have_memory_of_their_own():
    model = fastconv.fuse(small())
    inputs = [images(1 + index % 3, 45 + 4 * (index % 2)) + index for index in range(8)]
    expected = [model.forward(x) for x in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(20):
            with torch.no_grad():
                if not torch.allclose(model(inputs[index]), expected[index], rtol=1e-4, atol=1e-4):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@torch.no_grad()
def test_a_program_that_is_none_is_refused():
    model, x = fastconv.fuse(backbone()), images()
    y = model(x)
    (plan,) = network_of(model).runs[0].plans.values()
    assert plan is not None
    run = torch.ops.fastconv.network
    workspace = torch.empty(plan.workspace, dtype=torch.uint8)
    run(plan.program, [x, y], plan.constants, workspace)
    with pytest.raises(RuntimeError, match="beyond the workspace"):
        run(plan.program, [x, y], plan.constants, workspace[:-64])
    with pytest.raises(RuntimeError, match="none of this version"):
        run(plan.program + 1, [x, y], plan.constants, workspace)
    with pytest.raises(RuntimeError, match="names tensor"):
        run(plan.program, [x, y], plan.constants[:2], workspace)
    with pytest.raises(RuntimeError, match="beyond an input or output"):
        run(plan.program, [x[:1], y], plan.constants, workspace)
    with pytest.raises(RuntimeError, match="dtype"):
        run(plan.program, [x, y.double()], plan.constants, workspace)
