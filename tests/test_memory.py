"""Resident memory stays flat under changing shapes, and results do not keep their inputs alive."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch

import fastconv

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")

PAGE_BYTES = 4096


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def network() -> torch.nn.Sequential:
    return torch.nn.Sequential(
        fastconv.Conv2d(3, 8, 3, padding=1), fastconv.MaxPool2d(2), fastconv.Conv2d(8, 8, 3, padding=1, groups=8),
        fastconv.AvgPool2d(2, ceil_mode=True), fastconv.LocalResponseNorm(3), fastconv.Conv2d(8, 12, 1),
        fastconv.AdaptiveAvgPool2d(1),
    )  # fmt: skip


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_thousand_shapes(training):
    """Nothing is kept per shape. Memory that was used once may stay with the allocator, so the largest comes first."""
    net = network().train(training)
    torch.set_grad_enabled(training)
    try:

        def call(h: int, w: int) -> None:
            output = net(torch.zeros(1, 3, h, w))
            if training:
                output.sum().backward()
                net.zero_grad()

        for _ in range(3):
            for h in (8, 47):
                call(h, 8)
                call(h, 47)
        before = resident_bytes()
        shapes = [(8 + i % 40, 8 + i // 40) for i in range(1000)]
        for h, w in shapes:
            call(h, w)
        grown = resident_bytes() - before
    finally:
        torch.set_grad_enabled(True)
    # 1,000 shapes that kept their packed weights alone would hold 1,000 * 800 * 4 bytes = 3 MB and more.
    assert grown < 2 * 2**20, f"{grown / 2**20:.1f} MB more after 1,000 shapes"


def test_a_thousand_weights():
    """Layers that are gone leave nothing behind: 1,000 weights of 150 kB each would be 150 MB."""
    image = torch.zeros(1, 64, 6, 6)

    def call() -> None:
        with torch.no_grad():
            fastconv.Conv2d(64, 64, 3).eval()(image)

    for _ in range(20):
        call()
    before = resident_bytes()
    for _ in range(1000):
        call()
    grown = resident_bytes() - before
    assert grown < 4 * 2**20, f"{grown / 2**20:.1f} MB more after 1,000 layers"


def test_results_do_not_keep_what_no_gradient_needs():
    image, layer = torch.randn(1, 3, 8, 8), fastconv.Conv2d(3, 4, 3)
    layer.weight.requires_grad_(False)
    output = layer(image)
    dead = weakref.ref(image)
    del image
    gc.collect()
    assert dead() is None, "the bias's gradient does not need the input"
    output.sum().backward()


def test_graphs_are_freed():
    """A layer that was called with gradients a thousand times holds no graph of any of them."""
    net, image = network(), torch.zeros(4, 3, 32, 32)
    net(image).sum().backward()
    before = resident_bytes()
    for _ in range(300):
        net(image)
    assert resident_bytes() - before < 4 * 2**20
