"""patch: torch's functions and layers on fastconv's kernels, within the scope and nowhere else."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastconv
from fastconv.patch import patch

PLACES = [
    *((F, name) for name in ("conv2d", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "local_response_norm")),
    (torch, "conv2d"),
]


def current():
    return [getattr(place, name) for place, name in PLACES]


@pytest.fixture(autouse=True)
def _restored():
    """Whatever a test does, afterwards torch holds what it held before."""
    before = current()
    yield
    assert all(now is then for now, then in zip(current(), before, strict=True))


def images(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


WEIGHT = images(4, 3, 3, 3, seed=2)
CALLS = {
    "conv2d": lambda x: F.conv2d(x, WEIGHT, padding="same"),
    "torch.conv2d": lambda x: torch.conv2d(x, WEIGHT, None, 2, 1),
    "max_pool2d": lambda x: F.max_pool2d(x, 3, stride=2),
    "max_pool2d with indices": lambda x: F.max_pool2d(x, 2, return_indices=True),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 2),
    "local_response_norm": lambda x: F.local_response_norm(x, 3),
    "Conv2d": nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
    "MaxPool2d": nn.MaxPool2d(2),
    "AvgPool2d": nn.AvgPool2d(2),
    "AdaptiveAvgPool2d": nn.AdaptiveAvgPool2d((1, None)),
    "LocalResponseNorm": nn.LocalResponseNorm(3),
}


def ran(function, *args):
    fastconv.reset_stats()
    result = function(*args)
    stats = fastconv.stats()
    assert not [name for name in stats if name.startswith("torch/")]
    return result, {name.split("/")[0] for name in stats}


@pytest.mark.parametrize("name", CALLS)
def test_functions_and_layers_use_our_kernels_in_the_scope_only(name):
    input = images(2, 3, 8, 8)
    expected, kernels = ran(CALLS[name], input)
    assert not kernels
    with patch():
        result, kernels = ran(CALLS[name], input)
    assert kernels
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    _, kernels = ran(CALLS[name], input)
    assert not kernels


def test_training_in_the_scope_equals_training_outside():
    gradients = []
    for scope in (patch, lambda: torch.enable_grad()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(4, 2, 3))
        with scope():
            model(images(2, 3, 10, 10)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def uses_kernels():
    return bool(ran(CALLS["conv2d"], images(1, 3, 5, 5))[1])


def test_scopes_nest_and_their_object_can_be_entered_again():
    scope = patch()
    for _ in range(2):
        with scope:
            with scope, patch():
                assert uses_kernels()
            assert uses_kernels()
        assert not uses_kernels()


def test_exceptions_end_the_scope():
    with pytest.raises(RuntimeError, match="expected input"), patch():
        F.conv2d(images(1, 2, 5, 5), WEIGHT)
    with pytest.raises(KeyError), patch(), patch():
        raise KeyError
    assert not uses_kernels()


def test_decorator():
    assert patch()(uses_kernels)()
    assert not uses_kernels()


def test_what_no_kernel_serves_goes_to_torch_without_recursion():
    with patch():
        fastconv.reset_stats()
        input = torch.ones(1, 3, 5, 5, dtype=torch.int64)
        assert torch.equal(F.conv2d(input, torch.ones(1, 3, 5, 5, dtype=torch.int64)), torch.tensor([[[[75]]]]))
        assert F.max_pool2d(input, 2).shape == (1, 3, 2, 2)
        complex_input = input.to(torch.complex64)
        F.conv2d(complex_input, complex_input)
        with pytest.raises(RuntimeError, match="stride should not be zero"):
            F.avg_pool2d(input, 0)
        with pytest.raises((RuntimeError, ValueError)):
            F.adaptive_avg_pool2d(images(2, 2), 3)
        assert set(fastconv.stats()) == {"torch/conv2d", "torch/max_pool2d"}


def test_our_own_layers_are_unchanged_in_the_scope():
    layer = fastconv.Conv2d(3, 4, 3)
    expected = layer(images(1, 3, 6, 6))
    with patch():
        result, kernels = ran(layer, images(1, 3, 6, 6))
    assert kernels == {"conv2d"}
    assert torch.equal(result, expected)


def test_another_thread_keeps_torchs_functions():
    inside, done = threading.Event(), threading.Event()
    seen = []

    def holder():
        with patch():
            inside.set()
            done.wait(10)
            seen.append(F.conv2d(images(1, 3, 5, 5), WEIGHT).shape)

    thread = threading.Thread(target=holder)
    thread.start()
    assert inside.wait(10)
    assert not uses_kernels()
    with patch():
        assert uses_kernels()
    assert not uses_kernels()
    done.set()
    thread.join()
    assert seen == [(1, 4, 3, 3)]


def test_many_threads_come_and_go():
    errors = []

    def work(seed):
        try:
            for _ in range(30):
                with patch():
                    F.conv2d(images(1, 3, 5, 5, seed=seed), WEIGHT)
                    assert F.conv2d.__module__ == "fastconv.functional"
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_wrappers_put_around_the_patched_function_keep_working():
    original, count = F.conv2d, []
    scope = patch()
    with scope:
        patched = F.conv2d

        def wrapper(*args, **kwargs):
            count.append(1)
            return patched(*args, **kwargs)

        F.conv2d = wrapper
        assert uses_kernels()
    assert F.conv2d is wrapper
    assert not uses_kernels()
    assert len(count) == 2
    F.conv2d = original


def test_compile_inside_the_scope():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    input = images(1, 3, 8, 8)
    expected = model(input)
    targets = []

    def backend(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with patch():
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend=backend)(input), expected)
    assert "fastconv.conv2d.default" in targets
