"""CUDA local response normalisation in the emulator: near float64's results, and as near as the CPU kernels."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from cuda_memory import DTYPES, FORMATS, check_guards, explained, fresh, generators, placed
from emulator_library import DType, Library, build, note_error
from torch import Tensor

from fastconv._library import ops as raw

SOURCES = ["csrc/norm/cuda_response.cu"]


class NormProblem(ctypes.Structure):
    """csrc/norm/norm.h"""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n", "c", "plane", "size")),
        *((name, ctypes.c_double) for name in ("scale", "beta", "k")),
        ("layout", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class Norm:
    shape: tuple[int, int, int, int]
    size: int = 5
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 2
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    shift: int = 0

    def problem(self) -> NormProblem:
        n, c, h, w = self.shape
        dtype = DType[str(self.dtype).removeprefix("torch.")]
        layout = int(self.memory_format == torch.channels_last)
        return NormProblem(n, c, h * w, self.size, self.alpha / self.size, self.beta, self.k, layout, dtype)

    @property
    def numbers(self) -> tuple[int, float, float, float]:
        return self.size, self.alpha, self.beta, self.k

    def placed(self, values: Tensor) -> Tensor:
        return placed(values.to(self.dtype), self.memory_format, self.shift)

    def fresh(self) -> Tensor:
        return fresh(self.shape, self.dtype, self.memory_format, self.shift)


@pytest.fixture(scope="module")
def library() -> Library:
    return build(SOURCES)


@pytest.fixture(scope="module")
def checked() -> Iterator[Library]:
    library = build(SOURCES, "checked")
    library.configure(check_races=True)
    yield library
    library.configure()


def run(library: Library, norm: Norm, x: Tensor, other: Tensor) -> list[Tensor]:
    """Forward, derivative along `other`, gradient for `other`."""
    y, y_tangent, grad_input = norm.fresh(), norm.fresh(), norm.fresh()
    library.call("local_response_norm", "channels", norm.problem(), x, y)
    library.call("local_response_norm_jvp", "channels", norm.problem(), x, other, y_tangent)
    library.call("local_response_norm_backward", "channels", norm.problem(), other, x, grad_input)
    check_guards(x, other, y, y_tangent, grad_input)
    return [y, y_tangent, grad_input]


def run_on_cpu(norm: Norm, x: Tensor, other: Tensor) -> list[Tensor]:
    return [
        raw.local_response_norm(x, *norm.numbers),
        raw.local_response_norm_jvp(x, other, *norm.numbers),
        raw.local_response_norm_backward(other, x, *norm.numbers),
    ]


def check(library: Library, norm: Norm, x: Tensor, other: Tensor) -> None:
    x, other = norm.placed(x), norm.placed(other)
    exact = run_on_cpu(norm, x.double(), other.double())
    eps = torch.finfo(norm.dtype)
    # The powers come from two or three operations of two units each, the sums from `size` terms.
    terms = (16 + norm.size) * torch.finfo(torch.float32).eps
    for suffix, actual, value in zip(("", "_jvp", "_backward"), run(library, norm, x, other), exact, strict=True):
        op = f"local_response_norm{suffix}"
        assert not actual.isnan().any(), f"{op} of {norm}"
        scale = value.abs() + value.square().mean().sqrt() + eps.tiny / eps.eps
        error = (actual.double() - value).abs() / scale
        note_error(op, "channels", error.max().item() / eps.eps)
        allowed = terms + 0.5 * eps.eps
        assert (error <= allowed).all(), f"{op} of {norm}: off by {error.max():.3g} of its size, allowed {allowed:.3g}"


def drawn(choose: random.Random, number: int) -> Norm:
    shape = (
        choose.randint(1, 2),
        choose.choice([1, 2, 3, 4, 5, 8, 16, 24, 33, 40, 64]),
        choose.randint(1, 6),
        choose.choice([1, 2, 4, 5, 8, 11]),
    )
    size = 5 if choose.random() < 0.7 else choose.choice([1, 2, 3, 4, 6, 7, 9, 70])
    beta = 0.75 if choose.random() < 0.7 else choose.choice([0.5, 1.0, 0.6, 2.0])
    return Norm(
        shape, size, choose.choice([1e-4, 1.0]), beta, choose.choice([1.0, 2.0, 0.5]), DTYPES[number % 3],
        choose.choice(FORMATS), choose.choice([0, 0, 1]),
    )  # fmt: skip


def test_drawn_problems(library):
    choose, generator = generators(1)
    for number in range(240):
        norm = drawn(choose, number)
        check(library, norm, *torch.randn((2, *norm.shape), generator=generator))


def test_which_kernel_serves_and_why(library):
    def kernel(norm: Norm) -> str:
        x = norm.fresh()
        return explained(library, "explain_local_response_norm", norm.problem(), x, None, x, algo="channels")

    last = torch.channels_last
    assert kernel(Norm((2, 96, 5, 55))).startswith("walk: NCHW, planes or pointers not on vectors")
    assert kernel(Norm((2, 96, 8, 8), dtype=torch.float16)).startswith("walk with vectors: NCHW")
    assert kernel(Norm((2, 96, 5, 55), memory_format=last)).startswith("channels with vectors: NHWC")
    assert kernel(Norm((2, 96, 5, 55), memory_format=last, shift=1)).startswith("any: NHWC, channels or pointers")
    assert kernel(Norm((2, 96, 5, 55), size=3)).startswith("any: not a window of five")
    assert kernel(Norm((2, 96, 5, 55), beta=0.5)).startswith("any: an exponent other than 3/4")


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [(2, 96, 5, 55), (2, 256, 3, 27), (1, 96, 8, 8)], ids=str)
def test_alexnets_layers(library, shape, memory_format):
    _, generator = generators(2)
    for dtype in DTYPES:
        for shift in (0, 1):
            norm = Norm(shape, dtype=dtype, memory_format=memory_format, shift=shift)
            check(library, norm, *torch.randn((2, *norm.shape), generator=generator))


def check_edges(library: Library, memory_format: torch.memory_format, size: int, generator: torch.Generator) -> None:
    """k = 0 over zeros divides by zero; 1e20 squared is infinite in float32. Edges must not invent NaN."""
    for k, large in ((0.0, 1.0), (1.0, 1e20)):
        norm = Norm((1, 24, 2, 4), size, 1.0, 0.75, k, memory_format=memory_format)
        values = torch.randn(norm.shape, generator=generator) * 0.5 + 1
        values[:, 5] = large
        values[:, [0, -1]] = 0  # with k = 0 the divisor of a channel that does not exist is zero, too
        x, other = norm.placed(values), norm.placed(torch.randn(norm.shape, generator=generator))
        for actual, expected in zip(run(library, norm, x, other), run_on_cpu(norm, x, other), strict=True):
            assert torch.equal(actual.isnan(), expected.isnan()), norm
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
        zeros = norm.placed(torch.zeros(norm.shape))
        actual, expected = run(library, norm, zeros, other), run_on_cpu(norm, zeros, other)
        assert torch.equal(actual[0].isnan(), expected[0].isnan()), norm


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("size", [5, 3])
def test_zero_and_infinite_divisors_are_the_cpus(library, memory_format, size):
    check_edges(library, memory_format, size, torch.Generator().manual_seed(3))


def test_nothing_to_normalise(library):
    for shape in ((0, 8, 4, 4), (2, 0, 4, 4)):
        for memory_format in FORMATS:
            norm = Norm(shape, memory_format=memory_format)
            run(library, norm, norm.fresh(), norm.fresh())


def test_planes_of_more_than_32_bits_do_not_walk(library):
    problem = NormProblem(1, 8, 1 << 33, 5, 1e-4, 0.75, 2.0, 0, int(DType.float16))
    why = explained(library, "explain_local_response_norm", problem, None, None, None, algo="channels")
    assert why.startswith("any: 2^31 pixels")


def test_kernels_do_not_race(checked):
    choose, generator = generators(4)
    for number in range(20):
        norm = drawn(choose, number)
        check(checked, norm, *torch.randn((2, *norm.shape), generator=generator))
