"""fuse against the unfused torch model, on small networks of every shape that the patterns must see or refuse."""

from __future__ import annotations

import copy
import operator
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import fastconv
from fastconv._report import conversion_report
from fastconv.convert import convert, revert
from fastconv.fused import ConvBNReLU2d, DepthwiseSeparableConv2d, FusedConv2d
from fastconv.fusion import fuse


def norm(channels):
    """Batch normalisation that is not the identity."""
    layer = nn.BatchNorm2d(channels)
    with torch.no_grad():
        layer.running_mean.normal_(0, 0.3)
        layer.running_var.uniform_(0.5, 2)
        layer.weight.normal_(1, 0.3)
        layer.bias.normal_(0, 0.3)
    return layer


def images(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kinds(model):
    return [type(module) for module in model.modules() if not list(module.children())]


def check(model, *inputs, fused, rest=0, tolerance=1e-4):
    """fuse(model) agrees with model, has ``fused`` fused layers, and calls no convolution of torch's."""
    inputs = inputs or (images(2, 3, 16, 16),)
    before = [type(module) for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    result = fuse(model)
    assert [type(module) for module in model.modules()] == before
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    with torch.no_grad():
        fastconv.reset_stats()
        outputs = result(*(value.clone() for value in inputs))
        calls = {name: count for name, count in fastconv.stats().items() if name.startswith(("conv2d/", "depthwise"))}
        assert not [name for name in fastconv.stats() if name.startswith("torch/")]
        expected = model(*inputs)
    torch.testing.assert_close(outputs, expected, rtol=tolerance, atol=tolerance)
    assert kinds(result).count(FusedConv2d) == fused, conversion_report(result)
    assert kinds(result).count(fastconv.Conv2d) == rest
    assert nn.Conv2d not in kinds(result)
    assert sum(calls.values()) >= fused + rest
    return result


def names(entries):
    return [entry.name for entry in entries]


class BasicBlock(nn.Module):
    """ResNet's, with the in-place habits of the usual implementations."""

    def __init__(self, inputs, outputs, stride=1, add=operator.iadd, inplace=True):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = norm(outputs)
        self.relu = nn.ReLU(inplace=inplace)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = norm(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))
        self.add = add

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out = self.add(out, identity)
        return self.relu(out)


class Bottleneck(nn.Module):
    def __init__(self, inputs, width, outputs, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), norm(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), norm(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), norm(outputs)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x):
        identity = self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        return torch.relu(torch.add(self.bn3(self.conv3(out)), identity))


class ResNetLike(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.num_classes = 5
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 7, 2, 3, bias=False), norm(8), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        )
        self.layers = nn.Sequential(*blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, self.num_classes)

    def forward(self, x):
        return self.fc(torch.flatten(self.avgpool(self.layers(self.stem(x))), 1))


class InvertedResidual(nn.Module):
    """MobileNet-v2's: expansion, depthwise, linear projection, and a skip without an activation after it."""

    def __init__(self, inputs, outputs, stride, expansion):
        super().__init__()
        self.use_residual = stride == 1 and inputs == outputs
        hidden = inputs * expansion
        self.conv = nn.Sequential(
            *(nn.Conv2d(inputs, hidden, 1, bias=False), norm(hidden), nn.ReLU6(inplace=True)),
            *(nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), norm(hidden), nn.ReLU6(inplace=True)),
            *(nn.Conv2d(hidden, outputs, 1, bias=False), norm(outputs)),
        )

    def forward(self, x):
        return x + self.conv(x) if self.use_residual else self.conv(x)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def resnet(**options):
    return ResNetLike(BasicBlock(8, 8, **options), BasicBlock(8, 16, 2, **options)).eval()


