"""torch.compile(fullgraph=True), static and dynamic shapes, forward and backward; training steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import fastconv
from fastconv import functional
from fastconv.stats import stats

pytestmark = pytest.mark.slow
OURS = ["conv2d", "max_pool2d_with_offsets", "avg_pool2d", "adaptive_avg_pool2d", "local_response_norm",
        "conv2d_weight_grad", "max_pool2d_backward", "avg_pool2d_backward", "local_response_norm_backward"]  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network(module: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        module.Conv2d(3, 8, 3, padding="same"), nn.ReLU(), module.MaxPool2d(2),
        module.Conv2d(8, 8, 3, groups=8, stride=2), module.LocalResponseNorm(3), module.AvgPool2d(2, ceil_mode=True),
        module.Conv2d(8, 4, 1), module.AdaptiveAvgPool2d(1), nn.Flatten(),
    ).double()  # fmt: skip


def step(net: Any, image: torch.Tensor) -> list[torch.Tensor]:
    """Output, and the gradients of input and parameters."""
    image = image.clone(memory_format=torch.preserve_format).requires_grad_()
    output = net(image)
    leaves = [image, *net.parameters()]
    return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]


# Inductor calls the C++ compiler for every graph; what it does with an op of ours is the same in all of them.
@pytest.mark.parametrize(
    ("backend", "memory_format"),
    [("inductor", torch.channels_last), ("aot_eager", torch.channels_last), ("aot_eager", torch.contiguous_format)],
)
def test_static_shapes(backend, memory_format, ran):
    image = torch.randn(2, 3, 20, 22, dtype=torch.float64).to(memory_format=memory_format)
    compiled = torch.compile(network(fastconv), fullgraph=True, dynamic=False, backend=backend)
    with ran(*OURS):
        actual = step(compiled, image)
    torch.testing.assert_close(actual, step(network(nn), image))


def test_dynamic_shapes_compile_once():
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    counts = []
    compiled = torch.compile(network(fastconv), fullgraph=True, dynamic=True, backend=counter)
    for n, h, w in [(2, 20, 22), (3, 31, 25), (5, 24, 40)]:
        image = torch.randn(n, 3, h, w, dtype=torch.float64)
        torch.testing.assert_close(step(compiled, image), step(network(nn), image))
        counts.append(counter.frame_count)
    assert counts[0] >= 1
    assert counts == counts[:1] * 3, "recompiled for another shape"
    assert not [name for name in stats() if name.startswith("torch/")]


@pytest.mark.parametrize(
    ("function", "keywords"),
    [
        ("conv2d", {"padding": 1, "stride": 2}),
        ("conv2d", {"padding": "same", "groups": 2}),
        ("max_pool2d", {"kernel_size": 3, "return_indices": True}),
        ("max_pool2d", {"kernel_size": 2, "ceil_mode": True, "padding": 1}),
        ("avg_pool2d", {"kernel_size": 3, "count_include_pad": False, "padding": 1}),
        ("adaptive_avg_pool2d", {"output_size": (3, 2)}),
        ("local_response_norm", {"size": 2}),
    ],
)
def test_functions_without_gradients(function, keywords, ran):
    arguments = [torch.randn(2, 4, 9, 9)]
    if function == "conv2d":
        arguments += [torch.randn(6, 4 // keywords.get("groups", 1), 3, 3), torch.randn(6)]
    compiled = torch.compile(
        lambda *a: getattr(functional, function)(*a, **keywords), fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad(), ran():
        actual = compiled(*arguments)
        assert stats()
    torch.testing.assert_close(actual, getattr(torch.nn.functional, function)(*arguments, **keywords))


def test_unbatched_and_autocast():
    layer = fastconv.Conv2d(3, 4, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    image = torch.randn(3, 8, 8)
    torch.testing.assert_close(compiled(image), layer(image))
    with torch.autocast("cpu", torch.bfloat16):
        output = compiled(image[None])
        assert output.dtype == torch.bfloat16
        torch.testing.assert_close(output, layer(image[None]))


def test_training_steps_agree_with_eager():
    losses = []
    for wrap in (lambda net: net, lambda net: torch.compile(net, fullgraph=True, backend="aot_eager")):
        net = network(fastconv)
        run, optimizer = wrap(net), torch.optim.Adam(net.parameters(), lr=1e-2)
        torch.manual_seed(1)
        images, labels = torch.randn(8, 3, 20, 20, dtype=torch.float64), torch.randint(0, 4, (8,))
        history = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(run(images), labels)
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses.append(history)
    torch.testing.assert_close(*map(torch.tensor, losses))
    assert losses[0][0] != losses[0][-1]
