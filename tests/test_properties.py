"""Random convolutions, forward and all gradients, against float64; outputs and workspaces poisoned."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import reference
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from reference import Conv

from fastconv import _C
from fastconv.stats import reset_stats, stats

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
EXAMPLES = int(os.environ.get("FASTCONV_EXAMPLES", "2000"))
PAIRS = ["pairs"] if _C.active_isa() == "avx512_bf16" else []  # of bfloat16


@st.composite
def convolutions(draw, integers: bool = False) -> Conv:
    """Small, but past the edges of every tile: 6 x 16 sums on AVX2, 12 x 32 on AVX-512, and their tails."""
    kind = draw(st.sampled_from(["dense", "dense", "grouped", "depthwise"]))
    few, many = st.integers(1, 7), st.sampled_from([1, 2, 3, 5, 8, 13, 16, 17, 24, 33, 37])
    groups = {"dense": 1, "grouped": draw(st.integers(2, 5)), "depthwise": draw(many)}[kind]
    c_per_group = 1 if kind == "depthwise" else draw(many if kind == "dense" else few)
    k_per_group = draw(st.integers(1, 3) if kind == "depthwise" else many if kind == "dense" else few)
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = draw(st.tuples(*[st.integers(0, 4)] * 4))
    extra = draw(st.tuples(st.integers(0, 11), st.integers(0, 19)))
    size = tuple(max(1, dilation[d] * (kernel[d] - 1) + 1 - padding[d] - padding[d + 2] + extra[d]) for d in range(2))
    algo = draw(st.sampled_from([None, None, "tiled", "naive", "rows", *PAIRS]))
    layouts = draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    return Conv(
        n=draw(st.integers(1, 3)),
        groups=groups,
        c_per_group=c_per_group,
        k_per_group=k_per_group,
        size=size,
        kernel=kernel,
        stride=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        padding=padding,
        dilation=dilation,
        bias=draw(st.booleans()),
        dtype=torch.bfloat16 if algo == "pairs" else draw(st.sampled_from(DTYPES)),
        layouts=(False, False, False) if algo == "rows" else layouts,  # rows reads NCHW
        algo=algo,
        integers=integers,
        seed=draw(st.integers(0, 2**20)),
    )


def check_and_prove(problem: Conv) -> None:
    reset_stats()
    reference.check(problem)
    counts = stats()
    for op in ("conv2d", "conv2d_input_grad", "conv2d_weight_grad"):
        mine = [name for name in counts if name.split("/")[0] == op]
        assert mine, f"{op} did not run for {problem}"
        algo = "tiled" if problem.algo == "rows" and op == "conv2d_weight_grad" else problem.algo
        assert algo is None or mine == [f"{op}/{algo}"], f"{mine} ran for {problem}"
    assert ("conv2d_bias_grad/rows" in counts) == problem.bias
    assert not [name for name in counts if name.startswith("torch/")]


PARTS = 4  # so that test processes share the work


def part_of(strategy: st.SearchStrategy[Conv], number: int, share: float) -> Callable[[], None]:
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
    count = max(1, int(EXAMPLES * share / PARTS))
    return seed(number)(settings(max_examples=count, suppress_health_check=quiet)(given(strategy)(check_and_prove)))


@pytest.mark.parametrize("part", range(PARTS))
def test_random_numbers(part):
    part_of(convolutions(), part, share=1.0)()


@pytest.mark.parametrize("part", range(PARTS))
def test_integers_are_exact(part):
    part_of(convolutions(integers=True), PARTS + part, share=0.5)()
