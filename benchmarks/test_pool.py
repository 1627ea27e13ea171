"""Every pooling layer of the lecture: forward without gradient, and the input gradient."""

from __future__ import annotations

import pytest

from benchmarks import cases, layers

LAYERS = layers.pools()


@pytest.mark.parametrize("direction", cases.POOL_DIRECTIONS)
def test_pool(layer, batch, direction, layout, measured, device, dtype):
    pair = cases.pool(layer, batch, direction, layout, device, dtype)
    measured(pair.case, pair.ours, pair.theirs, pair.terms)
