"""torch.func, forward mode, second order, FX, autocast, FlopCounterMode, tensor subclasses, meta tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import tensors_in
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.flop_counter import FlopCounterMode

import fastconv
from fastconv import functional
from fastconv.stats import reset_stats, stats

CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "conv2d": ("conv2d", {"padding": 1, "stride": 2}),
    "conv2d-grouped": ("conv2d", {"padding": (1, 2), "groups": 2, "dilation": (1, 2)}),
    "conv2d-depthwise": ("conv2d", {"padding": "same", "groups": 4}),
    "conv2d-naive": ("conv2d", {"algo": "naive"}),
    "max_pool2d": ("max_pool2d", {"kernel_size": 3, "stride": 2, "padding": 1}),
    "avg_pool2d": ("avg_pool2d", {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}),
    "adaptive_avg_pool2d": ("adaptive_avg_pool2d", {"output_size": (3, 2)}),
    "adaptive_avg_pool2d-global": ("adaptive_avg_pool2d", {"output_size": 1}),
    "local_response_norm": ("local_response_norm", {"size": 3, "alpha": 0.1, "beta": 0.6}),
}
EACH = pytest.mark.parametrize("call", CALLS)


def leaves_of(call: str, dtype: torch.dtype = torch.float64, size: int = 5) -> list[Tensor]:
    function, keywords = CALLS[call]
    shapes = [(2, 4, size, size)]
    if function == "conv2d":
        shapes += [(4, 4 // keywords.get("groups", 1), 3, 3), (4,)]
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def function_of(call: str, module: Any = functional) -> Any:
    function, keywords = CALLS[call]
    if module is not functional:
        keywords = {name: value for name, value in keywords.items() if name != "algo"}
    return lambda *leaves: getattr(module, function)(*leaves, **keywords)


def twice(call: str, work: Any) -> tuple[Any, Any]:
    """``work`` of our function and of torch's; ours must not have gone to torch."""
    mine = work(function_of(call))
    assert stats()
    assert not [name for name in stats() if name.startswith("torch/")]
    return mine, work(function_of(call, torch.nn.functional))


@EACH
def test_gradcheck(call, memory_format):
    """First order in reverse and forward mode, batched, against finite differences."""
    leaves = [leaf.requires_grad_() for leaf in leaves_of(call)]
    leaves[0] = leaves[0].detach().to(memory_format=memory_format).requires_grad_()
    torch.autograd.gradcheck(
        function_of(call), leaves, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True,
        check_undefined_grad=True,
    )  # fmt: skip


@EACH
def test_gradgradcheck(call):
    leaves = [leaf.requires_grad_() for leaf in leaves_of(call, size=4)]
    torch.autograd.gradgradcheck(
        function_of(call),
        leaves,
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
        check_batched_grad=True,
        fast_mode=True,
    )


@EACH
def test_grad_vjp_jvp(call):
    leaves = leaves_of(call)
    tangents = [torch.randn_like(leaf) for leaf in leaves]
    everything = tuple(range(len(leaves)))

    def work(function: Any) -> list[Tensor]:
        output, pull = vjp(function, *leaves)
        return [
            *grad(lambda *a: function(*a).square().sum(), argnums=everything)(*leaves),
            *pull(torch.ones_like(output)),
            *jvp(function, tuple(leaves), tuple(tangents)),
            # One tangent alone: the others are None inside.
            *(jvp(lambda a, i=i: function(*leaves[:i], a, *leaves[i + 1 :]), (leaves[i],), (tangents[i],))[1]
              for i in everything),
        ]  # fmt: skip

    torch.testing.assert_close(*twice(call, work))


@EACH
def test_jacobians_and_hessians(call):
    leaves = leaves_of(call, size=3)

    def work(function: Any) -> list[Tensor]:
        last = len(leaves) - 1

        def scalar(leaf: Tensor) -> Tensor:
            return function(*leaves[:last], leaf).pow(3).sum()

        return [
            jacrev(function)(*leaves), jacfwd(function)(*leaves), hessian(scalar)(leaves[last]),
            jacfwd(grad(scalar))(leaves[last]), jacrev(jacfwd(scalar))(leaves[last]),
        ]  # fmt: skip

    torch.testing.assert_close(*twice(call, work))


