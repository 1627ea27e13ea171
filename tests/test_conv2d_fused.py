"""conv2d_fused against the same computation in separate torch operations: values, derivatives, transforms."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastconv
from fastconv.ops.conv2d_fused import ACTIVATIONS, conv2d_fused

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def reference(input, weight, scale, shift, residual, stride, padding, dilation, groups, activation):
    """The definition, one torch operation after the other; derivatives are autograd's."""
    top, left, bottom, right = padding
    padded = torch.nn.functional.pad(input, (left, right, top, bottom))
    result = torch.nn.functional.conv2d(padded, weight, None, stride, 0, dilation, groups)
    if scale is not None:
        result = result * scale.reshape(1, -1, 1, 1)
    if shift is not None:
        result = result + shift.reshape(1, -1, 1, 1)
    if residual is not None:
        result = result + residual
    functions = {"relu": torch.relu, "relu6": torch.nn.functional.relu6, "tanh": torch.tanh}
    return functions[activation](result) if activation != "none" else result


class Problem:
    """Tensors of one call, reproducible; the activation's argument spreads over all its pieces."""

    def __init__(self, groups=1, stride=(1, 1), padding=(1, 1, 1, 1), dilation=(1, 1), batch=2, dtype=torch.float64):
        generator = torch.Generator().manual_seed(7)
        self.params = (stride, padding, dilation, groups)
        channels, filters = 2 * groups, 3 * groups

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.input = normal(batch, channels, 6, 5)
        self.weight = normal(filters, 2, 3, 3)
        accumulator = torch.float64 if dtype == torch.float64 else torch.float32
        self.scale = normal(filters).to(accumulator)
        self.shift = normal(filters).to(accumulator) * 3 + 2
        plain = reference(self.input.double(), self.weight.double(), None, None, None, *self.params, "none")
        self.residual = normal(*plain.shape)

    def tensors(self, scale=True, shift=True, residual=True):
        return (
            self.input,
            self.weight,
            self.scale if scale else None,
            self.shift if shift else None,
            self.residual if residual else None,
        )


PROBLEMS = {
    "dense": {},
    "strided": {"stride": (2, 1), "padding": (0, 1, 2, 1)},
    "dilated": {"dilation": (2, 2), "padding": (2, 2, 2, 2)},
    "grouped": {"groups": 3},
}
OPERANDS = list(itertools.product((True, False), repeat=3))


def require(tensors):
    return tuple(None if t is None else t.detach().clone().requires_grad_() for t in tensors)


