"""fuse on whole networks against the unfused torch model; what it reports, keeps and refuses."""

from __future__ import annotations

import copy
import operator
import pickle

import pytest
import torch
from fusing import BasicBlock, Bottleneck, InvertedResidual, ResNetLike, check, images, kinds, names, norm, resnet
from torch import nn
from torch.nn.utils import prune

import fastconv
from fastconv._report import conversion_report
from fastconv.convert import convert, revert
from fastconv.fused import ConvBNReLU2d, DepthwiseSeparableConv2d, FusedConv2d
from fastconv.fusion import fuse


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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