@EACH
@pytest.mark.parametrize("batched", ["input", "parameters", "all", "last-dim"])
def test_vmap(call, batched):
    leaves = leaves_of(call)
    if len(leaves) == 1 and batched == "parameters":
        batched = "input"
    in_dims = tuple(
        None
        if (batched == "input" and i) or (batched == "parameters" and not i)
        else leaf.dim()
        if batched == "last-dim"
        else 0
        for i, leaf in enumerate(leaves)
    )
    stacked = [
        leaf if dim is None else torch.stack([leaf, 2 * leaf - 1, leaf.flip(0)], dim)
        for leaf, dim in zip(leaves, in_dims, strict=True)
    ]

    def work(function: Any) -> list[Tensor]:
        def gradients(*args: Tensor) -> Any:
            return grad(lambda *a: function(*a).square().sum(), argnums=tuple(range(len(args))))(*args)

        mapped = vmap(function, in_dims)(*stacked)
        return [mapped, *vmap(gradients, in_dims)(*stacked)]

    mine, theirs = twice(call, work)
    torch.testing.assert_close(mine, theirs)


def test_vmap_twice_and_per_sample_gradients():
    layer = fastconv.Conv2d(3, 4, 3).double()
    images = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def loss(p: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(layer, p, (image[None],)).square().sum()

    per_sample = vmap(grad(loss), (None, 0))(parameters, images)
    for number, image in enumerate(images):
        layer.zero_grad()
        loss(parameters, image).backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(per_sample[name][number], parameter.grad)
    nested = vmap(vmap(lambda x: functional.conv2d(x, layer.weight, layer.bias)))(images.reshape(5, 1, 1, 3, 6, 6))
    torch.testing.assert_close(nested.reshape(5, 4, 4, 4), layer(images))


@EACH
def test_dual_numbers(call):
    """torch.autograd.forward_ad on its own, without torch.func."""
    leaves, results = leaves_of(call), []
    for module in (functional, torch.nn.functional):
        with forward_ad.dual_level():
            torch.manual_seed(4)
            duals = [forward_ad.make_dual(leaf, torch.randn_like(leaf)) for leaf in leaves]
            results.append(forward_ad.unpack_dual(function_of(call, module)(*duals)).tangent)
    assert results[0] is not None
    torch.testing.assert_close(*results)


def small_network(module: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        module.Conv2d(3, 8, 3, padding=1), nn.ReLU(), module.MaxPool2d(2), module.Conv2d(8, 8, 3, groups=8),
        module.LocalResponseNorm(3), module.AvgPool2d(2), module.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


def test_fx_tracing(ran):
    net = small_network(fastconv)
    traced = torch.fx.symbolic_trace(net)
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert called == [functional.conv2d, functional.max_pool2d, functional.conv2d, functional.local_response_norm,
                      functional.avg_pool2d, functional.adaptive_avg_pool2d]  # fmt: skip
    image = torch.randn(3, 3, 14, 18)
    with ran("conv2d", "max_pool2d_with_offsets", "avg_pool2d", "adaptive_avg_pool2d", "local_response_norm"):
        torch.testing.assert_close(traced(image), net(image))


def test_fx_traces_through_functions(ran):
    """A Proxy is taken through __torch_function__: the call becomes one node that calls fastconv's function."""

    class Net(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            x = functional.conv2d(x, w, padding=1)
            x = functional.local_response_norm(functional.max_pool2d(x, 2), 3)
            return functional.adaptive_avg_pool2d(functional.avg_pool2d(x, 2), 1)

    traced = torch.fx.symbolic_trace(Net())
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert called == [functional.conv2d, functional.max_pool2d, functional.local_response_norm, functional.avg_pool2d,
                      functional.adaptive_avg_pool2d]  # fmt: skip
    arguments = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
    with ran("conv2d", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "local_response_norm"):
        torch.testing.assert_close(traced(*arguments), Net()(*arguments))


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(lower, ran):
    mine, theirs = small_network(fastconv), small_network(nn)
    image = torch.randn(2, 3, 12, 12)
    dtypes: list[list[torch.dtype]] = [[], []]
    outputs = []
    for net, seen in zip((mine, theirs), dtypes, strict=True):
        for layer in net:
            layer.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output.dtype))
        with ran() if net is theirs else ran("conv2d", "max_pool2d_with_offsets"), torch.autocast("cpu", lower):
            output = net(image)
            outputs.append(output)
        output.float().sum().backward()
    assert dtypes[0] == dtypes[1]
    tolerance = 16 * torch.finfo(lower).eps
    torch.testing.assert_close(*outputs, rtol=tolerance, atol=tolerance)
    for one, two in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert one.grad.dtype == two.grad.dtype == torch.float32
        torch.testing.assert_close(one.grad, two.grad, rtol=0.1, atol=0.1)


def test_autocast_disabled_inside_and_float64_left_alone():
    x, w = torch.randn(1, 3, 5, 5), torch.randn(2, 3, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.conv2d(x, w).dtype == torch.bfloat16
        assert functional.conv2d(x.double(), w.double()).dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert functional.conv2d(x, w).dtype == torch.float32
    assert functional.conv2d(x, w).dtype == torch.float32


@pytest.mark.parametrize("name", ["conv2d", "conv2d-grouped", "conv2d-depthwise"])
def test_flop_counter_agrees_with_torchs(name):
    counts = []
    for module in (functional, torch.nn.functional):
        leaves = [leaf.requires_grad_() for leaf in leaves_of(name)]
        with FlopCounterMode(display=False) as counter:
            output = function_of(name, module)(*leaves)
            forward = counter.get_total_flops()
            output.sum().backward()
        counts.append((forward, counter.get_total_flops()))
    forward, total = counts[0]
    assert forward == counts[1][0] > 0
    # Each gradient costs what the forward pass does. For groups torch counts the weight gradient as if there were none.
    assert total == 3 * forward
    assert total == counts[1][1] or name != "conv2d"


def test_flop_counter_without_gradients():
    counts = []
    for module in (fastconv, nn):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            small_network(module)(torch.randn(2, 3, 12, 12))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@EACH
def test_meta_tensors(call):
    """Shapes and strides without data are those of the real call; no kernel may be asked."""
    for format in (torch.contiguous_format, torch.channels_last):
        leaves = leaves_of(call)
        leaves[0] = leaves[0].to(memory_format=format)
        real = tensors_in(function_of(call)(*leaves))[0]
        theirs = tensors_in(function_of(call, torch.nn.functional)(*leaves))[0]
        reset_stats()
        meta = tensors_in(function_of(call)(*(leaf.to("meta") for leaf in leaves)))[0]
        assert stats() == {}
        assert meta.device.type == "meta"
        assert (meta.shape, meta.stride(), meta.dtype) == (real.shape, real.stride(), real.dtype)
        assert (meta.shape, meta.stride()) == (theirs.shape, theirs.stride())


class Logged(Tensor):
    """A tensor subclass that writes down what is called on it."""

    calls: list[Any] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


@EACH
def test_tensor_subclasses_see_the_call(call):
    Logged.calls.clear()
    leaves = leaves_of(call)
    output = function_of(call)(leaves[0].as_subclass(Logged), *leaves[1:])
    assert getattr(functional, CALLS[call][0]) in Logged.calls
    assert type(output) is Logged
    torch.testing.assert_close(output.as_subclass(Tensor), function_of(call)(*leaves))


@EACH
def test_saved_tensors_and_checkpointing(call):
    """Activation checkpointing, saved-tensor hooks and retain_graph go through the same graph."""
    from torch.utils.checkpoint import checkpoint

    leaves = [leaf.requires_grad_() for leaf in leaves_of(call)]
    plain = torch.autograd.grad(function_of(call)(*leaves).square().sum(), leaves)
    again = torch.autograd.grad(checkpoint(function_of(call), *leaves, use_reentrant=False).square().sum(), leaves)
    assert all(torch.equal(one, two) for one, two in zip(plain, again, strict=True))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        output = function_of(call)(*leaves).square().sum()
    for _ in range(2):
        hooked = torch.autograd.grad(output, leaves, retain_graph=True)
        assert all(torch.equal(one, two) for one, two in zip(plain, hooked, strict=True))


# The gradients of pooling do not need the input.
@pytest.mark.parametrize("call", [call for call in CALLS if "pool" not in call])
def test_a_leaf_changed_in_place_before_backward_is_noticed(call):
    leaves = [leaf.requires_grad_() for leaf in leaves_of(call)]
    output = function_of(call)(*leaves)
    with torch.no_grad():
        leaves[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