@pytest.mark.parametrize("memory_format", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_equals_the_separate_operations(activation, dtype, memory_format):
    cases = [(options, OPERANDS[0]) for options in PROBLEMS.values()] + [({}, present) for present in OPERANDS[1:]]
    for options, present in cases:
        problem = Problem(**options, dtype=dtype)
        input, weight, scale, shift, residual = problem.tensors(*present)
        input = input.to(memory_format=memory_format)
        fastconv.reset_stats()
        result = conv2d_fused(input, weight, scale, shift, residual, *problem.params, activation)
        assert sum(fastconv.stats().values()) == 1
        assert result.dtype == dtype
        assert result.is_contiguous(memory_format=memory_format)
        doubles = [None if t is None else t.double() for t in (input, weight, scale, shift, residual)]
        expected = reference(*doubles, *problem.params, activation)
        magnitudes = [None if t is None else t.abs() for t in doubles]
        # One rounding of the output, and one per term of the sum in the accumulator.
        bound = (
            reference(*magnitudes, *problem.params, "none")
            * 32
            * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
            + expected.abs() * torch.finfo(dtype).eps
        )
        assert ((result.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_integers_are_exact_for_every_kernel(activation):
    generator = torch.Generator().manual_seed(1)
    input = torch.randint(-4, 5, (2, 4, 7, 9), generator=generator).float()
    weight = torch.randint(-4, 5, (8, 2, 3, 3), generator=generator).float()
    scale, shift = (torch.randint(-3, 4, (8,), generator=generator).float() for _ in range(2))
    params = ((2, 2), (1, 1, 1, 1), (1, 1), 2)
    residual = torch.randint(-9, 9, (2, 8, 4, 5), generator=generator).float()
    expected = reference(input, weight, scale, shift, residual, *params, "none")
    for algo in ("naive", "tiled", "rows", None):
        result = conv2d_fused(input, weight, scale, shift, residual, *params, activation, algo)
        if activation == "tanh":
            torch.testing.assert_close(result, torch.tanh(expected))
        else:
            wanted = {"none": expected, "relu": expected.relu(), "relu6": expected.clamp(0, 6)}[activation]
            assert torch.equal(result, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_scale_and_shift_may_have_any_float_type(dtype):
    problem = Problem(dtype=torch.float32)
    scale, shift = problem.scale.to(dtype), problem.shift.to(dtype)
    result = conv2d_fused(problem.input, problem.weight, scale, shift, None, *problem.params, "none")
    expected = reference(problem.input, problem.weight, scale.float(), shift.float(), None, *problem.params, "none")
    torch.testing.assert_close(result, expected)
    leaves = require((problem.input, problem.weight, scale, shift))
    conv2d_fused(*leaves, None, *problem.params, "relu").sum().backward()
    assert [leaf.grad.dtype for leaf in leaves] == [torch.float32, torch.float32, dtype, dtype]


def test_outputs_are_written_completely():
    # Freed memory full of NaN is handed out again to the next tensor of its size: an element left unwritten would show.
    problem = Problem(batch=3, dtype=torch.float32)
    for _ in range(20):
        junk = [torch.full_like(problem.residual, float("nan")) for _ in range(8)]
        del junk
        result = conv2d_fused(*problem.tensors(), *problem.params, "relu6")
        assert not result.isnan().any()


@pytest.mark.parametrize("activation", ["relu", "relu6", "tanh", "none"])
def test_gradients_at_ties_nan_and_inf_are_those_of_torch(activation):
    values = torch.tensor([-1.0, 0.0, -0.0, 3.0, 6.0, 7.0, float("nan"), float("inf"), -float("inf"), 1e-42])
    input, weight = values.reshape(1, 1, 2, 5), torch.ones(1, 1, 1, 1)
    params = ((1, 1), (0, 0, 0, 0), (1, 1), 1)
    grad = torch.arange(1.0, 11).reshape(1, 1, 2, 5)
    results = []
    for function in (conv2d_fused, reference):
        leaf = input.clone().requires_grad_()
        output = function(leaf, weight, None, None, None, *params, activation)
        output.backward(grad)
        results.append((output.detach(), leaf.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_equal_those_of_the_separate_operations(activation, name):
    for present in OPERANDS if name == "dense" else OPERANDS[:1]:
        problem = Problem(**PROBLEMS[name])
        results = []
        for function in (conv2d_fused, reference):
            leaves = require(problem.tensors(*present))
            output = function(*leaves, *problem.params, activation)
            wanted = [leaf for leaf in leaves if leaf is not None]
            weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
            first = torch.autograd.grad((output * weights).sum(), wanted, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted, allow_unused=True)
            results.append((*first, *(torch.zeros(()) if g is None else g for g in second)))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs.expand_as(ours).to(ours), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (4,), (0, 1), (1, 2), (0, 2)])
def test_only_the_gradients_asked_for(needed):
    problem = Problem()
    gradients = []
    for function in (conv2d_fused, reference):
        tensors = [t.clone().requires_grad_(i in needed) for i, t in enumerate(problem.tensors())]
        function(*tensors, *problem.params, "relu6").square().sum().backward()
        gradients.append([t.grad for t in tensors])
    for i, (ours, theirs) in enumerate(zip(*gradients, strict=True)):
        assert (ours is None) == (i not in needed)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_gradients_are_near_the_float64_ones(dtype):
    problem = Problem(dtype=dtype)
    leaves = require(problem.tensors())
    conv2d_fused(*leaves, *problem.params, "tanh").sum().backward()
    doubles = require(t.double() for t in problem.tensors())
    reference(*doubles, *problem.params, "tanh").sum().backward()
    for ours, theirs in zip(leaves, doubles, strict=True):
        assert ours.grad.dtype == ours.dtype
        error = (ours.grad.double() - theirs.grad).square().mean().sqrt()
        # tanh' = 1 - y^2 is computed from y rounded to dtype: a few roundings of 1.
        assert error <= 8 * torch.finfo(dtype).eps * max(theirs.grad.square().mean().sqrt(), 1.0)


def smooth_problem():
    problem = Problem(batch=1)
    return [t.clone().requires_grad_() for t in problem.tensors()], problem.params


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    tensors, params = smooth_problem()

    def function(*operands: Tensor) -> Tensor:
        return conv2d_fused(*operands, *params, activation)

    batched = activation == "relu6"  # vmap has its own test
    modes = {"check_forward_ad": True, "check_batched_grad": batched, "check_batched_forward_grad": batched}
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True, **modes)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True, check_fwd_over_rev=True)


def test_slow_gradcheck_of_a_small_problem():
    tensors = [
        torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
        for shape in ((1, 1, 3, 3), (1, 1, 2, 2), (1,), (1,), (1, 1, 2, 2))
    ]
    params = ((1, 1), (0, 0, 0, 0), (1, 1), 1)
    assert torch.autograd.gradcheck(lambda *t: conv2d_fused(*t, *params, "tanh"), tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda *t: conv2d_fused(*t, *params, "tanh"), tensors, check_rev_over_rev=True)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("batched", list(itertools.product((True, False), repeat=5))[:-1])
def test_vmap_over_any_operands(batched, groups):
    problem = Problem(groups=groups)
    tensors = problem.tensors()
    dims = tuple(min(1, t.dim()) if b else None for t, b in zip(tensors, batched, strict=True))
    stacked = [
        t if dim is None else torch.stack([t, t * 0.5, t + 1], dim) for t, dim in zip(tensors, dims, strict=True)
    ]
    result = torch.vmap(lambda *t: conv2d_fused(*t, *problem.params, "relu6"), dims)(*stacked)
    rows = [
        reference(
            *(s.select(d, i) if d is not None else s for s, d in zip(stacked, dims, strict=True)),
            *problem.params,
            "relu6",
        )
        for i in range(3)
    ]
    torch.testing.assert_close(result, torch.stack(rows))


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_func_transforms(activation):
    problem = Problem(batch=1)
    tensors = problem.tensors()

    def loss_of(function):
        return lambda *t: function(*t, *problem.params, activation).square().sum()

    argnums = tuple(range(5))
    ours, theirs = (torch.func.grad(loss_of(f), argnums)(*tensors) for f in (conv2d_fused, reference))
    torch.testing.assert_close(ours, theirs)
    tangents = tuple(torch.ones_like(t) for t in tensors)
    ours, theirs = (torch.func.jvp(loss_of(f), tensors, tangents) for f in (conv2d_fused, reference))
    torch.testing.assert_close(ours, theirs)
    # The scale's Hessian. Not forward over forward: there torch's autograd.Function gives zero for any function.
    orders = [(torch.func.jacfwd, torch.func.jacrev), (torch.func.jacrev, torch.func.jacfwd)]
    for outer, inner in [*orders, (torch.func.jacrev, torch.func.jacrev)]:
        ours, theirs = (
            outer(inner(lambda s, f=f: loss_of(f)(*tensors[:2], s, *tensors[3:])))(tensors[2])
            for f in (conv2d_fused, reference)
        )
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("memory_format", LAYOUTS, ids=str)
def test_opcheck(memory_format):
    problem = Problem(dtype=torch.float32)
    input = problem.input.to(memory_format=memory_format)
    stride, padding, dilation, groups = problem.params
    for present in ((True, True, True), (False, True, False)):
        tensors = require((input, *problem.tensors(*present)[1:]))
        torch.library.opcheck(
            torch.ops.fastconv.conv2d_fused.default,
            (*tensors, stride, padding, dilation, groups, ACTIVATIONS["relu"], None),
        )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_in_one_graph(dynamic):
    problem = Problem(dtype=torch.float32)

    def function(*operands: Tensor) -> Tensor:
        return conv2d_fused(*operands, *problem.params, "relu6") * 2

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 3):
        tensors = Problem(batch=batch, dtype=torch.float32).tensors()
        ours, eager = require(tensors), require(tensors)
        result, expected = compiled(*ours), function(*eager)
        torch.testing.assert_close(result, expected)
        result.sum().backward()
        expected.sum().backward()
        for left, right in zip(ours, eager, strict=True):
            torch.testing.assert_close(left.grad, right.grad)


def test_flops_are_those_of_the_convolution():
    problem = Problem(dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        result = conv2d_fused(*problem.tensors(), *problem.params, "relu")
    assert counter.get_total_flops() == 2 * result.numel() * problem.weight[0].numel()


def test_empty_batch():
    problem = Problem(batch=0, dtype=torch.float32)
    leaves = require(problem.tensors())
    result = conv2d_fused(*leaves, *problem.params, "relu")
    assert result.shape == problem.residual.shape
    result.sum().backward()
    for leaf in leaves[1:4]:
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("activation", ["gelu", "", None, 1])
def test_unknown_activations_are_refused(activation):
    problem = Problem()
    with pytest.raises(ValueError, match="expected one of 'none', 'relu', 'relu6', 'tanh'"):
        conv2d_fused(*problem.tensors(), *problem.params, activation)


def test_wrong_shapes_are_refused():
    problem = Problem()
    input, weight, scale, shift, residual = problem.tensors()
    with pytest.raises(RuntimeError, match="scale"):
        conv2d_fused(input, weight, scale[:-1], shift, residual, *problem.params)
    with pytest.raises(RuntimeError, match="residual"):
        conv2d_fused(input, weight, scale, shift, residual[:, :, 1:], *problem.params)
    with pytest.raises(RuntimeError, match="check groups"):
        conv2d_fused(input[:, :1], weight, scale, shift, residual, *problem.params)
