"""ConvBNReLU2d, FusedConv2d and DepthwiseSeparableConv2d against the same layers of torch.nn."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastconv
from fastconv.fused import ConvBNReLU2d, DepthwiseSeparableConv2d, FusedConv2d, fused_conv2d

ACTIVATIONS = {"none": nn.Identity, "relu": nn.ReLU, "relu6": nn.ReLU6, "tanh": nn.Tanh}
SHAPES = {
    "plain": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1)},
    "same": {"kernel_size": 4, "padding": "same", "dilation": 2},
    "grouped": {"kernel_size": 3, "groups": 2},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "circular_same": {"kernel_size": 4, "padding": "same", "padding_mode": "circular"},
}


def torch_block(activation="relu", **options):
    return nn.Sequential(nn.Conv2d(4, 6, bias=False, **options), nn.BatchNorm2d(6), ACTIVATIONS[activation]())


def pair_of_blocks(activation="relu", **options):
    """Ours and torch's, from one seed, with running statistics and affine parameters that are not the initial ones."""
    torch.manual_seed(0)
    ours = ConvBNReLU2d(4, 6, activation=activation, **options)
    theirs = torch_block(activation, **options)
    with torch.no_grad():
        ours.bn.running_mean.normal_()
        ours.bn.running_var.uniform_(0.2, 2)
        ours.bn.weight.normal_()
        ours.bn.bias.normal_()
    copy_state(ours, theirs)
    return ours, theirs


def copy_state(ours, theirs):
    theirs[0].load_state_dict(ours.conv.state_dict())
    theirs[1].load_state_dict(ours.bn.state_dict())


def ran():
    """What ran since reset_stats; nothing may have gone to torch."""
    stats = fastconv.stats()
    assert not [name for name in stats if name.startswith("torch/")]
    return sum(count for name, count in stats.items() if name.split("/")[0] in ("conv2d", "depthwise"))


def images(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_eval_equals_the_three_layers_of_torch(shape, activation):
    ours, theirs = pair_of_blocks(activation, **SHAPES[shape])
    input = images(2, 4, 9, 8)
    with torch.no_grad():
        fastconv.reset_stats()
        result = ours.eval()(input)
        assert ran() == 1
    torch.testing.assert_close(result, theirs.eval()(input), rtol=1e-4, atol=1e-5)


def test_eval_is_one_operator():
    ours, _ = pair_of_blocks(kernel_size=3)
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append((str(function), max((a.numel() for a in args if isinstance(a, torch.Tensor)), default=0)))
            return function(*args, **(kwargs or {}))

    with Recorder(), torch.no_grad():
        ours.eval()(images(1, 4, 9, 9))
    assert [name for name, _ in seen].count("fastconv.conv2d_fused.default") == 1
    # Everything else works on K numbers.
    assert all(size <= 6 for name, size in seen if "conv2d_fused" not in name)


def test_training_equals_torch_step_by_step():
    ours, theirs = pair_of_blocks("relu6", **SHAPES["plain"])
    optimizers = [torch.optim.SGD(block.parameters(), lr=0.1, momentum=0.9) for block in (ours, theirs)]
    for step in range(3):
        losses = []
        for block, optimizer in zip((ours, theirs), optimizers, strict=True):
            loss = block(images(4, 4, 6, 6, seed=step)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss)
        torch.testing.assert_close(*losses)
    for left, right in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_state_changed_between_two_eval_calls_is_honoured():
    ours, theirs = pair_of_blocks(kernel_size=3)
    input = images(2, 4, 7, 7)
    ours.eval()
    theirs.eval()
    changes = {
        "running mean in place": lambda m: m.bn.running_mean.add_(1),
        "running variance through data": lambda m: m.bn.running_var.data.mul_(3),
        "numpy": lambda m: m.bn.weight.detach().numpy().__setitem__(0, 5.0),
        "weight data replaced": lambda m: setattr(m.conv.weight, "data", m.conv.weight.data * 2),
        "load_state_dict": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
        "eps": lambda m: setattr(m.bn, "eps", 0.5),
        "a step of training": lambda m: (m.train()(input * 7), m.eval()),
    }
    with torch.no_grad():
        before = ours(input)
        for change in changes.values():
            change(ours)
            copy_state(ours, theirs)
            theirs[1].eps = ours.bn.eps
            after = ours(input)
            assert not torch.equal(after, before)
            torch.testing.assert_close(after, theirs(input), rtol=1e-4, atol=1e-4)
            before = after


def test_gradients_in_eval_equal_torchs():
    ours, theirs = pair_of_blocks("tanh", **SHAPES["plain"])
    ours.eval().double()
    theirs.eval().double()
    inputs = [images(2, 4, 5, 5).double().requires_grad_() for _ in range(2)]
    for block, input in zip((ours, theirs), inputs, strict=True):
        block(input).square().sum().backward()
    torch.testing.assert_close(*(input.grad for input in inputs))
    for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad)


