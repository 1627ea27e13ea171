"""CUDA pooling kernels in the emulator: equal to the CPU kernels on whole numbers, near float64 on others.

Every output is poisoned and guarded, pointers are on 16 bytes or one element past them, and a few hundred problems are
drawn besides the lecture's.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from cuda_memory import DTYPES, FORMATS, check_guards, fresh, generators, placed, same, whole_numbers
from emulator_library import Library, PoolProblem, build
from torch import Tensor
from torch.nn import functional as F

from fastconv._library import ops as raw

SOURCES = [f"csrc/pool/cuda_{name}.cu" for name in ("max", "max_backward", "max_offsets", "average", "global")]
NAN, INF = float("nan"), float("inf")
Pair = tuple[int, int]


@pytest.fixture(scope="module")
def library() -> Library:
    return build(SOURCES)


@pytest.fixture(scope="module")
def small_launches() -> Library:
    """Launches of at most 700 threads' work, so that ordinary problems are launched in slices."""
    return build(SOURCES, defines=["FASTCONV_UNITS_PER_LAUNCH=700"])


@pytest.fixture(scope="module")
def checked() -> Iterator[Library]:
    library = build(SOURCES, "checked")
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


# ---------------------------------------------------------------- max


def explained(library: Library, pool: Pool, wide: Tensor, narrow: Tensor, offsets: Tensor | None) -> str:
    text = torch.zeros(200, dtype=torch.uint8)
    library.call("explain_max_pool2d", "windows", pool.of(wide), wide, narrow, offsets, text, text.numel())
    return bytes(text.tolist()).split(b"\0")[0].decode()


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
    return explained(library, pool, x, y, offsets)


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


def gradient_of(pool: Pool, generator: torch.Generator) -> Tensor:
    return whole_numbers((pool.shape[0], pool.shape[1], *pool.positions()), pool.dtype, generator)


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
            assert_near(grad_input, expected, 4, pool)


def test_float64_is_refused_with_a_remedy(library):
    x = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    pool = Pool((1, 1, 4, 4), (2, 2), (2, 2), dtype=torch.float64)
    with pytest.raises(RuntimeError, match="max_pool2d: got float64, expected float32, float16 or bfloat16"):
        library.call("max_pool2d", "windows", pool.of(x), x, x, None)


# ---------------------------------------------------------------- average


def assert_near(actual: Tensor, exact: Tensor, terms: int, what: object) -> None:
    """Within what adding `terms` numbers in float32 and rounding to the type may lose, at the result's size."""
    assert not actual.isnan().any(), what
    scale = exact.abs() + exact.square().mean().sqrt()
    allowed = (torch.finfo(torch.float32).eps * terms + 0.5 * torch.finfo(actual.dtype).eps) * scale
    error = (actual.double() - exact).abs()
    assert (error <= allowed + torch.finfo(actual.dtype).tiny).all(), (
        f"{what}: off by {(error / scale).max():.3g} of {scale.max():.3g}"
    )


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
    grad, grad_input = pool.placed(gradient_of(pool, generator)), pool.fresh(pool.shape)
    library.call("avg_pool2d_backward", "windows", problem, *numbers, grad, grad_input)
    theirs = raw.avg_pool2d_backward(grad, pool.shape[2:], *options)
    exact = raw.avg_pool2d_backward(grad.double(), pool.shape[2:], *options)
    assert_near(grad_input, exact, 8, (pool, divisor))
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


def check_adaptive(library: Library, pool: Pool, size: Pair, generator: torch.Generator) -> None:
    x = pool.placed(torch.randn(pool.shape, generator=generator).to(pool.dtype))
    exact = x.double().requires_grad_()
    theirs = F.adaptive_avg_pool2d(exact, size)
    y = pool.fresh(tuple(theirs.shape))
    library.call("adaptive_avg_pool2d", "windows", pool.of(x), *size, x, y)
    assert_near(y, theirs.detach(), 16, (pool, size))
    grad, grad_input = (
        pool.placed(torch.randn(theirs.shape, generator=generator).to(pool.dtype)),
        pool.fresh(pool.shape),
    )
    (expected,) = torch.autograd.grad(theirs, exact, grad.double())
    library.call("adaptive_avg_pool2d_backward", "windows", pool.of(x), *size, grad, grad_input)
    assert_near(grad_input, expected, 16, (pool, size))
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
    assert ((y.double() - mean).abs() <= allowed + torch.finfo(pool.dtype).tiny).all(), what
    whole = pool.placed(whole_numbers(pool.shape, pool.dtype, generator, 9))
    library.call("adaptive_avg_pool2d", "global", pool.of(x), whole, y)
    same(y, raw.adaptive_avg_pool2d(whole, (1, 1)), what)
    grad, grad_input = pool.placed(torch.randn(shape, generator=generator).to(pool.dtype)), pool.fresh(pool.shape)
    library.call("adaptive_avg_pool2d_backward", "global", pool.of(x), grad, grad_input)
    same(grad_input, (grad.float() / (pool.shape[2] * pool.shape[3])).to(pool.dtype).expand(pool.shape), what)
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


# ---------------------------------------------------------------- launches and races


def test_problems_beyond_one_launch(small_launches):
    choose, generator = generators(9)
    before = small_launches.statistics()["launches"]
    for _ in range(40):
        pool = replace(drawn(choose), dtype=torch.float32)
        check_max(small_launches, pool, whole_numbers(pool.shape, pool.dtype, generator), gradient_of(pool, generator))
        check_average(small_launches, replace(pool, dilation=(1, 1)), Divisor(), generator)
    for shape in GLOBAL_SHAPES[:4]:
        for memory_format in FORMATS:
            check_global(small_launches, Pool(shape, (1, 1), (1, 1), memory_format=memory_format), generator)
    assert small_launches.statistics()["launches"] - before > 40 * 8 + 100, "no problem was launched in slices"


def test_kernels_do_not_race(checked):
    choose, generator = generators(10)
    for memory_format in FORMATS:
        for dtype in DTYPES:
            for shape in [(2, 40, 7, 7), (1, 3, 14, 14), (1, 1, 40, 64)]:
                check_global(checked, Pool(shape, (1, 1), (1, 1), dtype=dtype, memory_format=memory_format), generator)
    for _ in range(20):
        pool = drawn(choose)
        check_max(checked, pool, whole_numbers(pool.shape, pool.dtype, generator), gradient_of(pool, generator))
        check_average(checked, replace(pool, dilation=(1, 1)), Divisor(), generator)
