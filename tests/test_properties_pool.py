"""Random pooling and normalisation, forward and gradients, against float64; outputs and workspaces poisoned."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, seed, settings
from hypothesis import strategies as st
from reference import assert_as_good, guarded, or_from_float32, tensors_in

from fastconv import functional
from fastconv.stats import reset_stats, stats

pytestmark = pytest.mark.usefixtures("poisoned")

EXAMPLES = int(os.environ.get("FASTCONV_EXAMPLES", "2000"))
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
PARTS = 2


@st.composite
def inputs(draw) -> tuple[torch.Tensor, tuple[int, int]]:
    """Values with many ties or none, in either format, in a buffer of NaN."""
    channels = draw(st.sampled_from([1, 2, 3, 7, 8, 9, 16, 17, 33]))
    shape = (draw(st.integers(1, 3)), channels, draw(st.integers(1, 17)), draw(st.integers(1, 35)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    dtype = draw(st.sampled_from(DTYPES))
    if draw(st.booleans()):
        values = torch.randint(-2, 3, shape, generator=generator).to(dtype)
    else:
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    last = draw(st.booleans())
    values = guarded(values.to(memory_format=torch.channels_last) if last else values)
    return values, shape[2:]


pairs = st.tuples(st.integers(1, 4), st.integers(1, 5))


@st.composite
def max_pools(draw) -> tuple[str, torch.Tensor, dict[str, Any]]:
    input, size = draw(inputs())
    kernel, dilation = draw(pairs), draw(st.tuples(st.integers(1, 2), st.integers(1, 3)))
    padding = tuple(draw(st.integers(0, kernel[d] // 2)) for d in range(2))
    keywords = {
        "kernel_size": kernel, "stride": draw(st.one_of(st.none(), pairs)), "padding": padding, "dilation": dilation,
        "ceil_mode": draw(st.booleans()), "return_indices": draw(st.booleans()),
    }  # fmt: skip
    steps = keywords["stride"] or kernel
    assume(all(size[d] + 2 * padding[d] > dilation[d] * (kernel[d] - 1) for d in range(2)))
    # A dilated window may step over a small image and see padding only. torch then gives an index outside the plane and
    # writes there in backward (2.13), so there is nothing to compare with; test_edges.py says what ours does.
    for d in range(2):
        taps = [tap * dilation[d] - padding[d] for tap in range(kernel[d])]
        starts = range(0, size[d] + padding[d], steps[d])
        assume(all(any(0 <= start + tap < size[d] for tap in taps) for start in starts))
    return "max_pool2d", input, keywords


@st.composite
def average_pools(draw) -> tuple[str, torch.Tensor, dict[str, Any]]:
    input, size = draw(inputs())
    kernel = draw(pairs)
    padding = tuple(draw(st.integers(0, kernel[d] // 2)) for d in range(2))
    assume(all(size[d] + 2 * padding[d] >= kernel[d] for d in range(2)))
    keywords = {
        "kernel_size": kernel, "stride": draw(st.one_of(st.none(), pairs)), "padding": padding,
        "ceil_mode": draw(st.booleans()), "count_include_pad": draw(st.booleans()),
        "divisor_override": draw(st.sampled_from([None, None, 1, 3, -2])),
    }  # fmt: skip
    return "avg_pool2d", input, keywords


@st.composite
def adaptive_pools(draw) -> tuple[str, torch.Tensor, dict[str, Any]]:
    input, _ = draw(inputs())
    one = st.sampled_from([1, 1, 2, 3, 5, 7, None])
    return "adaptive_avg_pool2d", input, {"output_size": draw(st.tuples(one, one))}


@st.composite
def normalisations(draw) -> tuple[str, torch.Tensor, dict[str, Any]]:
    input, _ = draw(inputs())
    keywords = {
        "size": draw(st.integers(1, 9)), "alpha": draw(st.sampled_from([1e-4, 0.1, 2.0])),
        "beta": draw(st.sampled_from([0.75, 0.5, 1.0, 0.3])), "k": draw(st.sampled_from([1.0, 2.0, 0.5])),
    }  # fmt: skip
    return "local_response_norm", input, keywords


def evaluate(function: Callable[..., Any], input: torch.Tensor, keywords: dict[str, Any]) -> list[torch.Tensor]:
    leaf = input.detach().requires_grad_()
    outputs = tensors_in(function(leaf, **keywords))
    generator = torch.Generator().manual_seed(9)
    gradient = torch.randint(-4, 5, outputs[0].shape, generator=generator).to(input.dtype)
    return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs[0], leaf, gradient)]


KERNELS = {
    "max_pool2d": {"max_pool2d", "max_pool2d_with_offsets", "max_pool2d_backward"},
    # A window over the whole plane is global pooling.
    "avg_pool2d": {"avg_pool2d", "avg_pool2d_backward", "adaptive_avg_pool2d", "adaptive_avg_pool2d_backward"},
    "adaptive_avg_pool2d": {"adaptive_avg_pool2d", "adaptive_avg_pool2d_backward"},
    "local_response_norm": {"local_response_norm", "local_response_norm_backward"},
}


def check(problem: tuple[str, torch.Tensor, dict[str, Any]]) -> None:
    name, input, keywords = problem
    reset_stats()
    mine = evaluate(getattr(functional, name), input, keywords)
    with torch.no_grad():
        alone = tensors_in(getattr(functional, name)(input, **keywords))
    ran = {kernel.split("/")[0] for kernel in stats()}
    assert ran - {"max_pool2d_indices"} <= KERNELS[name], f"{ran} for {keywords}"
    assert len(ran & KERNELS[name]) >= 2
    torchs = getattr(torch.nn.functional, name)
    theirs = or_from_float32(lambda dtype: evaluate(torchs, input.to(dtype), keywords), input.dtype)
    exact = evaluate(torchs, input.double(), keywords)
    what = f"{name} of {tuple(input.shape)} {input.stride()} {input.dtype} {keywords}"
    for number, triple in enumerate(zip(mine, theirs, exact, strict=True)):
        # Sums of up to a few hundred terms: 16 roundings at the RMS.
        assert_as_good(*triple, f"result {number} of {what}", allowed_roundings=16)
    # torch's local_response_norm forgets the memory format; ours keeps the input's, as all the others do.
    wanted = input.stride() if name == "local_response_norm" else theirs[0].stride()
    assert mine[0].stride() == wanted or 1 in mine[0].shape, f"{mine[0].stride()}, expected {wanted}: {what}"
    for one, two in zip(alone, mine, strict=False):
        assert torch.equal(one, two), f"the result depends on whether a gradient is wanted: {what}"


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize(
    ("strategy", "share"),
    [(max_pools(), 0.4), (average_pools(), 0.4), (adaptive_pools(), 0.2), (normalisations(), 0.2)],
    ids=list(KERNELS),
)
def test_random_problems(strategy, share, part):
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    count = max(1, int(EXAMPLES * share / PARTS))
    seed(part)(settings(max_examples=count, suppress_health_check=quiet)(given(strategy)(check)))()