ADDS = {
    "iadd": operator.iadd,
    "operator": operator.add,
    "torch.add": torch.add,
    "alpha=1": lambda a, b: torch.add(a, b, alpha=1),
    "method": lambda a, b: a.add(b),
    "method in place": lambda a, b: a.add_(b),
    "other way round": lambda a, b: b + a,
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("add", ADDS)
def test_resnet_basic_blocks(add, inplace):
    model = check(resnet(add=ADDS[add], inplace=inplace), images(2, 3, 33, 33), fused=6)
    # Nothing is left of normalisation, addition or activation.
    assert nn.BatchNorm2d not in kinds(model)
    functions = {str(node.target) for node in model.graph.nodes if node.op in ("call_function", "call_method")}
    assert all("flatten" in name for name in functions)
    report = conversion_report(model)
    assert "Conv2d + BatchNorm2d + add + relu" in {entry.layer for entry in report.swapped}
    assert model.num_classes == 5


def test_what_cannot_be_added_in_the_kernel_stays_outside():
    for add in (lambda a, b: torch.add(a, b, alpha=2), lambda a, b: a - b, lambda a, b: a + b + 1):
        check(resnet(add=add), images(2, 3, 33, 33), fused=6)
    model = fuse(resnet(add=lambda a, b: torch.add(a, b, alpha=2)))
    assert any(node.target is torch.add for node in model.graph.nodes)


def test_resnet_bottlenecks():
    check(ResNetLike(Bottleneck(8, 4, 16), Bottleneck(16, 4, 16, 2)).eval(), images(1, 3, 40, 40), fused=9)


def test_mobilenet_inverted_residuals():
    model = nn.Sequential(
        ConvBNReLU2d(3, 8, 3, 2, 1, activation="relu6"),
        InvertedResidual(8, 8, 1, 1),
        InvertedResidual(8, 12, 2, 6),
        InvertedResidual(12, 12, 1, 6),
        nn.AdaptiveAvgPool2d(1),
    ).eval()
    result = check(model, images(2, 3, 32, 32), fused=10)
    layers = [entry.layer for entry in conversion_report(result).swapped]
    assert layers.count("Conv2d + BatchNorm2d + add") == 2
    assert layers.count("Conv2d + BatchNorm2d + relu6") == 7


def test_grouped_biased_and_padded_convolutions():
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, groups=3), norm(6), nn.Tanh()),
        *(nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular"), norm(6), nn.ReLU()),
        *(nn.Conv2d(6, 4, 4, padding="same", dilation=2), nn.ReLU6()),
        *(DepthwiseSeparableConv2d(4, 4), norm(4)),
    ).eval()
    check(model, fused=4, rest=1)


def test_normalisation_without_affine_or_statistics():
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3), nn.SyncBatchNorm(4)),
        *(nn.Conv2d(4, 4, 1), norm(4)),
    ).eval()
    model[-1].train()
    model[-1].momentum = 0
    result = check(model, fused=2, rest=2)
    left = {entry.name: entry.note for entry in conversion_report(result).left}
    assert "no running statistics" in left["4"]
    assert "training mode" in left["9"]


class Functional(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.conv, self.bn, self.activation = nn.Conv2d(3, 4, 3), norm(4), activation

    def forward(self, x):
        return self.activation(self.bn(self.conv(x)))


@pytest.mark.parametrize(
    "activation",
    [
        F.relu,
        F.relu6,
        F.tanh,
        torch.relu,
        torch.tanh,
        torch.relu_,
        torch.tanh_,
        lambda x: F.relu(x, True),
        lambda x: F.relu6(x, inplace=True),
        lambda x: x.relu(),
        lambda x: x.relu_(),
        lambda x: x.tanh(),
        lambda x: x.tanh_(),
    ],
)
def test_functional_activations(activation):
    result = check(Functional(activation).eval(), fused=1)
    assert [node.op for node in result.graph.nodes] == ["placeholder", "call_module", "output"]


def test_other_activations_stay():
    for activation in (F.silu, F.gelu, lambda x: x.clamp(0, 6), lambda x: F.leaky_relu(x, 0.1)):
        result = check(Functional(activation).eval(), fused=1)
        assert len(result.graph.nodes) > 3


class Wiring(nn.Module):
    """Two convolutions and a function that says how they are wired."""

    def __init__(self, wiring):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 3, padding=1), norm(3), nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1), norm(3)
        self.wiring = wiring

    def forward(self, x):
        return self.wiring(self, x)


def two_readers(m, x):
    y = m.conv(x)
    return m.relu(m.bn(y)) + m.conv2(y)


def called_twice_alike(m, x):
    return m.relu(m.bn(m.conv(m.relu(m.bn(m.conv(x))))))


def called_twice_differently(m, x):
    return m.bn2(m.conv(m.relu(m.bn(m.conv(x)))))


def called_alone_too(m, x):
    return m.conv(m.relu(m.bn(m.conv(x)))) * 2


def input_written_in_between(m, x):
    y = m.conv(x)
    x = x.mul_(2)
    return m.relu(y + x)


