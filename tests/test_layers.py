"""The layers are torch's: constructor, initial values, repr, state_dict, hooks, parametrizations, pruning."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastconv
from fastconv.stats import stats

# Layer, constructor arguments, and the kernel that its forward pass must reach.
CHANNELS = {"in_channels": 4, "out_channels": 2}
LAYERS: list[tuple[str, dict[str, Any], str]] = [
    ("Conv2d", {"in_channels": 4, "out_channels": 6, "kernel_size": 3}, "conv2d"),
    ("Conv2d", {"in_channels": 4, "out_channels": 6, "kernel_size": (3, 2), "stride": 2, "padding": (1, 0)}, "conv2d"),
    ("Conv2d", {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "groups": 4, "padding": "same"}, "conv2d"),
    ("Conv2d", {"in_channels": 4, "out_channels": 8, "kernel_size": 4, "groups": 2, "padding": "same"}, "conv2d"),
    ("Conv2d", {**CHANNELS, "kernel_size": 3, "padding": "valid", "bias": False}, "conv2d"),
    ("Conv2d", {**CHANNELS, "kernel_size": 3, "dilation": 2, "dtype": torch.float64}, "conv2d"),
    ("Conv2d", {**CHANNELS, "kernel_size": 3, "padding": 2, "padding_mode": "reflect"}, "conv2d"),
    ("Conv2d", {**CHANNELS, "kernel_size": 3, "padding": "same", "padding_mode": "circular"},
     "conv2d"),
    ("MaxPool2d", {"kernel_size": 2}, "max_pool2d"),
    ("MaxPool2d", {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}, "max_pool2d"),
    ("MaxPool2d", {"kernel_size": 3, "stride": 1, "dilation": 2, "return_indices": True}, "max_pool2d_with_offsets"),
    ("AvgPool2d", {"kernel_size": 2}, "avg_pool2d"),
    ("AvgPool2d", {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False}, "avg_pool2d"),
    ("AvgPool2d", {"kernel_size": 3, "divisor_override": 2, "ceil_mode": True}, "avg_pool2d"),
    ("AdaptiveAvgPool2d", {"output_size": 1}, "adaptive_avg_pool2d"),
    ("AdaptiveAvgPool2d", {"output_size": (3, None)}, "adaptive_avg_pool2d"),
    ("LocalResponseNorm", {"size": 2}, "local_response_norm"),
    ("LocalResponseNorm", {"size": 5, "alpha": 1e-3, "beta": 0.5, "k": 2.0}, "local_response_norm"),
]  # fmt: skip
EACH = pytest.mark.parametrize(("name", "arguments", "kernel"), LAYERS)


def twins(name: str, arguments: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """Our layer and torch's, built under the same seed."""
    layers = []
    for module in (fastconv, nn):
        torch.manual_seed(11)
        layers.append(getattr(module, name)(**arguments))
    return layers[0], layers[1]


