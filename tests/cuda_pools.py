"""Pooling problems for the emulated CUDA kernels, and where their tensors lie in memory."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from cuda_memory import DTYPES, FORMATS, fresh, placed, whole_numbers
from emulator_library import Library, PoolProblem, build, note_error
from torch import Tensor

SOURCES = [f"csrc/pool/cuda_{name}.cu" for name in ("max", "max_backward", "max_offsets", "average", "global")]
UNITS_PER_LAUNCH = 700
Pair = tuple[int, int]


def checked_library() -> Iterator[Library]:
    """Checks for races, and launches of at most 700 threads' work, so that ordinary problems are launched in slices."""
    library = build(SOURCES, "checked", [f"FASTCONV_UNITS_PER_LAUNCH={UNITS_PER_LAUNCH}"])
    library.configure(check_races=True)
    yield library
    library.configure()


@dataclass(frozen=True)
class Pool:
    """A pooling and how its tensors lie in memory."""

    shape: tuple[int, int, int, int]
    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    ceil_mode: bool = False
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    shift: int = 0  # elements that every tensor lies past 64 bytes

    @property
    def window(self) -> tuple[Pair, Pair, Pair, Pair]:
        return self.kernel, self.stride, self.padding, self.dilation

    def of(self, x: Tensor) -> PoolProblem:
        layout = int(self.memory_format == torch.channels_last)
        problem = PoolProblem.of(x.contiguous(), *self.window, self.ceil_mode)
        problem.layout = layout  # a tensor of one channel or one pixel does not tell
        return problem

    def positions(self) -> Pair:
        def along(axis: int) -> int:
            size, pad = self.shape[2 + axis], self.padding[axis]
            span = size + 2 * pad - self.dilation[axis] * (self.kernel[axis] - 1) - 1
            if span < 0:
                return 0
            count = (span + (self.stride[axis] - 1 if self.ceil_mode else 0)) // self.stride[axis] + 1
            return count - 1 if self.ceil_mode and (count - 1) * self.stride[axis] >= size + pad else count

        return along(0), along(1)

    def fresh(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        return fresh(shape, dtype or self.dtype, self.memory_format, self.shift)

    def placed(self, values: Tensor) -> Tensor:
        return placed(values, self.memory_format, self.shift)


def drawn(choose: random.Random, dilated: bool = True) -> Pool:
    """A problem that has at least one window."""
    while True:
        dilation = (1, 1)
        if choose.random() < 0.6:  # what the unrolled kernels know
            kernel, stride = choose.choice([(2, 2), (3, 3)]), (2, 2)
            padding = choose.choice([(0, 0), (1, 1)])
        else:
            kernel, stride = choose.choices(range(1, 6), k=2), choose.choices(range(1, 4), k=2)
            padding = (choose.randint(0, kernel[0] // 2), choose.randint(0, kernel[1] // 2))
            if dilated:
                dilation = (choose.randint(1, 2), choose.randint(1, 3))
        shape = (
            choose.randint(1, 3),
            choose.choice([1, 3, 8, 16, 20, 24]),
            choose.randint(1, 19),
            choose.choice([1, 2, 5, 7, 8, 13, 14, 16, 24, 32]),
        )
        pool = Pool(
            shape, tuple(kernel), tuple(stride), padding, dilation, choose.random() < 0.3, choose.choice(DTYPES),
            choose.choice(FORMATS), choose.choice([0, 0, 1]),
        )  # fmt: skip
        if min(pool.positions()) > 0:
            return pool


def gradient_of(pool: Pool, generator: torch.Generator) -> Tensor:
    return whole_numbers((pool.shape[0], pool.shape[1], *pool.positions()), pool.dtype, generator)


LECTURE = {  # (channels, height, width), kernel, stride, padding: the lecture's pools with fewer channels and rows
    "lenet": ((6, 28, 28), 2, 2, 0),
    "lenet-second": ((16, 10, 10), 2, 2, 0),
    "alexnet": ((8, 11, 55), 3, 2, 0),
    "alexnet-second": ((16, 27, 27), 3, 2, 0),
    "alexnet-last": ((24, 13, 13), 3, 2, 0),
    "vgg": ((8, 6, 224), 2, 2, 0),
    "vgg-112": ((8, 6, 112), 2, 2, 0),
    "vgg-56": ((8, 8, 56), 2, 2, 0),
    "vgg-28": ((16, 28, 28), 2, 2, 0),
    "vgg-14": ((16, 14, 14), 2, 2, 0),
    "resnet": ((8, 13, 112), 3, 2, 1),
}


def lecture_pool(name: str, dtype: torch.dtype, memory_format: torch.memory_format, shift: int = 0) -> Pool:
    shape, kernel, stride, padding = LECTURE[name]
    return Pool(
        (2, *shape), (kernel,) * 2, (stride,) * 2, (padding,) * 2, dtype=dtype, memory_format=memory_format, shift=shift
    )  # fmt: skip


def assert_near(actual: Tensor, exact: Tensor, terms: int, what: object, kernel: tuple[str, str]) -> None:
    """Within what adding `terms` numbers in float32 and rounding to the type may lose, at the result's size.

    Notes the error in units of the type's eps at that size.
    """
    assert not actual.isnan().any(), what
    eps = torch.finfo(actual.dtype)
    scale = exact.abs() + exact.square().mean().sqrt() + eps.tiny / eps.eps
    error = (actual.double() - exact).abs() / scale
    note_error(*kernel, error.max().item() / eps.eps)
    allowed = torch.finfo(torch.float32).eps * terms + 0.5 * eps.eps
    assert (error <= allowed).all(), f"{what}: off by {error.max():.3g} of the result's size, allowed {allowed:.3g}"
