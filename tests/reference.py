"""The yardstick: convolution problems, their float64 results, and how far a result may be from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fastconv.ops import conv2d as ops
from fastconv.stats import stats


def kernel_counts() -> dict[str, int]:
    """:func:`fastconv.stats` with "<op>/<algo>" for the kernels of any device, also of the emulated one."""
    return {name.removeprefix("cuda/").removeprefix("emulated/"): count for name, count in stats().items()}


GUARD = 37  # odd: guarded tensors are never aligned to a vector


def guarded(values: Tensor, guard: int = GUARD) -> Tensor:
    """The same values and strides inside a buffer of NaN: what is read outside the tensor shows in the result.

    ``guard`` elements before and after; a multiple of 8 leaves vectors aligned.
    """
    if not values.is_floating_point():
        return values
    extent = 1 + sum((size - 1) * stride for size, stride in zip(values.shape, values.stride(), strict=True))
    extent = max(extent, 0) if values.numel() else 0
    buffer = torch.full((extent + 2 * guard,), float("nan"), dtype=values.dtype)
    view = buffer.as_strided(values.shape, values.stride(), guard)
    return view.copy_(values)


def guard_is_untouched(view: Tensor) -> bool:
    buffer = torch.tensor([], dtype=view.dtype).set_(view.untyped_storage())
    return bool(buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all())


@dataclass(frozen=True)
class Conv:
    """A convolution with all it needs to be run; ``padding`` is (top, left, bottom, right)."""

    n: int = 2
    groups: int = 1
    c_per_group: int = 3
    k_per_group: int = 4
    size: tuple[int, int] = (7, 8)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    bias: bool = True
    dtype: torch.dtype = torch.float32
    layouts: tuple[bool, bool, bool] = (False, False, False)  # input, weight, gradient in channels_last?
    algo: str | None = None
    integers: bool = False
    seed: int = 0

    @property
    def params(self) -> tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int], int]:
        return self.stride, self.padding, self.dilation, self.groups

    def with_algo(self, algo: str | None) -> Conv:
        return replace(self, algo=algo)

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        (h, w), (r, s) = self.size, self.kernel
        top, left, bottom, right = self.padding
        p = (h + top + bottom - self.dilation[0] * (r - 1) - 1) // self.stride[0] + 1
        q = (w + left + right - self.dilation[1] * (s - 1) - 1) // self.stride[1] + 1
        c, k = self.groups * self.c_per_group, self.groups * self.k_per_group
        return (self.n, c, h, w), (k, self.c_per_group, r, s), (self.n, k, p, q)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """input, weight, bias, gradient of the output: each in a buffer of NaN, requiring no gradient."""
        generator = torch.Generator().manual_seed(self.seed)

        def values(shape: Sequence[int], channels_last: bool = False) -> Tensor:
            if self.integers:
                result = torch.randint(-3, 4, shape, generator=generator).to(self.dtype)
            else:
                result = torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)
            return guarded(result.to(memory_format=torch.channels_last) if channels_last else result)

        shapes = self.shapes()
        input, weight, grad = (values(shape, last) for shape, last in zip(shapes, self.layouts, strict=True))
        return input, weight, values(shapes[1][:1]) if self.bias else None, grad


def torch_conv(problem: Conv, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    top, left, bottom, right = problem.padding
    # Not by conv2d itself, which crashes in cases: torch 2.13, channels_last, 9x1, 2x2 dilated by 2, padding (1, 3).
    padded = F.pad(input, (left, right, top, bottom))
    return F.conv2d(padded, weight, bias, problem.stride, 0, problem.dilation, problem.groups)


Results = dict[str, Tensor]
RESULTS = ("output", "input", "weight", "bias")  # the output, and the gradients of the other three


def differentiate(problem: Conv, input: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor) -> Results:
    """torch's output and gradients for the given tensors, in their own precision."""
    leaves = [t.detach().requires_grad_() for t in (input, weight, bias) if t is not None]
    output = torch_conv(problem, leaves[0], leaves[1], leaves[2] if bias is not None else None)
    grads = torch.autograd.grad(output, leaves, grad)
    return dict(zip(RESULTS, (output.detach(), *grads), strict=False))


def results_by_torch(problem: Conv, dtype: torch.dtype) -> Results:
    return differentiate(problem, *(None if t is None else t.to(dtype) for t in problem.tensors()))


def results_by_fastconv(problem: Conv) -> Results:
    input, weight, bias, grad = problem.tensors()
    leaves = [t.requires_grad_() for t in (input, weight, bias) if t is not None]
    output = ops.conv2d(input, weight, bias, *problem.params, problem.algo)
    grads = torch.autograd.grad(output, leaves, grad)
    with torch.no_grad():
        alone = ops.conv2d(input, weight, bias, *problem.params, problem.algo)
    assert torch.equal(alone, output), "the result depends on whether a gradient is wanted"
    assert all(guard_is_untouched(t.detach()) for t in (*leaves, grad))
    return dict(zip(RESULTS, (output.detach(), *grads), strict=False))