def image_for(layer: nn.Module, n: int = 2) -> torch.Tensor:
    dtype = next(layer.parameters(), torch.empty(0)).dtype
    return torch.randn(n, 4, 9, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


@EACH
def test_it_is_torchs_layer(name, arguments, kernel):
    mine, theirs = twins(name, arguments)
    assert isinstance(mine, getattr(nn, name))
    assert repr(mine) == repr(theirs)
    assert mine.__dict__.keys() == theirs.__dict__.keys()
    assert inspect.signature(type(mine)) == inspect.signature(type(theirs))
    assert list(mine.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(mine.state_dict()[key], value), f"{key} is initialised differently"


@EACH
def test_same_values_and_our_kernel(name, arguments, kernel, ran):
    mine, theirs = twins(name, arguments)
    with ran(kernel), torch.no_grad():
        actual = mine(image_for(mine))
    torch.testing.assert_close(actual, theirs(image_for(mine)))


@EACH
def test_state_moves_both_ways(name, arguments, kernel):
    mine, theirs = twins(name, arguments)
    other = type(theirs)(**arguments)
    other.load_state_dict(mine.state_dict(), strict=True)
    mine.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(other(image_for(mine)), mine(image_for(mine)))


@EACH
def test_copies(name, arguments, kernel):
    layer, _ = twins(name, arguments)
    expected = layer(image_for(layer))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(layer),
        copy.copy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
    ):
        assert type(twin) is type(layer)
        torch.testing.assert_close(twin(image_for(layer)), expected, rtol=0, atol=0)


def test_global_average_pool():
    layer = fastconv.GlobalAvgPool2d()
    assert isinstance(layer, nn.AdaptiveAvgPool2d)
    assert repr(layer) == "GlobalAvgPool2d()"
    image = torch.randn(2, 3, 5, 6)
    torch.testing.assert_close(layer(image), image.mean((2, 3), keepdim=True))
    assert stats() == {"adaptive_avg_pool2d/global": 1}


def test_hooks_run():
    layer, seen = fastconv.Conv2d(4, 2, 3), []
    layer.register_forward_pre_hook(lambda module, args: seen.append("before"))
    layer.register_forward_hook(lambda module, args, output: output * 2)
    layer.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append("backward"))
    image = image_for(layer).requires_grad_()
    output = layer(image)
    torch.testing.assert_close(output, 2 * nn.functional.conv2d(image, layer.weight, layer.bias))
    output.sum().backward()
    assert seen == ["before", "backward"]


def parametrized_pair(apply: Any) -> tuple[nn.Module, nn.Module]:
    mine, theirs = twins("Conv2d", {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "dtype": torch.float64})
    for layer in (mine, theirs):
        torch.manual_seed(3)
        apply(layer)
    return mine, theirs


class Symmetric(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + weight.transpose(2, 3)


@pytest.mark.parametrize(
    "apply",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        lambda layer: parametrize.register_parametrization(layer, "weight", Symmetric()),
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: prune.ln_structured(layer, "weight", 0.5, n=2, dim=0),
    ],
    ids=["weight_norm", "spectral_norm", "orthogonal", "own", "prune", "prune-channels"],
)
def test_parametrizations_and_pruning(apply, ran):
    mine, theirs = parametrized_pair(apply)
    image = image_for(mine)
    with ran("conv2d", "conv2d_weight_grad", "conv2d_bias_grad"):
        output = mine(image)
        output.square().sum().backward()
    expected = theirs(image)
    expected.square().sum().backward()
    torch.testing.assert_close(output, expected)
    assert [name for name, _ in mine.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    for (name, parameter), twin in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, twin.grad, msg=lambda text, name=name: f"{name}: {text}")
    # A step changes the parameters below; the next call must see the new weight.
    for layer in (mine, theirs):
        torch.optim.SGD(layer.parameters(), lr=0.1).step()
    torch.testing.assert_close(mine.eval()(image), theirs.eval()(image))


def test_devices_dtypes_and_formats_move(ran):
    layer = fastconv.Conv2d(4, 6, 3, device="meta").to_empty(device="cpu")
    nn.init.ones_(layer.weight), nn.init.zeros_(layer.bias)
    image = torch.ones(1, 4, 3, 3)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        with ran("conv2d"):
            assert layer.to(dtype)(image.to(dtype)).flatten().tolist() == [36] * 6
    with ran("conv2d"):
        output = layer.float().to(memory_format=torch.channels_last)(torch.ones(1, 4, 5, 5))
    assert output.is_contiguous(memory_format=torch.channels_last)


def test_training_step_by_step_as_torch():
    """Ten steps of Adam from one seed: the losses of both networks agree."""
    losses = []
    for module in (fastconv, nn):
        torch.manual_seed(0)
        net = nn.Sequential(
            module.Conv2d(1, 6, 5, padding=2), nn.Tanh(), module.AvgPool2d(2), module.Conv2d(6, 16, 5), nn.ReLU(),
            module.MaxPool2d(2), module.LocalResponseNorm(3), module.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(64, 10),
        ).double()  # fmt: skip
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(16, 1, 20, 20, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, 10, (16,), generator=generator)
        history = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses.append(history)
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-9, atol=0)
    assert not [name for name in stats() if name.startswith("torch/")]
