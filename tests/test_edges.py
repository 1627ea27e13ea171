"""Edges of the domain: empty batches and channels, 1x1 images, odd strides, NaN, infinities, denormals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import GUARD, assert_as_good, assert_within, guarded, or_from_float32, tensors_in
from torch import Tensor

from fastconv import functional
from fastconv.stats import reset_stats, stats

pytestmark = pytest.mark.usefixtures("poisoned")

# What each function is called with, after the input of 4 channels.
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "conv2d": ("conv2d", {"padding": 1, "stride": 2}),
    "conv2d-grouped": ("conv2d", {"padding": 1, "groups": 2}),
    "conv2d-depthwise": ("conv2d", {"padding": 1, "groups": 4}),
    "max_pool2d": ("max_pool2d", {"kernel_size": 3, "stride": 2, "padding": 1}),
    "max_pool2d-indices": ("max_pool2d", {"kernel_size": 2, "padding": 1, "ceil_mode": True, "return_indices": True}),
    "avg_pool2d": ("avg_pool2d", {"kernel_size": 3, "stride": 2, "padding": 1}),
    "adaptive_avg_pool2d": ("adaptive_avg_pool2d", {"output_size": (3, 2)}),
    "adaptive_avg_pool2d-global": ("adaptive_avg_pool2d", {"output_size": 1}),
    "local_response_norm": ("local_response_norm", {"size": 3}),
}


def extra_tensors(function: str, keywords: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, ...]:
    if function != "conv2d":
        return ()
    generator = torch.Generator().manual_seed(3)
    return tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((8, 4 // keywords.get("groups", 1), 3, 3), (8,))
    )


def evaluate(module: Any, call: str, input: Tensor) -> list[Tensor]:
    """Outputs, and gradients for input and parameters."""
    function, keywords = CALLS[call]
    leaves = [input, *extra_tensors(function, keywords, input.dtype)]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    outputs = tensors_in(getattr(module, function)(*leaves, **keywords))
    grads = torch.autograd.grad(outputs[0], leaves, torch.ones_like(outputs[0]))
    return [output.detach() for output in outputs] + list(grads)


def compare(call: str, input: Tensor) -> None:
    mine = evaluate(functional, call, input)
    theirs = or_from_float32(lambda dtype: evaluate(torch.nn.functional, call, input.to(dtype)), input.dtype)
    exact = evaluate(torch.nn.functional, call, input.double())
    for number, triple in enumerate(zip(mine, theirs, exact, strict=True)):
        assert_as_good(*triple, f"result {number} of {call}", allowed_roundings=8)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "guarded": lambda x: guarded(x),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda x: torch.full((3, 9, 20, 25), float("nan"), dtype=x.dtype)[1:, 2:6, 3:10, 4:24:3].copy_(x),
    "flipped-batch": lambda x: x.flip(0).transpose(0, 1).contiguous().transpose(0, 1),
    "expanded-batch": lambda x: x[:1].expand(2, -1, -1, -1),
    "expanded-channel": lambda x: x[:, :1].expand(-1, 4, -1, -1),
    "expanded-pixel": lambda x: x[:, :, :1, :1].expand(-1, -1, 7, 7),
    "channels-last-slice": lambda x: (
        torch.full((2, 9, 7, 7), float("nan"), dtype=x.dtype).to(memory_format=torch.channels_last)[:, 3:7].copy_(x)
    ),
    "overlapping": lambda x: x.flatten().as_strided((2, 4, 7, 7), (11, 5, 3, 1)),
    "odd-offset": lambda x: x.new_full((x.numel() + 1,), 0)[1:].copy_(x.flatten()).view(x.shape),
}


@pytest.mark.sanitize
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("call", CALLS)
def test_views(call, view, dtype):
    input = VIEWS[view](torch.randn(2, 4, 7, 7, dtype=torch.float64).to(dtype))
    compare(call, input)
    assert not [name for name in stats() if name.startswith("torch/")]


@pytest.mark.parametrize("call", CALLS)
def test_requiring_grad_through_a_view_reaches_the_base(call):
    base = torch.randn(1, 4, 7, 7, dtype=torch.float64)
    results = []
    function, keywords = CALLS[call]
    for module in (functional, torch.nn.functional):
        leaf = base.clone().requires_grad_()
        output = tensors_in(
            getattr(module, function)(
                leaf.expand(3, -1, -1, -1), *extra_tensors(function, keywords, base.dtype), **keywords
            )
        )[0]
        output.square().sum().backward()
        results.append(leaf.grad)
    torch.testing.assert_close(*results)


@pytest.mark.sanitize
@pytest.mark.parametrize("call", CALLS)
def test_zero_batch(call, dtype, memory_format):
    compare(call, torch.empty(0, 4, 7, 7, dtype=dtype).to(memory_format=memory_format))


@pytest.mark.sanitize
@pytest.mark.parametrize("call", CALLS)
def test_one_pixel(call, dtype, memory_format):
    compare(call, torch.randn(2, 4, 1, 1, dtype=torch.float64).to(dtype).to(memory_format=memory_format))
    compare(call, torch.randn(1, 4, 1, 9, dtype=torch.float64).to(dtype).to(memory_format=memory_format))
    compare(call, torch.randn(1, 4, 9, 1, dtype=torch.float64).to(dtype).to(memory_format=memory_format))


@pytest.mark.parametrize("call", CALLS)
def test_unbatched(call, dtype):
    input = torch.randn(4, 7, 7, dtype=torch.float64).to(dtype)
    compare(call, input)
    function, keywords = CALLS[call]
    if function == "local_response_norm":
        return  # its three-dimensional input is (N, C, L)
    extra = extra_tensors(function, keywords, dtype)
    alone = tensors_in(getattr(functional, function)(input, *extra, **keywords))
    batch = tensors_in(getattr(functional, function)(input[None], *extra, **keywords))
    assert all(torch.equal(one, many[0]) for one, many in zip(alone, batch, strict=True))


def test_zero_channels_are_torchs_business():
    """No product to add: torch decides what that is, bias or error, and fastconv follows."""
    for input, weight in (
        (torch.empty(1, 0, 4, 4), torch.empty(3, 0, 3, 3)),
        (torch.empty(1, 3, 4, 4), torch.empty(0, 3, 3, 3)),
        (torch.empty(1, 3, 4, 4), torch.empty(3, 3, 0, 3)),
    ):
        results: list[Any] = []
        for function in (torch.nn.functional.conv2d, functional.conv2d):
            try:
                results.append(function(input, weight, torch.ones(weight.shape[0])))
            except RuntimeError as error:
                results.append(type(error))
        assert type(results[0]) is type(results[1])
        if isinstance(results[0], Tensor):
            assert torch.equal(*results)
        else:
            assert results[0] is results[1]


@pytest.mark.parametrize("special", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("call", CALLS)
def test_non_finite(call, special, dtype, memory_format):
    """One special number among ordinary ones reaches exactly the outputs that torch lets it reach."""
    input = torch.randn(2, 4, 7, 7, dtype=torch.float64).to(dtype).to(memory_format=memory_format)
    for place in ((0, 0, 0, 0), (1, 3, 6, 6), (0, 2, 3, 4)):
        with_special = input.clone(memory_format=torch.preserve_format)
        with_special[place] = float(special)
        mine = evaluate(functional, call, with_special)[0]
        theirs = or_from_float32(lambda d, x=with_special: evaluate(torch.nn.functional, call, x.to(d)), dtype)[0]
        assert torch.equal(mine.isnan(), theirs.isnan())
        assert torch.equal(mine.isinf(), theirs.isinf())
        finite = mine.isfinite()
        tolerance = 32 * torch.finfo(dtype).eps
        torch.testing.assert_close(mine[finite], theirs[finite], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("call", [call for call in CALLS if call.startswith(("conv2d", "avg", "ada"))])
def test_denormals(call, dtype):
    """Neither flushed to zero on the way in nor on the way out, but by the dot product of pairs of bfloat16."""
    info = torch.finfo(dtype)
    smallest = info.tiny * info.eps
    input = torch.randint(1, 64, (2, 4, 7, 7)).to(torch.float64) * smallest
    function, keywords = CALLS[call]
    extra = tuple(torch.ones_like(t) for t in extra_tensors(function, keywords, dtype))
    extra = (extra[0], torch.zeros_like(extra[1])) if extra else ()
    exact = getattr(torch.nn.functional, function)(input, *(t.double() for t in extra), **keywords)
    reset_stats()
    mine = getattr(functional, function)(input.to(dtype), *extra, **keywords)
    if stats() == {"conv2d/pairs": 1}:
        assert dtype == torch.bfloat16
        assert not mine.any()
        mine = functional.conv2d(input.to(dtype), *extra, **keywords, algo="tiled")
    assert (mine != 0).any()
    assert_within(mine, exact, smallest + info.eps * exact, call)


def test_overflow_is_infinity(memory_format):
    """float16 sums are kept in float32, and only the result may overflow."""
    input = torch.full((1, 4, 5, 5), 30000.0, dtype=torch.float16).to(memory_format=memory_format)
    weight = torch.tensor([1.0, 1.0, -1.0, -1.0]).reshape(1, 4, 1, 1).half()
    assert functional.conv2d(input, weight).abs().max() == 0
    assert functional.conv2d(input, weight.abs()).isinf().all()
    assert torch.equal(functional.avg_pool2d(input, 3), input[:, :, :1, :1])
    assert torch.equal(functional.adaptive_avg_pool2d(input, 1), input[:, :, :1, :1])


def test_ties_go_to_the_first(dtype, memory_format):
    input = torch.zeros(1, 20, 6, 6, dtype=dtype).to(memory_format=memory_format).requires_grad_()
    values, indices = functional.max_pool2d(input, 3, return_indices=True)
    assert indices[0, 0].tolist() == [[0, 3], [18, 21]]
    [grad] = torch.autograd.grad(values.sum(), input)
    assert grad.sum() == values.numel()
    assert (grad[0, :, ::3, ::3] == 1).all()


@pytest.mark.sanitize
def test_results_own_their_memory_and_touch_no_other():
    """Nothing is written around the inputs, and results are no views of them."""
    input = guarded(torch.randn(1, 4, 8, 8))
    storage = torch.tensor([]).set_(input.untyped_storage())
    before = storage.clone()
    for call in CALLS:
        for result in evaluate(functional, call, input):
            assert result.untyped_storage().data_ptr() != input.untyped_storage().data_ptr()
    assert torch.equal(storage.nan_to_num(), before.nan_to_num())
    assert storage[:GUARD].isnan().all()


@pytest.mark.sanitize
def test_windows_that_see_padding_only(dtype, memory_format):
    """A dilated window may step over the image: minus infinity, and no gradient. (torch 2.13 writes outside.)"""
    image = guarded(torch.randn(1, 9, 1, 4).to(dtype).to(memory_format=memory_format)).requires_grad_()
    output = functional.max_pool2d(image, (2, 2), (1, 1), (1, 0), (2, 1), ceil_mode=True)
    assert output.shape == (1, 9, 1, 3)
    assert (output == float("-inf")).all()
    [grad] = torch.autograd.grad(output.sum(), image)
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("recording", [False, True])
def test_a_window_that_hangs_over_the_end_altogether(recording):
    """With ceil_mode a window may be larger than the input; a step of any length leaves one window."""
    x = torch.tensor([[[[3.0, 5.0]]]], requires_grad=recording)
    for name in ("max_pool2d", "avg_pool2d"):
        for arguments in ((2, 2), (2, 10**8)):
            reset_stats()
            found = getattr(functional, name)(x, *arguments, ceil_mode=True)
            wanted = getattr(torch.nn.functional, name)(x, 2, 2, ceil_mode=True)
            assert torch.equal(found, wanted)
            assert {key.split("/")[0] for key in stats()} <= {name, "max_pool2d_with_offsets"}
            if recording:
                assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (found, wanted)))
