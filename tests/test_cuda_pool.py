"""CUDA max pooling in the emulator: equal to the CPU kernels, in whole numbers, NaN, infinities and ties.

Every output is poisoned and guarded, pointers are on 64 bytes or one element past them, and a few hundred problems are
drawn besides the lecture's.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cuda_memory import DTYPES, FORMATS, check_guards, explained, generators, same, whole_numbers
from cuda_pools import LECTURE, SOURCES, Pool, assert_near, checked_library, drawn, gradient_of, lecture_pool
from emulator_library import Library, build, note_error
from torch import Tensor
from torch.nn import functional as F

from fastconv._library import ops as raw

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def library() -> Library:
    return build(SOURCES)


@pytest.fixture(scope="module")
def checked() -> Iterator[Library]:
    yield from checked_library()


def check_max(library: Library, pool: Pool, values: Tensor, gradient: Tensor) -> str:
    """All five max ops against the CPU kernels; returns which kernel served the forward pass."""
    x = pool.placed(values)
    problem = pool.of(x)
    expected, expected_offsets = raw.max_pool2d_with_offsets(x, *pool.window, pool.ceil_mode)
    shape = tuple(expected.shape)
    y, alone, offsets = pool.fresh(shape), pool.fresh(shape), pool.fresh(shape, expected_offsets.dtype)
    library.call("max_pool2d", "windows", problem, x, y, offsets)
    library.call("max_pool2d", "windows", problem, x, alone, None)
    same(y, expected, pool)
    same(alone, expected, pool)
    indices = pool.fresh(shape, torch.int64)
    library.call("max_pool2d_indices", "windows", problem, offsets, indices)
    rows, columns = indices // pool.shape[3], indices % pool.shape[3]
    inside = (indices >= 0) & (rows < pool.shape[2])
    if not pool_may_have_empty_windows(pool):
        assert (inside & (columns >= 0)).all(), pool
        same(offsets, expected_offsets, pool)
        same(indices, raw.max_pool2d_indices(expected_offsets, pool.shape[2:], *pool.window), pool)
    picked = pool.fresh(shape)
    library.call("max_pool2d_gather", "windows", problem, x, offsets, picked)
    same(picked, raw.max_pool2d_gather(x, offsets, *pool.window), pool)
    grad, grad_input = pool.placed(gradient.expand(shape).to(pool.dtype)), pool.fresh(pool.shape)
    library.call("max_pool2d_backward", "windows", problem, grad, offsets, grad_input)
    same(grad_input, raw.max_pool2d_backward(grad, offsets, pool.shape[2:], *pool.window), pool)
    check_guards(x, y, alone, offsets, indices, picked, grad, grad_input)
    for op in ("max_pool2d", "max_pool2d_indices", "max_pool2d_gather", "max_pool2d_backward"):
        note_error(op, "windows", 0)
    return explained(library, "explain_max_pool2d", problem, x, y, offsets)


def pool_may_have_empty_windows(pool: Pool) -> bool:
    """Then offsets name no element, and which number says so is each kernel's choice."""
    return pool.dilation != (1, 1) and pool.padding != (0, 0)


def spiced(values: Tensor, kind: int, generator: torch.Generator) -> Tensor:
    """Ties come by themselves; kind 1 adds NaN, kind 2 infinities."""
    chance = torch.rand(values.shape, generator=generator)
    if kind == 1:
        return values.masked_fill(chance < 0.1, NAN)
    if kind == 2:
        return values.masked_fill(chance < 0.6, -INF).masked_fill(chance > 0.95, INF)
    return values


def test_max_is_the_cpus_in_drawn_problems(library):
    choose, generator = generators(1)
    kernels: dict[str, int] = {}
    for number in range(300):
        pool = drawn(choose)
        values = spiced(whole_numbers(pool.shape, pool.dtype, generator), number % 3, generator)
        kernel = check_max(library, pool, values, gradient_of(pool, generator)).split(":")[0]
        kernels[kernel] = kernels.get(kernel, 0) + 1
    wanted = {f"{path} with 16-byte vectors" for path in ("rows 2", "rows 3", "square 2", "square 3", "general")}
    assert set(kernels) == wanted | {"square 2", "square 3", "general"}, kernels
    assert min(kernels.values()) >= 3, kernels


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", LECTURE)
def test_max_of_the_lectures_layers(library, name, memory_format):
    _, generator = generators(2)
    for dtype in DTYPES:
        for shift in (0, 1):
            pool = lecture_pool(name, dtype, memory_format, shift)
            values = torch.randn(pool.shape, generator=generator).to(dtype)
            check_max(library, pool, values, gradient_of(pool, generator))