def allowances(problem: Conv) -> Results:
    """How far each result may be from float64's, element by element.

    A sum of L products of random numbers, kept in the accumulator's precision u, strays by about u * sqrt(L) times the
    root of the sum of squared products (the RMS that the result would have for random signs); 4 of those are allowed,
    which also covers the worst case of one or two products. Storing the result rounds once more, by half a unit at
    most.
    """
    _, (_, c_per_group, r, s), (n, _, p, q) = problem.shapes()
    lengths = {
        "output": c_per_group * r * s,
        "input": problem.k_per_group * r * s,
        "weight": n * p * q,
        "bias": n * p * q,
    }
    squares = differentiate(problem, *(None if t is None else t.double().square() for t in problem.tensors()))
    accumulator = torch.finfo(torch.float64 if problem.dtype == torch.float64 else torch.float32).eps
    storage = torch.finfo(problem.dtype)
    exact = results_by_torch(problem, torch.float64)
    return {
        name: 4 * accumulator * (lengths[name] + 1) ** 0.5 * squares[name].sqrt()
        + 0.5 * storage.eps * value.abs()
        + 0.5 * storage.tiny * storage.eps  # half of the smallest subnormal
        for name, value in exact.items()
    }


def assert_within(actual: Tensor, exact: Tensor, allowed: Tensor | float, what: str) -> None:
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert not actual.isnan().any(), f"{what}: {int(actual.isnan().sum())} of {actual.numel()} elements are NaN"
    error = (actual.double() - exact).abs()
    # `not (error <= allowed)` and never `error > allowed`: the latter is false for NaN.
    wrong = ~(error <= allowed)
    assert not wrong.any(), (
        f"{what}: {int(wrong.sum())} of {actual.numel()} elements are off by up to {error.max().item():.3g}, "
        f"allowed {torch.as_tensor(allowed).max().item():.3g}; first at {wrong.nonzero()[0].tolist()}"
    )


def check(problem: Conv) -> None:
    """Output and all gradients against float64: within the allowance, and within twice torch's own error."""
    actual, exact = results_by_fastconv(problem), results_by_torch(problem, torch.float64)
    if problem.integers:
        for name, value in exact.items():
            assert torch.equal(actual[name], value.to(problem.dtype)), f"{name} of {problem} is not exact"
        return
    allowed, theirs = allowances(problem), results_by_torch(problem, problem.dtype)
    for name, value in exact.items():
        assert actual[name].dtype == problem.dtype
        assert_within(actual[name], value, allowed[name], f"{name} of {problem}")
        if value.numel() == 0:
            continue
        # On small problems torch's error may happen to be none at all: half of the allowance is granted on top.
        their_error = (theirs[name].double() - value).abs().max().item()
        bound = 2 * their_error + 0.5 * allowed[name].max().item()
        assert_within(actual[name], value, bound, f"{name} of {problem} against twice torch's error")


def assert_as_good(actual: Tensor, theirs: Tensor, exact: Tensor, what: str, allowed_roundings: float = 4) -> None:
    """``actual`` has torch's shape, dtype and infinities, and strays at most twice as far from float64's ``exact``.

    On top comes what any order of summation may differ by: ``allowed_roundings`` times eps at the result's RMS.
    """
    assert actual.dtype == theirs.dtype, f"{what}: {actual.dtype}, torch gives {theirs.dtype}"
    assert actual.shape == theirs.shape, f"{what}: shape {tuple(actual.shape)}, torch gives {tuple(theirs.shape)}"
    assert actual.device == theirs.device
    if not actual.is_floating_point():
        assert torch.equal(actual, theirs), f"{what} differs from torch's"
        return
    if actual.numel() == 0:
        return
    finite = exact.isfinite()
    both = actual.double()[finite], exact[finite]
    assert torch.equal(actual.double()[~finite].nan_to_num(0.5), exact[~finite].nan_to_num(0.5)), f"{what}: inf or NaN"
    if both[0].numel() == 0:
        return
    their_error = (theirs.double()[finite] - both[1]).abs().max().item()
    eps = torch.finfo(actual.dtype)
    rms = both[1].square().mean().sqrt().item()
    bound = 2 * their_error + allowed_roundings * eps.eps * (rms + both[1].abs()) + eps.tiny * eps.eps
    assert_within(*both, bound, what)


def tensors_in(value: object) -> list[Tensor]:
    """Every tensor in nested tuples and lists."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, (tuple, list)) else []


def or_from_float32(evaluate: Callable[[torch.dtype], list[Tensor]], dtype: torch.dtype) -> list[Tensor]:
    """torch's results in ``dtype``; where it has no kernel for it (16-bit local_response_norm), float32's, rounded."""
    try:
        return evaluate(dtype)
    except NotImplementedError:
        return [t.to(dtype) if t.is_floating_point() else t for t in evaluate(torch.float32)]
