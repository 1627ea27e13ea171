"""CUDA average, adaptive and global pooling in the emulator: equal to the CPU kernels on whole numbers, near float64 on
others. Outputs are poisoned and guarded, pointers on 64 bytes or one element past them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from cuda_memory import DTYPES, FORMATS, check_guards, explained, generators, same, whole_numbers
from cuda_pools import SOURCES, Pair, Pool, assert_near, checked_library, drawn, gradient_of, lecture_pool
from emulator_library import Library, build, note_error
from torch.nn import functional as F

from fastconv._library import ops as raw


@pytest.fixture(scope="module")
def library() -> Library:
    return build(SOURCES)


@pytest.fixture(scope="module")
def checked() -> Iterator[Library]:
    yield from checked_library()


@dataclass(frozen=True)
class Divisor:
    count_include_pad: bool = True
    override: int | None = None


DIVISORS = [Divisor(), Divisor(False), Divisor(True, 8), Divisor(False, -3)]


def check_average(library: Library, pool: Pool, divisor: Divisor, generator: torch.Generator) -> None:
    x = pool.placed(whole_numbers(pool.shape, pool.dtype, generator, 9))
    options = (pool.kernel, pool.stride, pool.padding, pool.ceil_mode, divisor.count_include_pad, divisor.override)
    problem, numbers = pool.of(x), (divisor.count_include_pad, float(divisor.override or 0))
    # Whole numbers: the sums are exact in any order, and a quotient is rounded once in float32 and once when stored.
    expected = raw.avg_pool2d(x, *options)
    y = pool.fresh(tuple(expected.shape))
    library.call("avg_pool2d", "windows", problem, *numbers, x, y)
    same(y, expected, (pool, divisor))
    note_error("avg_pool2d", "windows", 0)
    grad, grad_input = pool.placed(gradient_of(pool, generator)), pool.fresh(pool.shape)
    library.call("avg_pool2d_backward", "windows", problem, *numbers, grad, grad_input)
    theirs = raw.avg_pool2d_backward(grad, pool.shape[2:], *options)
    exact = raw.avg_pool2d_backward(grad.double(), pool.shape[2:], *options)
    assert_near(grad_input, exact, 8, (pool, divisor), ("avg_pool2d_backward", "windows"))
    if divisor.override == 8:  # shares are exact, too
        same(grad_input, theirs, (pool, divisor))
    check_guards(x, y, grad, grad_input)


def test_average_is_the_cpus_in_drawn_problems(library):
    choose, generator = generators(5)
    for number in range(240):
        check_average(library, drawn(choose, dilated=False), DIVISORS[number % 4], generator)


@pytest.mark.parametrize("name", ["lenet", "lenet-second", "vgg-14"])
def test_average_of_the_lectures_layers(library, name):
    _, generator = generators(6)
    for dtype in DTYPES:
        for memory_format in FORMATS:
            for divisor in DIVISORS:
                check_average(library, lecture_pool(name, dtype, memory_format), divisor, generator)


def test_which_kernel_serves_and_why(library):
    def kernel(pool: Pool, override: float = 0) -> str:
        x, y = pool.fresh(pool.shape), pool.fresh((*pool.shape[:2], *pool.positions()))
        return explained(library, "explain_avg_pool2d", pool.of(x), override, x, y)

    last, first = torch.channels_last, torch.contiguous_format
    assert kernel(lecture_pool("lenet", torch.float32, first)).startswith("square 2: NCHW")
    assert kernel(lecture_pool("lenet-second", torch.float16, last)).startswith("square 2 with 16-byte vectors: NHWC")
    assert kernel(lecture_pool("lenet-second", torch.float16, last, 1)).startswith(
        "general: NHWC, channels or pointers"
    )
    assert kernel(lecture_pool("lenet", torch.float32, first), 3).startswith("general: not whole 2 x 2 windows")
    assert kernel(lecture_pool("alexnet", torch.float32, last)).startswith("general with 16-byte vectors: not whole")


def check_adaptive(library: Library, pool: Pool, size: Pair, generator: torch.Generator) -> None:
    x = pool.placed(torch.randn(pool.shape, generator=generator).to(pool.dtype))
    exact = x.double().requires_grad_()
    theirs = F.adaptive_avg_pool2d(exact, size)
    y = pool.fresh(tuple(theirs.shape))
    library.call("adaptive_avg_pool2d", "windows", pool.of(x), *size, x, y)
    assert_near(y, theirs.detach(), 16, (pool, size), ("adaptive_avg_pool2d", "windows"))
    grad, grad_input = (
        pool.placed(torch.randn(theirs.shape, generator=generator).to(pool.dtype)),
        pool.fresh(pool.shape),
    )
    (expected,) = torch.autograd.grad(theirs, exact, grad.double())
    library.call("adaptive_avg_pool2d_backward", "windows", pool.of(x), *size, grad, grad_input)
    assert_near(grad_input, expected, 16, (pool, size), ("adaptive_avg_pool2d_backward", "windows"))
    whole = pool.placed(whole_numbers(pool.shape, pool.dtype, generator, 9))
    library.call("adaptive_avg_pool2d", "windows", pool.of(x), *size, whole, y)
    if size != (1, 1):
        same(y, raw.adaptive_avg_pool2d(whole, size), (pool, size))
    check_guards(x, y, grad, grad_input)


def test_adaptive_average_is_torchs_in_drawn_problems(library):
    choose, generator = generators(7)
    for number in range(120):
        shape = (choose.randint(1, 2), choose.choice([1, 3, 8, 16]), choose.randint(1, 17), choose.randint(1, 17))
        size = shape[2:] if number % 10 == 0 else (choose.randint(1, 20), choose.randint(1, 20))
        pool = Pool(
            shape, (1, 1), (1, 1), dtype=DTYPES[number % 3], memory_format=choose.choice(FORMATS), shift=number % 2
        )  # fmt: skip
        check_adaptive(library, pool, size, generator)


# ---------------------------------------------------------------- global


def check_global(library: Library, pool: Pool, generator: torch.Generator) -> None:
    what = f"global average of {pool.shape} {pool.dtype} {pool.memory_format} shift {pool.shift}"
    x = pool.placed(torch.randn(pool.shape, generator=generator).to(pool.dtype))
    shape = (*pool.shape[:2], 1, 1)
    y = pool.fresh(shape)
    library.call("adaptive_avg_pool2d", "global", pool.of(x), x, y)
    mean = x.double().mean((2, 3), keepdim=True)
    size = x.double().square().mean((2, 3), keepdim=True).sqrt()
    allowed = 8 * torch.finfo(torch.float32).eps * size + 0.5 * torch.finfo(pool.dtype).eps * mean.abs()
    error = (y.double() - mean).abs()
    note_error("adaptive_avg_pool2d", "global", (error / (torch.finfo(pool.dtype).eps * size)).max().item())
    assert (error <= allowed + torch.finfo(pool.dtype).tiny).all(), what
    whole = pool.placed(whole_numbers(pool.shape, pool.dtype, generator, 9))
    library.call("adaptive_avg_pool2d", "global", pool.of(x), whole, y)
    same(y, raw.adaptive_avg_pool2d(whole, (1, 1)), what)
    grad, grad_input = pool.placed(torch.randn(shape, generator=generator).to(pool.dtype)), pool.fresh(pool.shape)
    library.call("adaptive_avg_pool2d_backward", "global", pool.of(x), grad, grad_input)
    same(grad_input, (grad.float() / (pool.shape[2] * pool.shape[3])).to(pool.dtype).expand(pool.shape), what)
    note_error("adaptive_avg_pool2d_backward", "global", 0)
    check_guards(x, y, whole, grad, grad_input)


GLOBAL_SHAPES = [
    (2, 64, 7, 7), (1, 24, 7, 7), (2, 33, 7, 7), (1, 70, 1, 1), (3, 5, 1, 2), (2, 3, 14, 14), (1, 2, 40, 64),
    (1, 3, 37, 41), (2, 264, 2, 3), (1, 8, 61, 67),
]  # fmt: skip


@pytest.mark.parametrize("shape", GLOBAL_SHAPES, ids=str)
def test_global_average(library, shape):
    _, generator = generators(8)
    for dtype in DTYPES:
        for memory_format in FORMATS:
            for shift in (0, 1):
                check_global(
                    library, Pool(shape, (1, 1), (1, 1), (0, 0), (1, 1), False, dtype, memory_format, shift), generator
                )


def test_global_average_of_a_large_plane_keeps_its_digits(library):
    for memory_format in FORMATS:
        pool = Pool((1, 1, 700, 640), (1, 1), (1, 1), memory_format=memory_format)
        x = pool.placed(torch.rand(pool.shape) + 1)
        y = pool.fresh((1, 1, 1, 1))
        library.call("adaptive_avg_pool2d", "global", pool.of(x), x, y)
        assert abs(y.item() / x.double().mean().item() - 1) < 4 * torch.finfo(torch.float32).eps


def test_in_slices_and_without_races(checked):
    choose, generator = generators(10)
    before = checked.statistics()["launches"]
    for _ in range(40):
        pool = replace(drawn(choose), dilation=(1, 1))
        check_average(checked, pool, Divisor(), generator)
        check_adaptive(checked, pool, (choose.randint(2, 9), choose.randint(2, 9)), generator)
    assert checked.statistics()["launches"] - before > 40 * 5 + 40, "hardly a problem was launched in slices"
    for memory_format in FORMATS:
        for dtype in DTYPES:
            for shape in [(2, 40, 7, 7), (1, 90, 7, 7), (1, 3, 14, 14), (1, 1, 40, 64)]:
                check_global(checked, Pool(shape, (1, 1), (1, 1), dtype=dtype, memory_format=memory_format), generator)


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 0, 4, 4)], ids=["images", "channels"])
def test_nothing_to_pool(library, shape):
    for memory_format in FORMATS:
        pool = Pool(shape, (2, 2), (2, 2), memory_format=memory_format)
        x, y, global_y = pool.fresh(shape), pool.fresh((*shape[:2], 2, 2)), pool.fresh((*shape[:2], 1, 1))
        library.call("max_pool2d", "windows", pool.of(x), x, y, None)
        library.call("avg_pool2d", "windows", pool.of(x), True, 0.0, x, y)
        library.call("avg_pool2d_backward", "windows", pool.of(x), True, 0.0, y, x)
        library.call("adaptive_avg_pool2d", "windows", pool.of(x), 2, 2, x, y)
        library.call("adaptive_avg_pool2d", "global", pool.of(x), x, global_y)
        library.call("adaptive_avg_pool2d_backward", "global", pool.of(x), global_y, x)


def test_sizes_beyond_32_bits_are_refused(library):
    """torch takes a stride of 2^31 - 1; 32-bit positions plus it would overflow."""
    pool = Pool((1, 1, 8, 10), (1, 1), (1, 2**31 - 1))
    x, y = pool.fresh(pool.shape), pool.fresh((1, 1, 8, 1))
    with pytest.raises(RuntimeError, match="a size of 2147483647, expected at most 1073741823"):
        library.call("avg_pool2d_backward", "windows", pool.of(x), True, 0.0, y, x)