def test_max_takes_wide_kernels_where_memory_allows(library):
    def kernel(name: str, dtype: torch.dtype, memory_format: torch.memory_format, shift: int = 0) -> str:
        pool = lecture_pool(name, dtype, memory_format, shift)
        return check_max(library, pool, torch.zeros(pool.shape, dtype=dtype), torch.zeros((), dtype=dtype)).split(":")[
            0
        ]

    last, first = torch.channels_last, torch.contiguous_format
    assert kernel("vgg", torch.float16, first) == "rows 2 with 16-byte vectors"
    assert kernel("resnet", torch.float16, first) == "rows 3 with 16-byte vectors"
    assert kernel("resnet", torch.float16, last) == "square 3 with 16-byte vectors"
    assert kernel("alexnet", torch.bfloat16, first) == "square 3"
    assert kernel("vgg", torch.float32, first, 1) == "square 2"
    assert kernel("vgg", torch.float32, last, 1) == "general"


def test_max_of_windows_of_more_than_255_taps(library):
    _, generator = generators(3)
    for dtype in DTYPES:
        for memory_format in FORMATS:
            pool = Pool((2, 16, 21, 20), (16, 17), (2, 1), (3, 8), dtype=dtype, memory_format=memory_format)
            check_max(library, pool, whole_numbers(pool.shape, dtype, generator, 100), gradient_of(pool, generator))


def test_max_of_a_window_without_elements(library):
    # One row of windows with taps at -1 and 2, rows 0 and 1: nothing to see.
    for memory_format in FORMATS:
        pool = Pool((1, 8, 2, 6), (2, 2), (1, 1), (1, 1), (3, 1), memory_format=memory_format)
        x = pool.placed(torch.ones(pool.shape))
        shape = (1, 8, *pool.positions())
        y, offsets, picked = pool.fresh(shape), pool.fresh(shape, torch.uint8), pool.fresh(shape)
        grad_input = pool.fresh(pool.shape)
        library.call("max_pool2d", "windows", pool.of(x), x, y, offsets)
        library.call("max_pool2d_gather", "windows", pool.of(x), x, offsets, picked)
        library.call("max_pool2d_backward", "windows", pool.of(x), y, offsets, grad_input)
        assert (y == -INF).all()
        assert (picked == 0).all()
        assert (grad_input == 0).all()


def test_max_gradient_of_random_numbers(library):
    """Sums of several gradients, which are rounded: float32's rounding, then the type's."""
    _, generator = generators(4)
    for dtype in DTYPES:
        for memory_format in FORMATS:
            pool = Pool((2, 16, 15, 16), (3, 3), (2, 2), (1, 1), dtype=dtype, memory_format=memory_format)
            x = pool.placed(torch.randn(pool.shape, generator=generator).to(dtype))
            exact = x.double().requires_grad_()
            theirs = F.max_pool2d(exact, *pool.window)
            grad = pool.placed(torch.randn(theirs.shape, generator=generator).to(dtype))
            (expected,) = torch.autograd.grad(theirs, exact, grad.double())
            y, offsets = pool.fresh(tuple(theirs.shape)), pool.fresh(tuple(theirs.shape), torch.uint8)
            grad_input = pool.fresh(pool.shape)
            library.call("max_pool2d", "windows", pool.of(x), x, y, offsets)
            library.call("max_pool2d_backward", "windows", pool.of(x), grad, offsets, grad_input)
            assert_near(grad_input, expected, 4, pool, ("max_pool2d_backward", "windows"))


def test_float64_is_refused_with_a_remedy(library):
    x = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    pool = Pool((1, 1, 4, 4), (2, 2), (2, 2), dtype=torch.float64)
    with pytest.raises(RuntimeError, match="max_pool2d: got float64, expected float32, float16 or bfloat16"):
        library.call("max_pool2d", "windows", pool.of(x), x, x, None)


def test_in_slices_and_without_races(checked):
    choose, generator = generators(9)
    before = checked.statistics()["launches"]
    for _ in range(60):
        pool = drawn(choose)
        check_max(checked, pool, whole_numbers(pool.shape, pool.dtype, generator), gradient_of(pool, generator))
    assert checked.statistics()["launches"] - before > 60 * 5 + 60, "hardly a problem was launched in slices"
