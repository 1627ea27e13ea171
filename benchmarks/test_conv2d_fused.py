"""Convolution, folded batch norm and ReLU in one pass, against torch's three calls: layers of every family, forward."""

from __future__ import annotations

from benchmarks import cases, layers

LAYERS = layers.representative(list(layers.distinct(layers.Conv)), 2)


def test_conv2d_fused(layer, batch, layout, measured, device, dtype):
    pair = cases.fused(layer, batch, layout, device, dtype)
    measured(pair.case, pair.ours, pair.theirs, pair.terms)
