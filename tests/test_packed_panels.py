"""Panels of weights that a fused model keeps for channels_last: what they change is the time, never a result."""

from __future__ import annotations

import pytest
import torch
from packing import fused, images, kept, layer_of
from torch import nn

import fastconv
from fastconv import _C
from fastconv.stats import reset_stats, stats

pytestmark = pytest.mark.skipif(fastconv._library.EMULATED, reason="of the CPU's own kernels")
GEOMETRY = (1, 1, 0, 0, 0, 0, 1, 1)
TILED = [
    {"channels": 64, "filters": 96, "kernel": 1},
    {"channels": 50, "filters": 75, "kernel": 1, "stride": 2},
    {"channels": 1100, "filters": 40, "kernel": 1},  # more than one block of depth
    {"channels": 64, "filters": 64, "stride": 2},
    {"channels": 40, "filters": 31, "dilation": 2},
    {"channels": 64, "filters": 64, "groups": 2, "kernel": 5},
    {"channels": 3, "filters": 64, "kernel": 7, "stride": 2},  # padded rows
    {"channels": 20, "filters": 48, "kernel": 14, "padding": 0},  # as large as the image
]


@pytest.mark.parametrize("options", TILED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@torch.no_grad()
def test_panels_of_tiled_give_the_same_bits(options, dtype, poisoned):
    has_pairs = dtype == torch.bfloat16 and _C.active_isa() == "avx512_bf16"
    model = fused(**options).to(dtype)
    layer = layer_of(model)
    geometry = list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups, 1
    for n, size in ((1, 14), (3, 14), (1, 33)):
        pairs = has_pairs and size != options.get("kernel")  # few images with one window each are left to tiled
        kernel = "pairs" if pairs else "tiled"
        x = images(options["channels"], size, n).to(dtype)
        residual = torch.randn_like(layer(x)).to(memory_format=torch.channels_last)
        assert kept(model) == 0, "contiguous inputs keep no panels"
        x = x.to(memory_format=torch.channels_last)
        named = torch.ops.fastconv.conv2d_fused(x, layer.weight, None, layer.bias, residual, *geometry, kernel)
        reset_stats()
        for _ in range(2):
            found = layer(x, residual)
            assert torch.equal(found, named)
            assert found.stride() == named.stride()
        assert {key: value for key, value in stats().items() if key.startswith("conv2d")} == {f"conv2d/{kernel}": 2}
        if pairs:
            assert kept(model) == 0, "pairs pack the weight in every call"
            continue
        size_of_sums = 8 if dtype == torch.float64 else 4
        padded = layer.groups * -(-layer.weight.shape[0] // layer.groups // 32) * 32
        assert (
            layer.weight.numel() * size_of_sums < kept(model) <= 64 + (layer.weight[0].numel() * padded * size_of_sums)
        )
        layer.packed.clear()


@pytest.mark.parametrize("options", [*TILED, {"channels": 96, "filters": 160, "kernel": 1, "size": 7}], ids=str)
@torch.no_grad()
def test_any_number_of_threads_gives_the_same_bits(options):
    """Pixels and panels are shared out by what is most even, which no result may show."""
    layer = layer_of(fused(**{name: value for name, value in options.items() if name != "size"}))
    x = images(options["channels"], options.get("size", 14)).to(memory_format=torch.channels_last)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 5, 16):
            torch.set_num_threads(count)
            results.append(layer(x).clone())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "tanh"])
@pytest.mark.parametrize("with_residual", [False, True])
@torch.no_grad()
def test_what_follows_the_sums(activation, with_residual):
    """Whole tiles do it in registers, all others in a second pass; a NaN stays one."""
    model = fused(40, 72, 1)
    layer = layer_of(model)
    layer.activation = activation
    x = images(40, 13).to(memory_format=torch.channels_last) * 3
    x[0, 3, 5, 5] = float("nan")
    residual = images(72, 13, seed=2).to(memory_format=torch.channels_last) if with_residual else None
    wanted = nn.functional.conv2d(x.double(), layer.weight.double(), layer.bias.double())
    wanted = wanted if residual is None else wanted + residual
    follows = {"none": lambda y: y, "relu": torch.relu, "relu6": nn.functional.relu6, "tanh": torch.tanh}
    found = layer(x, residual)
    assert kept(model) > 0
    assert found.isnan().sum() == 72
    torch.testing.assert_close(found.double(), follows[activation](wanted), rtol=1e-4, atol=1e-4, equal_nan=True)


def test_panels_of_another_weight_are_refused():
    pack, eager = torch.ops.fastconv.conv2d_pack, torch.ops.fastconv.conv2d_fused.eager
    x, weight = images(64, 14).to(memory_format=torch.channels_last), torch.randn(128, 64, 1, 1)
    packed = pack(weight, GEOMETRY, 1, True, "tiled")
    expected = nn.functional.conv2d(x, weight)
    torch.testing.assert_close(
        eager(x, weight, None, None, None, GEOMETRY, 1, 0, packed), expected, rtol=1e-4, atol=1e-4
    )
    turned = pack(torch.randn(64, 128, 1, 1), GEOMETRY, 1, True, "tiled")
    assert turned.shape == packed.shape, "else its size alone would tell"
    halves = pack(weight.bfloat16(), GEOMETRY, 1, True, "tiled")
    assert halves.shape == packed.shape
    for wrong in (turned, halves, torch.zeros_like(packed), pack(weight[:64], GEOMETRY, 1, True, "tiled")):
        with pytest.raises(RuntimeError, match="pack this weight"):
            eager(x, weight, None, None, None, GEOMETRY, 1, 0, wrong)
    with pytest.raises(RuntimeError, match="packed"):
        eager(images(64, 14), weight, None, None, None, GEOMETRY, 1, 0, packed)
