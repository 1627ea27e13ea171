"""Max, average and adaptive pooling: by hand, every small case exactly, torch's indices, derivatives of every kind."""

from __future__ import annotations

import itertools

import pytest
import torch
from reference import assert_as_good, guard_is_untouched, guarded
from torch import Tensor
from torch.nn import functional as F

from fastconv import functional
from fastconv._library import ops as raw
from fastconv.ops import pool as ops
from fastconv.stats import reset_stats, stats

pytestmark = pytest.mark.usefixtures("poisoned")
BOTH = [torch.contiguous_format, torch.channels_last]
NAN, INF = float("nan"), float("inf")


def formatted(values: Tensor, memory_format: torch.memory_format) -> Tensor:
    """The values in that format, between guards of NaN."""
    return guarded(values.contiguous(memory_format=memory_format))


@pytest.mark.sanitize
def test_by_hand(dtype, memory_format):
    # The lecture's 4 x 4 example: 2 x 2 windows with stride 2.
    image = torch.tensor([[[[1, 1, 2, 4], [5, 6, 7, 8], [3, 2, 1, 0], [1, 2, 3, 4]]]], dtype=dtype)
    image = image.to(memory_format=memory_format).requires_grad_()
    output, indices = functional.max_pool2d(image, 2, return_indices=True)
    assert output.tolist() == [[[[6, 8], [3, 4]]]]
    assert indices.tolist() == [[[[5, 7], [8, 15]]]]
    gradient = torch.tensor([[[[10, 20], [30, 40]]]], dtype=dtype)
    (grad,) = torch.autograd.grad(output, image, gradient)
    assert grad.tolist() == [[[[0, 0, 0, 0], [0, 10, 0, 20], [30, 0, 0, 0], [0, 0, 0, 40]]]]
    mean = functional.avg_pool2d(image, 2)
    assert mean.tolist() == [[[[3.25, 5.25], [2, 2]]]]
    (grad,) = torch.autograd.grad(mean, image, gradient)
    row, other = [2.5, 2.5, 5, 5], [7.5, 7.5, 10, 10]
    assert grad.tolist() == [[[row, row, other, other]]]
    assert functional.adaptive_avg_pool2d(image, 1).tolist() == [[[[3.125]]]]
    # 4 columns into 3 cells: [0, 2), [1, 3), [2, 4).
    assert functional.adaptive_avg_pool2d(image, (1, 3)).tolist() == [[[[2.625, 3, 3.625]]]]
    assert stats() == {
        "max_pool2d_with_offsets/rows": 1, "max_pool2d_indices/rows": 1, "max_pool2d_backward/rows": 1,
        "avg_pool2d/rows": 1, "avg_pool2d_backward/rows": 1, "adaptive_avg_pool2d/global": 1,
        "adaptive_avg_pool2d/rows": 1,
    }  # fmt: skip


SPECIAL = ["ties", "nan", "infinite"]
SHAPES = [(1, 1, 2), (3, 7, 9), (5, 28, 33), (37, 9, 12), (1, 13, 13), (2, 6, 70)]
WINDOWS = [
    (kernel, stride, padding, dilation, ceil_mode)
    for kernel, stride, padding, dilation, ceil_mode in itertools.product(
        [(1, 1), (2, 2), (3, 3), (3, 2), (2, 5)],
        [(1, 1), (2, 2), (3, 2), (1, 3)],
        [(0, 0), (1, 1), (0, 1)],
        [(1, 1), (2, 1), (1, 2)],
        [False, True],
    )
    if padding[0] * 2 <= kernel[0] and padding[1] * 2 <= kernel[1]
]


def fits(shape: tuple[int, int, int], kernel: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]):
    return all(shape[1 + d] + 2 * padding[d] > dilation[d] * (kernel[d] - 1) for d in (0, 1))


