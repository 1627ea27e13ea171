"""When a fused model's programs do not fit any more, or never did: the model's own graph runs, or a new program."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_network import images, network_of, planned, small
from torch import Tensor, nn

import fastconv
from fastconv import _C
from fastconv._network import FusedGraph

pytestmark = pytest.mark.skipif(fastconv._library.EMULATED, reason="of the CPU's own kernels")


class Takes(nn.Module):
    """A model of layers a, b and so on, and a forward that is given."""

    def __init__(self, forward: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        for name, layer in zip("abcd", layers, strict=False):
            self.add_module(name, layer)
        self.run = forward

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


def conv(channels: int = 3, filters: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, filters, 3), nn.ReLU())


def agree(model: Any, *inputs: Tensor) -> None:
    found, expected = model(*inputs), model.forward(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv()

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.a(x), self.b(y)


@pytest.mark.parametrize("batches", [(1, 64), (4, 1), (2, 3), (33, 5)])
@torch.no_grad()
def test_inputs_of_different_batches(batches):
    agree(fastconv.fuse(Two().eval()), *(images(n, 16) for n in batches))


class Many(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = conv()

    def forward(self, *inputs: Tensor) -> Tensor:
        result: Tensor = self.a(inputs[0])
        return result


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = conv()

    def forward(self, x: Tensor, flag: bool = False, scale: float = 1.0) -> Tensor:
        y: Tensor = self.a(x)
        return y * scale


@torch.no_grad()
def test_placeholders_that_are_no_single_tensor():
    agree(fastconv.fuse(Many().eval()), images(2, 16))
    model = fastconv.fuse(Optional().eval())
    agree(model, images(2, 16))
    assert planned(model) == [True]


@torch.no_grad()
def test_a_relu_that_is_watched_or_patched_runs_itself():
    model, x = fastconv.fuse(small()), images()
    before = model(x)
    relu: Any = model.get_submodule("9")
    assert isinstance(relu, nn.ReLU)
    least: list[float] = []
    with relu.register_forward_pre_hook(lambda _, inputs: least.append(inputs[0].min().item())):
        model(x)
    assert least[0] < 0
    relu.forward = lambda value: value * 2
    agree(model, x)
    assert not torch.allclose(model(x), before)


CHANGES: dict[str, Callable[[Any], None]] = {
    "pool's stride": lambda model: setattr(model.get_submodule("2"), "stride", 1),
    "pool's size": lambda model: setattr(model.get_submodule("5"), "kernel_size", 1),
    "activation": lambda model: setattr(model.get_submodule("0"), "activation", "tanh"),
    "stride": lambda model: setattr(model.get_submodule("0"), "stride", (1, 1)),
    "dilation": lambda model: setattr(model.get_submodule("4"), "dilation", (2, 2)),
    "forward": lambda model: setattr(model.get_submodule("2"), "forward", torch.relu),
    "parent": lambda model: setattr(model, "3", copy.deepcopy(model.get_submodule("3")).apply(_halve)),
}


def _halve(module: nn.Module) -> None:
    for buffer in module.buffers(recurse=False):
        buffer.mul_(0.5)


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changes_after_the_first_call(change):
    model, x = fastconv.fuse(small()), images()
    before = model(x)
    CHANGES[change](model)
    try:
        expected = model.forward(x)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            model(x)
        return
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, expected)


def test_gradients_that_are_wanted_later():
    model, x = fastconv.fuse(small()).requires_grad_(False), images()
    model(x)
    linear: Any = model.get_submodule("11")
    linear.requires_grad_(True)
    model(x).sum().backward()
    assert linear.weight.grad is not None


class Flattened(nn.Module):
    def __init__(self, **dims: int) -> None:
        super().__init__()
        self.a, self.dims = conv(), dims

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.a(x), **self.dims)


@pytest.mark.parametrize("dims", [{"start_dim": 1}, {"end_dim": 1}, {"start_dim": 1, "end_dim": 2}, {}], ids=str)
@torch.no_grad()
def test_flatten_by_keyword(dims):
    agree(fastconv.fuse(Flattened(**dims).eval()), images(2, 16))


@torch.no_grad()
def test_a_default_device_changes_nothing():
    model, x = fastconv.fuse(small()), images()
    with torch.device("meta"):
        assert model(x).device == x.device


class Collections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = conv()

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        return {"list": [y, (y, 1)]}


@torch.no_grad()
def test_results_are_pythons_own_collections():
    found = fastconv.fuse(Collections().eval())(images())
    assert type(found) is dict
    assert type(found["list"]) is list
    assert type(found["list"][1]) is tuple


@torch.no_grad()
def test_inputs_that_kernels_do_not_know():
    pools = fastconv.fuse(nn.Sequential(nn.MaxPool2d(2), nn.MaxPool2d(2)).eval())
    x = torch.arange(2 * 3 * 64, dtype=torch.int64).reshape(2, 3, 8, 8)
    assert torch.equal(pools(x), nn.functional.max_pool2d(x, 4))
    agree(fastconv.fuse(small()), torch._efficientzerotensor(2, 3, 45, 45))


class Views(nn.Module):
    """What writes in place after a view was taken, and after it was read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.same = conv(), conv(8, 8), nn.Identity()

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        z = torch.flatten(y, 1)
        w = self.b(y)
        y += 1
        u = self.same(x)
        v = self.a(u)
        x += 1
        return z, w, u, v


