"""local_response_norm: by hand, against float64, derivatives of every kind."""

from __future__ import annotations

import itertools

import pytest
import torch
from reference import assert_as_good, guard_is_untouched, guarded
from torch import Tensor
from torch.nn import functional as F

from fastconv import functional
from fastconv._library import ops as raw
from fastconv.ops import norm as ops
from fastconv.stats import stats

pytestmark = pytest.mark.usefixtures("poisoned")
BOTH = [torch.contiguous_format, torch.channels_last]


@pytest.mark.sanitize
def test_by_hand(dtype, memory_format):
    # Channels 1, 2, 3; windows of an even size reach one channel further back: sums of squares 1, 1 + 4, 4 + 9.
    x = torch.tensor([1, 2, 3], dtype=dtype).reshape(1, 3, 1, 1).to(memory_format=memory_format)
    # d = 3 + 2 / 2 * sum is 4, 8, 16; beta = 1
    assert functional.local_response_norm(x, 2, 2.0, 1.0, 3.0).flatten().tolist() == [1 / 4, 2 / 8, 3 / 16]
    # beta = 0.5 with d = 4, 9, 25: x / 2, x / 3, x / 5; from k = 2 and alpha = 2 * 2, ...
    x = torch.tensor([2, 1, 2], dtype=dtype).reshape(1, 3, 1, 1).to(memory_format=memory_format)
    # sums over three channels: 5, 9, 5; d = 11 + 3 / 3 * sum = 16, 20, 16
    y = functional.local_response_norm(x, 3, 3.0, 0.5, 11.0).flatten()
    assert y[0] == 0.5
    assert y[2] == 0.5
    torch.testing.assert_close(y[1], torch.tensor(20**-0.5, dtype=dtype))
    assert stats() == {"local_response_norm/rows": 2}


CASES = list(
    itertools.product(
        [(2, 5, 3, 4), (1, 17, 7, 9), (2, 96, 6, 5), (3, 1, 2, 2), (1, 260, 3, 3), (1, 3, 40, 41)],
        [1, 2, 3, 5, 6],
        [(1e-4, 0.75, 2.0), (0.3, 0.5, 1.0), (2.0, 1.0, 0.5), (0.7, 1.3, 1.5)],
    )
)


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", sorted({case[0] for case in CASES}))
def test_against_float64(shape, dtype, memory_format):
    for size, (alpha, beta, k) in itertools.product([1, 2, 3, 5, 6], sorted({case[2] for case in CASES})):
        params = (size, alpha, beta, k)
        x = guarded(torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)).requires_grad_()
        v = guarded(torch.randn(shape).to(dtype).contiguous(memory_format=memory_format))
        # torch has no 16-bit kernel for this on the CPU: its float32 result, rounded, stands in.
        wide = x if dtype == torch.float64 else x.float()
        theirs, exact = F.local_response_norm(wide, *params).to(dtype), F.local_response_norm(x.double(), *params)
        their_grad, exact_grad = (torch.autograd.grad(y, x, v.to(y.dtype))[0] for y in (theirs, exact))
        output = ops.local_response_norm(x, *params)
        (grad,) = torch.autograd.grad(output, x, v)
        what = f"{shape} {params}"
        assert_as_good(output.detach(), theirs.detach(), exact.detach(), what)
        # A derivative is a difference of products of up to six factors, each rounded at its own size.
        assert_as_good(grad, their_grad, exact_grad, f"gradient of {what}", 16)
        assert output.is_contiguous(memory_format=memory_format)
        assert grad.is_contiguous(memory_format=memory_format)
        exact_tangent = torch.func.jvp(
            lambda t, params=params: F.local_response_norm(t, *params), (x.detach().double(),), (v.double(),)
        )[1]
        tangent = raw.local_response_norm_jvp(x.detach(), v, *params)
        assert_as_good(tangent, exact_tangent.to(dtype), exact_tangent, f"tangent of {what}", 16)
        assert guard_is_untouched(x.detach())
        assert guard_is_untouched(v)


def test_memory_format_is_torchs():
    x = torch.randn(2, 6, 4, 5)
    for t in (x, x.contiguous(memory_format=torch.channels_last), x[:, :1]):
        assert functional.local_response_norm(t, 3).stride() == F.local_response_norm(t, 3).stride()
    for t in (x.transpose(2, 3), x[:, ::2], x[:, :1].expand(2, 6, 4, 5)):
        torch.testing.assert_close(functional.local_response_norm(t, 3), F.local_response_norm(t, 3))