def test_frozen_normalisation_inside_a_training_model_is_fused():
    ours, theirs = pair_of_blocks(kernel_size=3)
    ours.train().bn.eval()
    theirs.eval()
    fastconv.reset_stats()
    torch.testing.assert_close(ours(images(2, 4, 6, 6)), theirs(images(2, 4, 6, 6)))
    assert ran() == 1


def test_layers_that_cannot_be_folded_are_called_one_by_one():
    calls = []
    input = images(2, 4, 6, 6)
    ours, theirs = pair_of_blocks(kernel_size=3)
    ours.eval().bn.register_forward_hook(lambda *_: calls.append("hook"))
    torch.testing.assert_close(ours(input), theirs.eval()(input))
    assert calls == ["hook"]
    for replacement in (nn.BatchNorm2d(6, track_running_stats=False), nn.GroupNorm(2, 6), nn.Identity()):
        ours.bn, theirs[1] = replacement.eval(), replacement
        torch.testing.assert_close(ours(input), theirs(input))
    ours, theirs = pair_of_blocks(kernel_size=3)
    ours.activation, theirs[2] = nn.SiLU(), nn.SiLU()
    torch.testing.assert_close(ours.eval()(input), theirs.eval()(input))
    torch.nn.utils.parametrize.register_parametrization(ours.conv, "weight", nn.Softsign())
    torch.nn.utils.parametrize.register_parametrization(theirs[0], "weight", nn.Softsign())
    torch.testing.assert_close(ours(input), theirs(input))


def test_wrong_input_raises_what_torch_raises():
    ours, theirs = pair_of_blocks(kernel_size=3)
    for block in (ours.eval(), theirs.eval()):
        with pytest.raises(ValueError, match="expected 4D input"):
            block(images(4, 6, 6))
        with pytest.raises(RuntimeError, match="expected input"):
            block(images(1, 5, 6, 6))
    with pytest.raises(ValueError, match="expected one of"):
        ConvBNReLU2d(1, 1, 1, activation="gelu")