@pytest.mark.sanitize
@pytest.mark.parametrize("memory_format", BOTH, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("special", SPECIAL)
def test_max_pool2d_is_torchs_in_small_cases(memory_format, special):
    cases = 0
    # Every case once: a third of them with each kind of numbers.
    for shape, window in itertools.islice(itertools.product(SHAPES, WINDOWS), SPECIAL.index(special), None, 3):
        *params, ceil_mode = window
        if not fits(shape, params[0], params[2], params[3]):
            continue
        cases += 1
        values = torch.randint(-3, 4, (2, *shape)).float()
        if special == "nan":
            values[torch.rand(values.shape) < 0.1] = NAN
        elif special == "infinite":
            values[torch.rand(values.shape) < 0.6] = -INF
            values[torch.rand(values.shape) < 0.05] = INF
        x = formatted(values, memory_format)
        what = f"{shape} {window}"
        theirs, their_indices = F.max_pool2d(x, *params, ceil_mode, return_indices=True)
        alone = raw.max_pool2d(x, *params, ceil_mode)
        output, offsets = raw.max_pool2d_with_offsets(x, *params, ceil_mode)
        indices = raw.max_pool2d_indices(offsets, shape[1:], *params)
        for values in (alone, output):
            assert torch.equal(values.nan_to_num(0.5), theirs.nan_to_num(0.5)), what
            assert torch.equal(values.isnan(), theirs.isnan()), what
            assert values.stride() == theirs.stride(), what
        assert torch.equal(indices, their_indices), what
        assert indices.stride() == theirs.stride()
        assert offsets.dtype == torch.uint8
        if not (their_indices < shape[1] * shape[2]).all():
            continue  # a window without elements: torch's index, and with it its gradient, is outside the input
        picked = raw.max_pool2d_gather(x, offsets, *params)
        assert torch.equal(picked.nan_to_num(0.5), theirs.nan_to_num(0.5)), what
        g = formatted(torch.randint(-5, 6, theirs.shape).float(), memory_format)
        grad = raw.max_pool2d_backward(g, offsets, shape[1:], *params)
        their_grad = torch.ops.aten.max_pool2d_with_indices_backward(g, x, *params, ceil_mode, their_indices)
        assert torch.equal(grad, their_grad), what
        assert grad.stride() == their_grad.stride(), what
        assert guard_is_untouched(x)
        assert guard_is_untouched(g)
    assert cases > 250


@pytest.mark.sanitize
def test_a_window_without_elements_is_safe(memory_format):
    # One row of windows with taps at -1 and 2, rows 0 and 1: nothing to see.
    x = formatted(torch.randn(1, 9, 2, 6), memory_format)
    window = ((2, 2), (1, 1), (1, 1), (3, 1))
    output, offsets = raw.max_pool2d_with_offsets(x, *window, False)
    assert (output == -INF).all()
    assert (raw.max_pool2d_gather(x, offsets, *window) == 0).all()
    assert (raw.max_pool2d_backward(torch.ones_like(output), offsets, (2, 6), *window) == 0).all()


@pytest.mark.sanitize
@pytest.mark.parametrize("memory_format", BOTH, ids=["nchw", "nhwc"])
def test_avg_pool2d_is_torchs_in_small_cases(memory_format):
    options = itertools.cycle([(True, None), (False, None), (True, 7), (False, -3)])
    for shape, (kernel, stride, padding, dilation, ceil_mode) in itertools.product(SHAPES, WINDOWS):
        if dilation != (1, 1) or not fits(shape, kernel, padding, dilation):
            continue
        params = (kernel, stride, padding, ceil_mode, *next(options))
        # Whole numbers: the sums are exact in any order, and a quotient is rounded once.
        x = formatted(torch.randint(-9, 10, (2, *shape)).float(), memory_format)
        theirs = F.avg_pool2d(x, *params)
        output = raw.avg_pool2d(x, *params)
        assert torch.equal(output, theirs), f"{shape} {params}"
        assert output.stride() == theirs.stride()
        g = formatted(torch.randint(-5, 6, theirs.shape).float(), memory_format)
        grad = raw.avg_pool2d_backward(g, shape[1:], *params)
        their_grad = torch.ops.aten.avg_pool2d_backward(g, x, *params)
        torch.testing.assert_close(grad, their_grad, rtol=1e-6, atol=1e-6)
        assert grad.stride() == their_grad.stride()
        assert guard_is_untouched(x)
        assert guard_is_untouched(g)


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", [*SHAPES, (9, 7, 7), (40, 64, 65)])
def test_adaptive_avg_pool2d_is_torchs(shape, memory_format):
    for size in [(1, 1), (2, 3), shape[1:], (1, 4), (6, 6), (2 * shape[1], shape[2] + 1)]:
        x = formatted(torch.randn(2, *shape), memory_format).requires_grad_()
        theirs, exact = F.adaptive_avg_pool2d(x, size), F.adaptive_avg_pool2d(x.double(), size)
        g = torch.randn(theirs.shape)
        their_grad, exact_grad = (torch.autograd.grad(t, x, g.to(t.dtype))[0] for t in (theirs, exact))
        output = ops.adaptive_avg_pool2d(x, size)
        (grad,) = torch.autograd.grad(output, x, g)
        assert_as_good(output.detach(), theirs.detach(), exact.detach(), f"{shape} to {size}")
        assert_as_good(grad, their_grad, exact_grad, f"gradient of {shape} to {size}")
        assert output.stride() == theirs.stride()
        assert grad.is_contiguous(memory_format=memory_format)


def test_global_average_of_a_large_plane_keeps_its_digits(memory_format):
    x = (torch.rand(1, 3, 1500, 1400) + 1).to(memory_format=memory_format)
    theirs, exact = F.adaptive_avg_pool2d(x, 1), F.adaptive_avg_pool2d(x.double(), 1)
    assert_as_good(raw.adaptive_avg_pool2d(x, (1, 1)), theirs, exact, "mean of 2.1 million numbers", 1)


LECTURE = {  # name: kind, shape, kernel, stride, padding; the lecture's pools, some smaller
    "lenet": ("avg", (6, 28, 28), 2, 2, 0),
    "alexnet": ("max", (13, 55, 55), 3, 2, 0),
    "alexnet-last": ("max", (33, 13, 13), 3, 2, 0),
    "vgg": ("max", (16, 56, 56), 2, 2, 0),
    "vgg-last": ("max", (64, 14, 14), 2, 2, 0),
    "resnet": ("max", (17, 112, 112), 3, 2, 1),
    "inception": ("avg", (19, 35, 35), 3, 1, 1),
}


def pooled(functions, kind: str, x: Tensor, *window: int) -> Tensor:
    return (functions.max_pool2d if kind == "max" else functions.avg_pool2d)(x, *window)


@pytest.mark.parametrize("name", LECTURE)
def test_layers_in_every_dtype(name, dtype, memory_format):
    kind, shape, *window = LECTURE[name]
    x = torch.randn(2, *shape).to(dtype).to(memory_format=memory_format).requires_grad_()
    ours, theirs = pooled(functional, kind, x, *window), pooled(F, kind, x, *window)
    exact = pooled(F, kind, x.double(), *window)
    g = torch.randn(ours.shape).to(dtype)
    grads = [torch.autograd.grad(y, x, g.to(y.dtype))[0] for y in (ours, theirs, exact)]
    assert_as_good(ours.detach(), theirs.detach(), exact.detach(), name)
    assert_as_good(*grads, f"gradient of {name}")
    assert ours.stride() == theirs.stride()
    assert grads[0].stride() == x.stride()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", LECTURE)
def test_results_do_not_depend_on_threads(name, threads, memory_format):
    kind, shape, *window = LECTURE[name]
    x = torch.randn(2, *shape).to(memory_format=memory_format).requires_grad_()
    first = pooled(functional, kind, x, *window)
    g = torch.randn(first.shape)
    (grad,) = torch.autograd.grad(first, x, g)
    torch.set_num_threads(threads)
    again = pooled(functional, kind, x, *window)
    assert torch.equal(again, first)
    assert torch.equal(torch.autograd.grad(again, x, g)[0], grad)


@pytest.mark.sanitize
def test_large_windows_have_wide_offsets(memory_format):
    x = formatted(torch.randint(0, 50, (1, 11, 20, 19)).float(), memory_format)
    window = ((16, 16), (2, 1), (0, 3), (1, 1))
    output, offsets = raw.max_pool2d_with_offsets(x, *window, False)
    theirs, their_indices = F.max_pool2d(x, *window, return_indices=True)
    assert offsets.dtype == torch.int32
    assert torch.equal(output, theirs)
    assert torch.equal(raw.max_pool2d_indices(offsets, (20, 19), *window), their_indices)
    assert torch.equal(raw.max_pool2d_gather(x, offsets, *window), theirs)
    g = formatted(torch.randint(-5, 6, theirs.shape).float(), memory_format)
    grad = raw.max_pool2d_backward(g, offsets, (20, 19), *window)
    assert torch.equal(grad, torch.ops.aten.max_pool2d_with_indices_backward(g, x, *window, False, their_indices))


def test_only_offsets_are_kept_for_the_gradient():
    kept: list[Tensor] = []
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        functional.max_pool2d(x, 2)
        functional.avg_pool2d(x, 2)
        functional.adaptive_avg_pool2d(x, 1)
    assert [(t.dtype, tuple(t.shape)) for t in kept] == [(torch.uint8, (2, 3, 4, 4))]


def test_unusual_operands():
    base = torch.randn(2, 5, 12, 9)
    for x in (base.transpose(2, 3), base[:, :, ::2, 1:], base[:, :1].expand(2, 5, 12, 9), base[:0], base[..., None, 0]):
        for kind, window in (("max", (1, 1)), ("avg", (1, 2))):
            ours, theirs = pooled(functional, kind, x, *window), pooled(F, kind, x, *window)
            assert torch.equal(ours, theirs)
            assert ours.stride() == theirs.stride()
    # An expanded gradient, as sum() gives.
    x = base.clone().requires_grad_()
    (ours,) = torch.autograd.grad(functional.max_pool2d(x, 3, 2).sum(), x)
    (theirs,) = torch.autograd.grad(F.max_pool2d(x, 3, 2).sum(), x)
    assert torch.equal(ours, theirs)


# ---------------------------------------------------------------- derivatives

FUNCTIONS = {
    "max": lambda x, f=functional: f.max_pool2d(x, 3, 2, 1),
    "max-dilated": lambda x, f=functional: f.max_pool2d(x, (2, 3), (1, 2), (1, 0), (2, 1), True),
    "avg": lambda x, f=functional: f.avg_pool2d(x, 3, 2, 1, True, False),
    "adaptive": lambda x, f=functional: f.adaptive_avg_pool2d(x, (3, 2)),
    "global": lambda x, f=functional: f.adaptive_avg_pool2d(x, 1),
}


def distinct(*shape: int) -> Tensor:
    """Numbers far enough apart for finite differences not to change a winner."""
    count = torch.Size(shape).numel()
    return (torch.randperm(count).double() / 10).reshape(shape)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck(name, memory_format):
    x = distinct(1, 2, 5, 4).contiguous(memory_format=memory_format).requires_grad_()
    check = {"check_forward_ad": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(FUNCTIONS[name], x, check_batched_forward_grad=True, **check)
    assert torch.autograd.gradgradcheck(FUNCTIONS[name], x, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_transforms(name):
    ours, theirs = FUNCTIONS[name], lambda x: FUNCTIONS[name](x, F)
    x, v = distinct(4, 2, 3, 5, 6), torch.randn(4, 2, 3, 5, 6, dtype=torch.float64)

    def loss(f):
        return lambda t: (f(t) ** 3).sum()

    for transform in (
        lambda f: torch.vmap(f)(x),
        lambda f: torch.vmap(f, in_dims=2)(x.movedim(0, 2)),
        lambda f: torch.func.grad(loss(f))(x[0]),
        lambda f: torch.vmap(torch.func.grad(loss(f)))(x),
        lambda f: torch.func.jvp(f, (x[0],), (v[0],)),
        lambda f: torch.func.jvp(torch.func.grad(loss(f)), (x[0],), (v[0],)),
        lambda f: torch.func.hessian(loss(f))(x[0, :1, :1]),
        lambda f: torch.func.jacrev(f)(x[0, :1]),
        lambda f: torch.vmap(lambda t, u: torch.func.jvp(f, (t,), (u,)))(x, v),
    ):
        torch.testing.assert_close(transform(ours), transform(theirs))


def test_indices_under_vmap_and_grad():
    x = distinct(4, 2, 3, 6, 6)
    ours = torch.vmap(lambda t: functional.max_pool2d(t, 2, return_indices=True))(x)
    theirs = torch.vmap(lambda t: F.max_pool2d(t, 2, return_indices=True))(x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


# ---------------------------------------------------------------- compiler


@pytest.mark.parametrize("memory_format", BOTH, ids=["nchw", "nhwc"])
def test_opcheck(memory_format):
    x = torch.randn(2, 3, 7, 8).contiguous(memory_format=memory_format).requires_grad_()
    window = ((3, 2), (2, 2), (1, 1), (1, 1))
    output, offsets = raw.max_pool2d_with_offsets(x.detach(), *window, True)
    g = torch.randn_like(output).requires_grad_()
    torch.library.opcheck(raw.max_pool2d.default, (x, *window, True))
    torch.library.opcheck(raw.max_pool2d_with_offsets.default, (x, *window, True))
    torch.library.opcheck(raw.max_pool2d_indices.default, (offsets, (7, 8), *window))
    torch.library.opcheck(raw.max_pool2d_gather.default, (x, offsets, *window))
    torch.library.opcheck(raw.max_pool2d_backward.default, (g, offsets, (7, 8), *window))
    average = (*window[:3], True, False, None)
    torch.library.opcheck(raw.avg_pool2d.default, (x, *average))
    torch.library.opcheck(raw.avg_pool2d_backward.default, (g, (7, 8), *average))
    for size in ((1, 1), (3, 5)):
        torch.library.opcheck(raw.adaptive_avg_pool2d.default, (x, size))
        g = torch.randn(2, 3, *size).contiguous(memory_format=memory_format).requires_grad_()
        torch.library.opcheck(raw.adaptive_avg_pool2d_backward.default, (g, (7, 8)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def network(x: Tensor) -> Tensor:
        x = functional.max_pool2d(x, 3, 2, 1, 1, True)
        x = functional.avg_pool2d(x, 2, 1)
        return functional.adaptive_avg_pool2d(x, (2, 1)) * functional.adaptive_avg_pool2d(x, 1)

    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape, memory_format in itertools.product([(2, 3, 9, 10), (3, 3, 12, 11)], BOTH):
        x = torch.randn(shape).contiguous(memory_format=memory_format).requires_grad_()
        expected, actual = network(x), compiled(x)
        assert torch.equal(actual, expected)
        assert actual.stride() == expected.stride()
        g = torch.randn(expected.shape)
        assert torch.equal(torch.autograd.grad(actual, x, g)[0], torch.autograd.grad(expected, x, g)[0])
        with torch.no_grad():
            reset_stats()
            assert torch.equal(compiled(x), expected)
            assert "max_pool2d/rows" in stats(), "inference must not compute offsets"
    _, indices = torch.compile(functional.max_pool2d, fullgraph=True, backend="aot_eager")(x, 2, return_indices=True)
    assert torch.equal(indices, F.max_pool2d(x, 2, return_indices=True)[1])


def test_output_size_is_torchs():
    for window in WINDOWS:
        for shape in SHAPES:
            *params, ceil_mode = window
            if fits(shape, params[0], params[2], params[3]):
                x = torch.empty(1, *shape, device="meta")
                expected = F.max_pool2d(x, *params, ceil_mode).shape
                assert raw.max_pool2d(x, *params, ceil_mode).shape == expected
                assert ops.output_size(shape[1:], *params, ceil_mode) == tuple(expected[2:])


# ---------------------------------------------------------------- errors, instruction sets


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (((0, 2), (1, 1), (0, 0), (1, 1)), r"kernel is \(0, 2\), expected values of at least 1"),
        (((2, 2), (0, 1), (0, 0), (1, 1)), r"stride is \(0, 1\), expected values of at least 1"),
        (((3, 3), (1, 1), (2, 0), (1, 1)), r"padding is \(2, 0\), expected at most half of the kernel, \(1, 1\)"),
        (((3, 3), (1, 1), (0, 0), (3, 1)), r"the window spans 7 x 3, more than the padded input, 5 x 6"),
    ],
)
def test_errors_say_what_is_wanted(window, message):
    with pytest.raises(RuntimeError, match=message):
        raw.max_pool2d(torch.randn(1, 2, 5, 6), *window, False)


def test_foreign_offsets_are_refused():
    window = ((2, 2), (2, 2), (0, 0), (1, 1))
    _, offsets = raw.max_pool2d_with_offsets(torch.randn(1, 2, 6, 6), *window, False)
    with pytest.raises(RuntimeError, match=r"offsets has shape \(1, 2, 3, 3\), expected \(1, 2, 4, 4\)"):
        raw.max_pool2d_backward(torch.randn(1, 2, 3, 3), offsets, (8, 8), *window)
    with pytest.raises(RuntimeError, match="expected uint8; pass what max_pool2d_with_offsets returned"):
        raw.max_pool2d_indices(offsets.int(), (6, 6), *window)
    with pytest.raises(RuntimeError, match="divisor_override is 0"):
        raw.avg_pool2d(torch.randn(1, 2, 6, 6), *window[:3], False, True, 0)