def test_numbers_that_are_not_finite_stay_where_torch_has_them(memory_format):
    x = torch.randn(1, 12, 4, 4)
    x[0, 3, 1, 1], x[0, 7, 2, 2], x[0, 0, 0, 0] = float("nan"), float("inf"), 1e30
    x = x.contiguous(memory_format=memory_format)
    torch.testing.assert_close(
        functional.local_response_norm(x, 5), F.local_response_norm(x, 5), equal_nan=True, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("threads", [1, 3])
def test_results_do_not_depend_on_threads(threads, memory_format):
    x = torch.randn(2, 96, 27, 27).contiguous(memory_format=memory_format)
    first = raw.local_response_norm(x, 5, 1e-4, 0.75, 2.0), raw.local_response_norm_backward(x, x, 5, 1e-4, 0.75, 2.0)
    torch.set_num_threads(threads)
    again = raw.local_response_norm(x, 5, 1e-4, 0.75, 2.0), raw.local_response_norm_backward(x, x, 5, 1e-4, 0.75, 2.0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# ---------------------------------------------------------------- derivatives

PARAMS = [(3, 0.9, 0.75, 1.2), (2, 0.5, 1.3, 2.0)]


@pytest.mark.parametrize("params", PARAMS)
def test_gradcheck(params, memory_format):
    x = torch.randn(2, 4, 2, 2, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()

    def function(t: Tensor) -> Tensor:
        return functional.local_response_norm(t, *params)

    assert torch.autograd.gradcheck(
        function, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(function, x, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("params", PARAMS)
def test_function_transforms(params):
    x, v, w = torch.randn(3, 3, 2, 4, 2, 2, dtype=torch.float64)

    def loss(f):
        return lambda t: (f(t, *params) ** 3).sum()

    def along(f, tangent):
        return lambda t: torch.func.jvp(lambda u: f(u, *params), (t,), (tangent,))[1]

    for transform in (
        lambda f: torch.vmap(lambda t: f(t, *params))(x),
        lambda f: torch.vmap(torch.func.grad(loss(f)), in_dims=1)(x.movedim(0, 1)),
        lambda f: torch.func.jvp(torch.func.grad(loss(f)), (x[0],), (v[0],)),
        lambda f: torch.func.hessian(loss(f))(x[0, :1, :, :1]),
        lambda f: torch.func.grad(lambda t: (along(f, v[0])(t) ** 2).sum())(x[0]),
        lambda f: torch.func.jvp(along(f, v[0]), (x[0],), (w[0],)),
        lambda f: torch.func.grad(lambda t: torch.func.grad(loss(f))(t).square().sum())(x[0]),
    ):
        torch.testing.assert_close(transform(functional.local_response_norm), transform(F.local_response_norm))


@pytest.mark.parametrize("memory_format", BOTH, ids=["nchw", "nhwc"])
def test_opcheck(memory_format):
    x = torch.randn(2, 6, 3, 4).contiguous(memory_format=memory_format).requires_grad_()
    v = torch.randn(2, 6, 3, 4).requires_grad_()
    torch.library.opcheck(raw.local_response_norm.default, (x, 5, 0.1, 0.75, 1.0))
    torch.library.opcheck(raw.local_response_norm_jvp.default, (x, v, 5, 0.1, 0.75, 1.0))
    torch.library.opcheck(raw.local_response_norm_backward.default, (v, x, 5, 0.1, 0.75, 1.0))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(functional.local_response_norm, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape, memory_format in itertools.product([(2, 6, 4, 5), (3, 8, 5, 5)], BOTH):
        x = torch.randn(shape).contiguous(memory_format=memory_format).requires_grad_()
        expected, actual = functional.local_response_norm(x, 5, 0.1), compiled(x, 5, 0.1)
        assert torch.equal(actual, expected)
        assert actual.stride() == expected.stride()
        g = torch.randn(shape)
        assert torch.equal(torch.autograd.grad(actual, x, g)[0], torch.autograd.grad(expected, x, g)[0])


def test_errors_say_what_is_wanted():
    x = torch.randn(1, 4, 3, 3)
    with pytest.raises(RuntimeError, match="size is 0, expected at least 1 channel"):
        raw.local_response_norm(x, 0, 1e-4, 0.75, 1.0)
    with pytest.raises(RuntimeError, match=r"tangent has shape \(1, 4, 3, 2\), expected \(1, 4, 3, 3\)"):
        raw.local_response_norm_jvp(x, x[..., :2], 3, 1e-4, 0.75, 1.0)