def view_of_input_written_in_between(m, x):
    x = x * 1
    y = m.bn(m.conv(x))
    view = x.view(-1)
    view.mul_(2)
    return (y + x).relu()


def input_activated_in_between(m, x):
    x = m.bn2(x)
    y = m.bn(m.conv(x))
    z = m.relu(x)
    return y + z


def input_written_by_slices(m, x):
    x = x * 1
    y = m.conv(x)
    x[:, 0] = 0
    return torch.relu(y + x)


def skip_written_before_the_addition(m, x):
    y = m.bn(m.conv(x))
    z = m.relu(m.bn2(m.conv2(x)))
    return m.relu(y + z)


def added_into_the_skip(m, x):
    z = x * 1
    out = z
    z += m.bn(m.conv(x))
    return z + out


def doubled(m, x):
    y = m.bn(m.conv(x))
    return m.relu(y + y)


def broadcast(m, x):
    return m.relu(m.bn(m.conv(x)) + x.mean((2, 3), keepdim=True))


def broadcast_over_the_convolution(m, x):
    return m.relu(m.bn(m.conv(x.mean((2, 3), keepdim=True))) + x)


def plus_number(m, x):
    return m.relu(m.bn(m.conv(x)) + 1)


def plus_size(m, x):
    return m.relu(m.bn(m.conv(x)) + x.size(2))


def plus_double(m, x):
    return m.relu(m.bn(m.conv(x)) + x.double())


def output_is_returned_twice(m, x):
    y = m.bn(m.conv(x))
    return y, m.relu(y * 1)


def two_branches(m, x):
    return torch.relu(m.bn(m.conv(x)) + m.bn2(m.conv2(x)))


@pytest.mark.parametrize(
    ("wiring", "fused", "rest"),
    [
        (two_readers, 1, 1),
        (called_twice_alike, 1, 0),
        (called_twice_differently, 2, 0),
        (called_alone_too, 1, 1),
        (input_written_in_between, 0, 1),
        (view_of_input_written_in_between, 0, 1),
        (input_activated_in_between, 0, 1),
        (input_written_by_slices, 0, 1),
        (skip_written_before_the_addition, 2, 0),
        (added_into_the_skip, 1, 0),
        (doubled, 1, 0),
        (broadcast, 1, 0),
        (broadcast_over_the_convolution, 1, 0),
        (plus_number, 1, 0),
        (plus_size, 1, 0),
        (plus_double, 1, 0),
        (output_is_returned_twice, 1, 0),
        (two_branches, 2, 0),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_wirings(wiring, fused, rest):
    check(Wiring(wiring).eval(), fused=fused, rest=rest)


def write_through_view(net, x, y):
    x.view(-1).mul_(0.5)
    return x


def write_a_row(net, x, y):
    x[:, :, 0] = y[:, :, 1]
    return x


STEPS = {
    "conv": lambda net, x, y: net.conv(x),
    "conv2": lambda net, x, y: net.conv2(x),
    "bn": lambda net, x, y: net.bn(x),
    "relu": lambda net, x, y: net.relu(x),
    "relu_": lambda net, x, y: net.relu_(x),
    "tanh": lambda net, x, y: torch.tanh(x),
    "add": lambda net, x, y: x + y,
    "iadd": lambda net, x, y: operator.iadd(x, y),
    "add_": lambda net, x, y: x.add_(y),
    "mul_": lambda net, x, y: x.mul_(0.5),
    "view": lambda net, x, y: x.flatten(1).unflatten(1, (3, -1)).view(x.shape),
    "write_through_view": write_through_view,
    "write_a_row": write_a_row,
}


class RandomNet(nn.Module):
    """A random program over a growing list of values: (step, operand, operand) each."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.conv2, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1), norm(3)
        self.relu, self.relu_ = nn.ReLU(), nn.ReLU(inplace=True)
        # Convolutions, normalisations and activations often follow one another, as in real networks.
        steps = [*STEPS, "conv", "conv", "bn", "bn", "bn", "relu_", "iadd", "add"]
        self.program = []
        for count in range(1, 15):
            step = steps[torch.randint(len(steps), ()).item()]
            latest = torch.rand(()).item() < 0.7
            first, second = (torch.randint(count, ()).item() for _ in range(2))
            self.program.append((step, count - 1 if latest else first, second))

    def forward(self, x):
        values = [x * 1]
        for step, first, second in self.program:
            values.append(STEPS[step](self, values[first], values[second]))
        return values[-1], values[len(values) // 2]


def test_random_programs_with_in_place_writes_and_views():
    fused = 0
    for seed in range(40):
        model = RandomNet(seed).eval()
        input = images(1, 3, 4, 4)
        result = fuse(model)
        with torch.no_grad():
            torch.testing.assert_close(
                result(input), model(input), rtol=1e-3, atol=1e-3, msg=lambda text, m=model: f"{m.program}: {text}"
            )
        assert isinstance(result, torch.fx.GraphModule)
        fused += kinds(result).count(FusedConv2d)
    assert fused > 15


class Branching(nn.Module):
    """Cannot be traced: it looks at values."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU6())
        self.block = ConvBNReLU2d(4, 8, 3, padding=1)
        self.residual = BasicBlock(8, 8)
        self.extra = nn.ModuleList([nn.Conv2d(8, 8, 1), nn.Sequential(nn.Conv2d(8, 8, 1), norm(8))])

    def forward(self, x):
        x = self.residual(self.block(self.features(x)))
        return self.extra[0](x) if x.mean() > 100 else self.extra[1](self.extra[0](x))


def test_untraceable_models_are_fused_module_by_module():
    result = check(Branching().eval(), fused=6, rest=1)
    assert type(result) is Branching
    assert isinstance(result.features, nn.Sequential)
    assert len(result.features) == 5
    report = conversion_report(result)
    assert any("cannot trace" in entry.note for entry in report.left)
    assert "features.0" in names(report.swapped)


def test_untraceable_parts_of_a_traceable_model():
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), norm(3), nn.ReLU(), Branching(), nn.MaxPool2d(2)).eval()
    result = check(model, fused=7, rest=1)
    assert names(entry for entry in conversion_report(result).left) == ["3"]
    assert fastconv.MaxPool2d in kinds(result)