def test_block_survives_copying_pickling_and_conversion_of_dtype():
    ours, theirs = pair_of_blocks(kernel_size=3)
    input = images(2, 4, 6, 6)
    ours.eval()
    assert list(ours.state_dict()) == [
        "conv.weight",
        *(f"bn.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
    ]
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(twin(input), ours(input))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        result = copy.deepcopy(ours).to(dtype)(input.to(dtype))
        assert result.dtype == dtype
        torch.testing.assert_close(result.float(), theirs.eval()(input), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    ours, theirs = pair_of_blocks(kernel_size=3)
    fused = FusedConv2d.from_layers(ours.conv, ours.eval().bn, "relu")
    with torch.autocast("cpu", dtype=dtype), torch.no_grad():
        expected = theirs.eval()(images(2, 4, 6, 6))
        for block in (ours, fused):
            result = block(images(2, 4, 6, 6))
            assert result.dtype == expected.dtype == dtype
            torch.testing.assert_close(result, expected, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_in_one_graph(dynamic):
    ours, theirs = pair_of_blocks("relu6", **SHAPES["plain"])
    fused = FusedConv2d.from_layers(ours.conv, ours.eval().bn, "relu6")
    for block in (ours, fused):
        torch._dynamo.reset()
        compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for size in (6, 9):
            torch.testing.assert_close(compiled(images(2, 4, size, size)), theirs.eval()(images(2, 4, size, size)))


def test_export_and_tracing_show_torchs_operators():
    ours, theirs = pair_of_blocks(kernel_size=3)
    input = images(2, 4, 6, 6)
    fused = FusedConv2d.from_layers(ours.conv, ours.eval().bn, "relu")
    for block in (ours, fused):
        program = torch.export.export(block, (input,))
        targets = [str(node.target) for node in program.graph.nodes]
        assert "aten.conv2d.default" in targets
        assert not [target for target in targets if "fastconv" in target]
        torch.testing.assert_close(program.module()(input), theirs.eval()(input))
        torch.testing.assert_close(torch.fx.symbolic_trace(block)(input), theirs(input))


def fused_layer(**options):
    ours, theirs = pair_of_blocks(**options)
    return FusedConv2d.from_layers(ours.conv, ours.eval().bn, options.get("activation", "relu")), theirs.eval()


def test_fused_layer_equals_the_three_layers_with_and_without_residual():
    for options in SHAPES.values():
        fused, theirs = fused_layer(**options)
        input = images(2, 4, 9, 8)
        expected = theirs(input)
        fastconv.reset_stats()
        torch.testing.assert_close(fused(input), expected, rtol=1e-4, atol=1e-5)
        before = theirs[1](theirs[0](input))
        for residual in (images(*before.shape), images(1, 6, 1, 1), images(*before.shape).double()):
            result = fused(input, residual)
            torch.testing.assert_close(result, (before + residual).relu(), rtol=1e-4, atol=1e-5)
        assert ran() == 4


def test_fused_layer_takes_unbatched_images():
    fused, theirs = fused_layer(kernel_size=3)
    input, residual = images(4, 6, 6), images(6, 4, 4)
    expected = theirs[1](theirs[0](input)[None])[0]
    torch.testing.assert_close(fused(input), expected.relu())
    torch.testing.assert_close(fused(input, residual), (expected + residual).relu())


def test_fused_layer_is_frozen_and_independent_of_its_source():
    ours, theirs = pair_of_blocks(kernel_size=3)
    fused = FusedConv2d.from_layers(ours.conv, ours.eval().bn, "relu")
    plain = FusedConv2d.from_layers(ours.conv, None, "none")
    assert list(fused.parameters()) == []
    assert [(name, value.dtype) for name, value in fused.state_dict().items()] == [
        ("weight", torch.float32),
        ("bias", torch.float32),
    ]
    assert list(plain.state_dict()) == ["weight"]
    input = images(2, 4, 6, 6)
    expected, linear = theirs.eval()(input), theirs[0](input)
    with torch.no_grad():
        ours.conv.weight.zero_()
        ours.bn.running_mean.add_(5)
    torch.testing.assert_close(fused(input), expected)
    torch.testing.assert_close(plain(input), linear)


def test_gradients_reach_input_and_residual_of_a_fused_layer():
    fused, theirs = fused_layer(kernel_size=3, activation="tanh")
    fused.double()
    theirs.double()
    left, right = ([images(2, 4, 5, 5).double(), images(2, 6, 3, 3).double()] for _ in range(2))
    for tensor in (*left, *right):
        tensor.requires_grad_()
    fused(*left).sum().backward()
    theirs[1](theirs[0](right[0])).add(right[1]).tanh().sum().backward()
    # The folded weight was rounded to float32.
    torch.testing.assert_close([t.grad for t in left], [t.grad for t in right], rtol=1e-4, atol=1e-5)


def test_fused_layer_survives_copying_pickling_saving_and_repr():
    fused, _ = fused_layer(**SHAPES["same"])
    input = images(2, 4, 9, 9)
    expected = fused(input)
    buffer = io.BytesIO()
    torch.save(fused.state_dict(), buffer)
    buffer.seek(0)
    empty = FusedConv2d(
        torch.empty_like(fused.weight), torch.empty_like(fused.bias), (1, 1), fused.padding, (2, 2), activation="relu"
    )
    empty.load_state_dict(torch.load(buffer))
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), empty):
        assert torch.equal(twin(input), expected)
    assert repr(fused) == (
        "FusedConv2d(4, 6, kernel_size=(4, 4), stride=(1, 1), padding=(3, 3, 3, 3), dilation=(2, 2), activation=relu)"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_weights_are_folded_in_float32(dtype):
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(4, 6, 3, dtype=dtype), nn.BatchNorm2d(6).eval()
    with torch.no_grad():
        norm.running_var.fill_(1e-3)
        norm.running_mean.fill_(300.0)
        conv.bias.fill_(300.0)
    fused = FusedConv2d.from_layers(conv, norm)
    assert (fused.weight.dtype, fused.bias.dtype) == (dtype, torch.float32)
    input = images(2, 4, 6, 6).to(dtype)
    # In the half type itself 300 + x - 300 would lose x.
    expected = norm.double()(copy.deepcopy(conv).double()(input.double()))
    error = (fused(input).double() - expected).square().mean().sqrt()
    assert error < 2 * torch.finfo(dtype).eps * expected.square().mean().sqrt()


def test_what_no_kernel_serves_goes_to_torch_and_is_counted():
    weight, input = images(2, 3, 3, 3).to(torch.complex64), images(1, 3, 5, 5).to(torch.complex64)
    fastconv.reset_stats()
    result = fused_conv2d(input, weight, activation="tanh")
    assert fastconv.stats() == {"torch/conv2d_fused": 1}
    torch.testing.assert_close(result, nn.functional.conv2d(input, weight).tanh())


def test_depthwise_separable_equals_torchs_two_layers():
    torch.manual_seed(0)
    ours = DepthwiseSeparableConv2d(8, 12, stride=2)
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False), nn.Conv2d(8, 12, 1))
    input = images(2, 8, 9, 9)
    fastconv.reset_stats()
    result = ours(input)
    assert ran() == 2
    torch.testing.assert_close(result, theirs(input))
    result.sum().backward()
    theirs(input).sum().backward()
    for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [64, 128, 256, 512])
def test_depthwise_separable_saves_what_the_lecture_says(channels):
    flops = []
    input = torch.zeros(1, channels, 4, 4)
    for layer in (fastconv.Conv2d(channels, channels, 3, padding=1), DepthwiseSeparableConv2d(channels, channels)):
        with FlopCounterMode(display=False) as counter:
            assert layer(input).shape == input.shape
        flops.append(counter.get_total_flops())
    assert flops[0] / flops[1] == pytest.approx(18 * channels**2 / (18 * channels + 2 * channels**2))
