"""Ways of calling that torch's layers stand: odd numbers, odd models, several threads. Each of these failed once."""

from __future__ import annotations

import io
import threading

import numpy as np
import pytest
import torch
from torch import nn

import fastconv
from fastconv import functional


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.side = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(x)) + self.side(x))


def test_a_fused_model_can_be_cast_and_frozen_without_the_original():
    model = Residual().eval()
    model.tied = model.side
    fused = fastconv.fuse(model)
    fused.half().requires_grad_(False)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in model.parameters())
    model(torch.randn(1, 3, 5, 5)).sum().backward()
    # the memory is the same until it is cast
    again = fastconv.fuse(model)
    assert again.side.weight.data_ptr() == model.side.weight.data_ptr()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("fuse", [False, True])
def test_models_with_trained_weights_are_traced_and_saved(fuse):
    model = nn.Sequential(fastconv.Conv2d(3, 3, 3), Residual(), fastconv.MaxPool2d(2)).eval()
    model = fastconv.fuse(model) if fuse else model
    x = torch.randn(1, 3, 9, 9)
    traced = torch.jit.trace(model, (x,))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), model(x))


@pytest.mark.parametrize(
    "call",
    [
        lambda z: functional.conv2d(z, torch.ones(4, 3, 3, 3), torch.ones(4)),
        lambda z: functional.max_pool2d(z, 2),
        lambda z: functional.max_pool2d(z, 2, return_indices=True)[1],
        lambda z: functional.avg_pool2d(z, 2),
        lambda z: functional.adaptive_avg_pool2d(z, 2),
        lambda z: functional.local_response_norm(z, 2),
        lambda z: fastconv.fused.fused_conv2d(z, torch.ones(4, 3, 3, 3), activation="relu"),
    ],
)
def test_vmap_over_an_empty_batch(call):
    one = call(torch.zeros(2, 3, 6, 6))
    mapped = torch.func.vmap(call)(torch.zeros(0, 2, 3, 6, 6))
    assert mapped.shape == (0, *one.shape)
    assert mapped.dtype == one.dtype


@pytest.mark.parametrize("trained", [True, False])
def test_numpy_integers_are_integers(trained, ran):
    x = torch.randn(1, 3, 8, 8, requires_grad=trained)
    two, one = np.int64(2), np.int32(1)
    layer = fastconv.Conv2d(3, 6, 3, stride=two, padding=one, groups=3)
    with (
        torch.set_grad_enabled(trained),
        ran("conv2d", "max_pool2d" + "_with_offsets" * trained, "local_response_norm"),
    ):
        actual = functional.conv2d(x, layer.weight, layer.bias, two, (one, one), 1, np.int64(3))
        pooled = functional.max_pool2d(actual, (two, two), padding=one)
        normed = functional.local_response_norm(pooled, two)
    wanted = nn.functional.conv2d(x, layer.weight, layer.bias, 2, 1, 1, 3)
    torch.testing.assert_close(actual, wanted)
    torch.testing.assert_close(normed, nn.functional.local_response_norm(nn.functional.max_pool2d(wanted, 2, 2, 1), 2))


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(
    ("name", "arguments", "options"),
    [
        ("conv2d", (torch.ones(3, 3, 1, 1),), {"stride": (True, True)}),
        ("conv2d", (torch.ones(3, 3, 1, 1),), {"padding": (True, True)}),
        ("conv2d", (torch.ones(3, 3, 1, 1),), {"stride": 2**63}),
        ("conv2d", (torch.ones(3, 3, 1, 1),), {"padding": (2**63 - 1, 0)}),
        ("conv2d", (torch.ones(3, 3, 1, 1),), {"groups": 1.0}),
        ("max_pool2d", (2,), {"ceil_mode": "no"}),
        ("avg_pool2d", (2,), {"divisor_override": 2.5}),
        ("avg_pool2d", (2,), {"count_include_pad": None}),
        ("local_response_norm", (2.5,), {}),
    ],
)
def test_odd_arguments_raise_as_in_torch(name, arguments, options, trained):
    x = torch.randn(1, 3, 8, 8, requires_grad=trained)
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        getattr(nn.functional, name)(x, *arguments, **options)
    with pytest.raises(theirs.type):
        getattr(functional, name)(x, *arguments, **options)


def test_a_nested_tensor_raises_as_in_torch():
    nested = torch.nested.nested_tensor([torch.ones(3, 4, 4), torch.ones(3, 5, 5)])
    with pytest.raises(NotImplementedError):
        nn.functional.max_pool2d(nested, 2)
    with pytest.raises(NotImplementedError, match="nested"):
        functional.max_pool2d(nested, 2)


def test_a_trained_alpha_keeps_its_gradient():
    alpha = torch.tensor(0.1, requires_grad=True)
    functional.local_response_norm(torch.ones(1, 3, 2, 2), 2, alpha=alpha).sum().backward()
    assert alpha.grad is not None
    assert fastconv.stats() == {"torch/local_response_norm": 1}


def test_a_lazy_model_converted_before_its_first_batch():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.MaxPool2d(2))
    converted = fastconv.convert(model)
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(converted(x), converted(x))
    torch.testing.assert_close(model(x), converted(x))


def test_explain_sees_its_own_thread_only():
    stop, calls = threading.Event(), 0

    def pool_integers() -> None:
        nonlocal calls
        while not stop.is_set():
            functional.max_pool2d(torch.ones(1, 1, 4, 4, dtype=torch.int64), 2)
            calls += 1

    thread = threading.Thread(target=pool_integers)
    thread.start()
    try:
        for _ in range(10):
            assert [call.op for call in fastconv.explain(fastconv.Conv2d(3, 4, 3), (1, 3, 8, 8)).calls] == [
                "fastconv::conv2d"
            ]
    finally:
        stop.set()
        thread.join()
    assert fastconv.stats() == {"torch/max_pool2d": calls}


def test_functions_are_also_at_the_top():
    for name in functional.__all__:
        assert getattr(fastconv, name) is getattr(functional, name)