class Optional_(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), norm(4)
        self.tap = None

    def forward(self, x, mask=None, *, double=False):
        self.tap = x
        if mask is not None:
            x = x * mask
        x = self.bn(self.conv(x))
        return x * 2 if double else x


def test_optional_arguments_are_fixed_at_their_defaults():
    model = Optional_().eval()
    result = check(model, fused=1)
    input = images(1, 3, 8, 8)
    torch.testing.assert_close(result(input, mask=None, double=False), model(input))
    with pytest.raises(AssertionError, match="mask"):
        result(input, mask=input)
    with pytest.raises(AssertionError, match="double"):
        result(input, double=True)
    assert result.tap is None


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("grid", torch.ones(4, 1, 1), persistent=False)

    def forward(self, x):
        return self.features(x) + torch.randn(1, 4, 1, 1)


class Counting(Noisy):
    def forward(self, x):
        self.calls += 1
        return self.features(x)


class Gridded(Noisy):
    def forward(self, x):
        return self.features(x) + self.grid


def test_buffers_stay_buffers():
    model = check(Gridded().eval(), fused=1)
    assert dict(model.named_buffers()).keys() == {"features.0.weight", "features.0.bias", "grid"}
    assert list(model.state_dict()) == ["features.0.weight", "features.0.bias"]


def test_random_numbers_and_counters_are_not_baked_in():
    noisy = fuse(Noisy().eval())
    assert kinds(noisy)[0] is FusedConv2d
    assert not torch.equal(noisy(images(1, 3, 8, 8)), noisy(images(1, 3, 8, 8)))
    model = Counting().eval()
    counting = fuse(model)
    assert model.calls == 0
    counting(images(1, 3, 8, 8))
    counting(images(1, 3, 8, 8))
    assert counting.calls == 2


def test_watched_layers_are_left_whole():
    calls = []
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 3), norm(4), nn.ReLU(), BasicBlock(4, 4)
    )
    model.eval()
    model[0].register_forward_hook(lambda *_: calls.append("conv"))
    model[5].register_forward_hook(lambda *_: calls.append("relu"))
    model[6].register_forward_hook(lambda *_: calls.append("block"))
    model.register_forward_hook(lambda m, a, r: calls.append("model"))
    result = fuse(model)
    torch.testing.assert_close(result(images(1, 3, 12, 12)), model(images(1, 3, 12, 12)), rtol=1e-4, atol=1e-4)
    assert calls == ["conv", "relu", "block", "model"] * 2
    assert kinds(result).count(FusedConv2d) == 3
    assert {entry.name: entry.note for entry in conversion_report(result).left} == {"0": "not fused: it has hooks"}