@torch.no_grad()
def test_views_stay_views():
    model = fastconv.fuse(Views().eval())
    for found, expected in zip(model(images()), model.forward(images()), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_layers_that_do_not_fit_say_so_themselves():
    model, x = fastconv.fuse(small()), images()
    linear: Any = model.get_submodule("11")
    linear.bias = nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError) as error:
        model(x)
    assert "network" not in str(error.value)


@torch.no_grad()
def test_function_modes_see_the_layers():
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(getattr(function, "__name__", ""))
            return function(*args, **(kwargs or {}))

    seen: list[str] = []
    model, x = fastconv.fuse(small()), images()
    model(x)
    with Mode():
        model(x)
    assert {"fused_conv2d", "linear"} <= set(seen)


@torch.no_grad()
def test_memory_is_shared_by_programs_and_given_back():
    model = fastconv.fuse(nn.Sequential(nn.Conv2d(512, 2048, 3, stride=2), nn.Conv2d(2048, 16, 1)).eval())
    for size in (9, 11, 13):
        model(torch.randn(1, 512, size, size))
    (network,) = model.__dict__["_networks"].found.values()
    assert len(network.copies) <= 2
    for _ in range(20):
        model.add_module("1", nn.Conv2d(2048, 16, 1))
        model(torch.randn(1, 512, 9, 9))
    assert len(model.__dict__["_networks"].packed) <= 3


@torch.no_grad()
def test_many_kinds_of_inputs():
    model = fastconv.fuse(small())
    for size in range(40, 120):
        model(images(1, size))
    (run,) = network_of(model).runs
    assert len(run.plans) <= 64
    agree(model, images(1, 40))


def test_a_shallow_copy_runs_natively():
    model, x = fastconv.fuse(small()), images()
    twin = copy.copy(model)
    assert isinstance(twin, FusedGraph)
    with torch.no_grad():
        torch.testing.assert_close(twin(x), model(x))
        assert planned(twin) == [True]


def test_entries_are_compared_by_identity_and_number():
    held, hooks = {"stride": (2, 2), "weight": None}, {}
    expected = (held, held), ("stride", "weight"), (held["stride"], None), (hooks, held), (0, 2)
    assert _C.same_entries(*expected)
    hooks[1] = print
    assert not _C.same_entries(*expected)
    hooks.clear()
    held["stride"] = tuple(iter((2, 2)))
    assert not _C.same_entries(*expected)
    del held["stride"]
    assert not _C.same_entries(*expected)
    with pytest.raises(ValueError, match="different lengths"):
        _C.same_entries((held,), (), (), (), ())
    with pytest.raises(SystemError):
        _C.same_entries((3,), ("stride",), (2,), (), ())


@torch.no_grad()
def test_a_setting_that_is_a_list_changed_in_place():
    model, x = fastconv.fuse(small()), images()
    model.get_submodule("2").stride = [2, 2]
    before = model(x)
    model.get_submodule("2").stride[:] = [1, 1]
    torch.testing.assert_close(model(x), model.forward(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(x), before)


def test_a_watched_model_is_collected():
    model = fastconv.fuse(small())
    with torch.no_grad():
        model(images())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