def test_parametrized_and_pruned_weights():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 3), norm(4)).eval()
    torch.nn.utils.parametrizations.weight_norm(model[0])
    prune.random_unstructured(model[3], "weight", 0.5)
    result = check(model, fused=1, rest=1)
    assert "parametrizations" not in " ".join(result.state_dict())


def test_subclasses_are_left():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)

    result = fuse(nn.Sequential(Standardised(3, 4, 3), norm(4), nn.Conv2d(4, 4, 1), nn.ReLU()).eval())
    assert kinds(result).count(FusedConv2d) == 1
    assert "subclass" in conversion_report(result).left[0].note


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype):
    model = resnet().to(dtype)
    result = fuse(model)
    output = result(images(2, 3, 33, 33).to(dtype))
    assert output.dtype == dtype
    expected = model.double()(images(2, 3, 33, 33).double())
    torch.testing.assert_close(output.double(), expected, rtol=0.05, atol=0.05)
    assert kinds(result).count(FusedConv2d) == 6


def test_channels_last_stays_channels_last():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm(8), nn.ReLU()).eval().to(memory_format=torch.channels_last)
    result = fuse(model)
    input = images(2, 3, 9, 9).to(memory_format=torch.channels_last)
    output = result(input)
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, model(input), rtol=1e-4, atol=1e-5)


def test_training_models_are_refused():
    with pytest.raises(RuntimeError, match=r"call model\.eval\(\) first"):
        fuse(resnet().train())
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        fuse("model")


def test_single_layers_and_converted_and_fused_models():
    assert type(fuse(nn.Conv2d(3, 3, 3).eval())) is fastconv.Conv2d
    assert type(fuse(ConvBNReLU2d(3, 4, 3).eval())) is FusedConv2d
    check(convert(resnet()), images(2, 3, 33, 33), fused=6)
    check(revert(convert(resnet())), images(2, 3, 33, 33), fused=6)
    again = fuse(fuse(resnet()))
    assert kinds(again).count(FusedConv2d) == 6
    check(torch.fx.symbolic_trace(resnet()).eval(), images(2, 3, 33, 33), fused=6)


def test_fused_weights_are_independent_of_the_original():
    model = resnet()
    result = fuse(model)
    expected = result(images(1, 3, 33, 33))
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not name.startswith("fc"):
                tensor.zero_()
    assert torch.equal(result(images(1, 3, 33, 33)), expected)
    assert [name for name, _ in result.named_parameters()] == ["fc.weight", "fc.bias"]


def test_copies_pickles_and_checkpoints():
    for model in (resnet(), Branching().eval()):
        result = fuse(model)
        input = images(1, 3, 33, 33)
        expected = result(input)
        other = fuse(copy.deepcopy(model))
        with torch.no_grad():
            for tensor in other.state_dict().values():
                tensor.normal_()
        other.load_state_dict(result.state_dict())
        for twin in (copy.deepcopy(result), pickle.loads(pickle.dumps(result)), other):
            assert torch.equal(twin(input), expected)
            assert conversion_report(twin).action == "fuse"


def test_gradients_reach_the_input():
    model = resnet().double()
    result = fuse(model)
    left, right = (images(1, 3, 33, 33).double().requires_grad_() for _ in range(2))
    result(left).sum().backward()
    model(right).sum().backward()
    torch.testing.assert_close(left.grad, right.grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_and_export(dynamic):
    model = resnet()
    result = fuse(model)
    compiled = torch.compile(result, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with torch.no_grad():
        for size in (33, 40):
            input = images(2, 3, size, size)
            torch.testing.assert_close(compiled(input), model(input), rtol=1e-4, atol=1e-4)
    exported = torch.export.export(result, (images(2, 3, 33, 33),))
    assert not [node for node in exported.graph.nodes if "fastconv" in str(node.target)]


def test_report_reads_well():
    text = str(conversion_report(fuse(resnet())))
    assert text.splitlines()[0] == "fastconv.fuse: 8 swapped, 0 left"
    assert "stem.0                 Conv2d + BatchNorm2d + relu -> fastconv.FusedConv2d" in text
    assert "torch.nn.MaxPool2d -> fastconv.MaxPool2d" in text
