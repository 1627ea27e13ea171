"""convert and revert: the same objects in new classes, the same numbers, nothing lost."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import pytest
import torch
from torch import fx, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastconv
from fastconv._report import conversion_report
from fastconv.convert import convert, revert
from fastconv.fused import ConvBNReLU2d, FusedConv2d


class AlexLike(nn.Module):
    """Every layer that is exchanged, and some that are not."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.LocalResponseNorm(5, k=2.0),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(8, 8, 3, padding=1, groups=2),
            nn.ReLU(),
            nn.AvgPool2d(2),
        )
        self.pool = nn.AdaptiveAvgPool2d((2, 2))
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        return self.head(self.pool(self.features(x)).flatten(1))


def alex(seed=0):
    torch.manual_seed(seed)
    return AlexLike()


def images(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


INPUT = (2, 3, 33, 33)


def ran(function):
    """The op families that ran in ``function``; none of them may be torch's."""
    fastconv.reset_stats()
    function()
    names = fastconv.stats()
    assert not [name for name in names if name.startswith("torch/")]
    return {name.split("/")[0] for name in names}


def classes(model):
    return [type(module) for module in model.modules()]


def test_all_layers_are_exchanged_and_ran():
    original = alex()
    model = convert(original)
    assert [type(model.features[i]).__module__ for i in (0, 2, 3, 4, 6)] == ["fastconv.layers"] * 5
    assert type(model.pool) is fastconv.AdaptiveAvgPool2d
    with torch.no_grad():
        kernels = ran(lambda: model(images(*INPUT)))
        torch.testing.assert_close(model(images(*INPUT)), original(images(*INPUT)), rtol=1e-4, atol=1e-5)
    assert {"conv2d", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "local_response_norm"} <= kernels


@pytest.mark.parametrize("inplace", [False, True])
def test_parameters_and_buffers_are_the_same_objects(inplace):
    original = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), ConvBNReLU2d(4, 4, 1))
    tensors = dict(original.named_parameters()) | dict(original.named_buffers())
    before = classes(original)
    model = convert(original, inplace=inplace)
    assert (model is original) == inplace
    assert (classes(original) == before) != inplace
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert list(after) == list(tensors)
    assert all(after[name] is tensors[name] for name in tensors)
    assert list(model.state_dict()) == list(original.state_dict())


@pytest.mark.parametrize("inplace", [False, True])
def test_an_optimizer_made_before_trains_the_converted_model(inplace):
    reference, original = alex(), alex()
    optimizers = [
        torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-4, fused=True) for model in (reference, original)
    ]
    model = convert(original, inplace=inplace)
    for step in range(4):
        losses = []
        for network, optimizer in zip((reference, model), optimizers, strict=True):
            loss = network(images(*INPUT, seed=step)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss)
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)
    for left, right in zip(reference.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)


def test_copy_and_original_are_independent_modules():
    original = alex()
    calls = []
    original.features[0].register_forward_hook(lambda *_: calls.append("old"))
    model = convert(original)
    model.eval()
    assert original.training
    assert original.features[0].training
    model.features[0].register_forward_hook(lambda *_: calls.append("new"))
    del model.features[6]
    model.pool.output_size = 1
    model.features[3].extra = 1
    assert len(original.features) == 7
    assert original.pool.output_size == (2, 2)
    assert not hasattr(original.features[3], "extra")
    original(images(*INPUT))
    assert calls == ["old"]
    model.features(images(*INPUT))
    assert calls == ["old", "old", "new"]


@pytest.mark.parametrize("inplace", [False, True])
def test_everything_else_survives(inplace):
    original = alex()
    calls = []
    conv = original.features[0]
    conv.weight.requires_grad_(False)
    conv.eval()
    conv.note = {"extra": 1}
    original.config = ["plain"]
    conv.register_forward_pre_hook(lambda m, a, k: calls.append(("pre", type(m))), with_kwargs=True)
    conv.register_forward_hook(lambda m, a, r: calls.append(("post", type(m))))
    conv.register_full_backward_hook(lambda m, i, o: calls.append(("backward", type(m))))
    conv.register_state_dict_post_hook(lambda *_: calls.append(("state", None)))
    model = convert(original, inplace=inplace)
    conv = model.features[0]
    assert type(conv) is fastconv.Conv2d
    assert (conv.weight.requires_grad, conv.training, conv.note) == (False, False, {"extra": 1})
    assert model.features[4].training
    assert model.config == ["plain"]
    model(images(*INPUT)).sum().backward()
    assert calls == [("pre", type(conv)), ("post", type(conv)), ("backward", type(conv))]
    model.state_dict()
    assert calls[-1] == ("state", None)


class Sharing(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.again = self.first
        self.second = nn.Conv2d(3, 3, 3, padding=1)
        self.second.weight = self.first.weight
        self.steps = [self.first, ("pool", nn.MaxPool2d(2)), {"deep": [self.second]}]
        self.shortcut = self.second.forward
        self.partial = functools.partial(self.apply_to, self.first)
        self.steps.append(self.steps)

    def apply_to(self, layer, x):
        return layer(x)

    def forward(self, x):
        return self.shortcut(self.partial(self.again(self.first(x)))) + self.steps[2]["deep"][0](x)


@pytest.mark.parametrize("inplace", [False, True])
def test_shared_modules_tied_weights_and_references_stay_so(inplace):
    original = Sharing()
    expected = original(images(1, 3, 6, 6))
    model = convert(original, inplace=inplace)
    assert model.first is model.again
    assert model.first.weight is model.second.weight is original.first.weight
    assert model.steps[0] is model.first
    assert model.steps[2]["deep"][0] is model.second
    assert model.shortcut.__self__ is model.second
    assert model.partial.args[0] is model.first
    assert model.partial.func.__self__ is model
    assert isinstance(original.steps[0], fastconv.Conv2d) == inplace
    fastconv.reset_stats()
    torch.testing.assert_close(model(images(1, 3, 6, 6)), expected)
    # Class-level methods looked up anew: the bound forward is torch's, whose _conv_forward is ours.
    assert sum(fastconv.stats().values()) == 5
    assert [entry.name for entry in conversion_report(model).swapped] == ["first", "second"]


@pytest.mark.parametrize("inplace", [False, True])
def test_parametrized_layers_keep_their_parametrizations(inplace):
    def build():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 4))
        parametrizations.weight_norm(model[0])
        parametrizations.spectral_norm(model[1])
        parametrize.register_parametrization(model[2], "weight", nn.Softsign())
        return model

    reference, original = build(), build()
    linear = type(original[2])
    model = convert(original, inplace=inplace)
    assert [isinstance(model[i], fastconv.Conv2d) for i in (0, 1)] == [True, True]
    assert isinstance(original[0], fastconv.Conv2d) == inplace
    assert list(model.state_dict()) == list(reference.state_dict())
    parametrize.register_parametrization(model[2], "bias", nn.Softsign())
    assert type(original[2]) is linear
    assert parametrize.is_parametrized(original[2], "bias") == inplace
    input = images(2, 3, 6, 6)
    fastconv.reset_stats()
    torch.testing.assert_close(model[:2](input), reference[:2](input))
    assert sum(fastconv.stats().values()) == 2
    copy.deepcopy(model)
    back = revert(model)
    assert type(back[0]).__bases__ == (nn.Conv2d,)
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is fastconv.Conv2d
    torch.testing.assert_close(model.eval()[:2](input), reference.eval()[:2](input))


@pytest.mark.parametrize("inplace", [False, True])
def test_pruned_and_old_style_normalised_layers(inplace):
    original = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    prune.random_unstructured(original[0], "weight", 0.5)
    torch.nn.utils.spectral_norm(original[1]).eval()
    expected = original(images(1, 3, 8, 8))
    model = convert(original, inplace=inplace)
    assert len(conversion_report(model).swapped) == 2
    torch.testing.assert_close(model(images(1, 3, 8, 8)), expected)
    with torch.no_grad():
        model[0].weight_orig.mul_(2)
    torch.testing.assert_close(model[0](images(1, 3, 8, 8)), original[0](images(1, 3, 8, 8)))
    prune.remove(model[0], "weight")
    assert (model[0].weight == 0).sum() >= 54


def test_filter_sees_names_and_the_original_modules():
    original = alex()
    seen = {}
    convert(original, filter_fn=lambda name, module: seen.setdefault(name, module) is None)
    assert list(seen) == ["features.0", "features.2", "features.3", "features.4", "features.6", "pool"]
    assert all(original.get_submodule(name) is module for name, module in seen.items())


@pytest.mark.parametrize("inplace", [False, True])
def test_a_single_layer_is_a_model(inplace):
    for layer in (nn.Conv2d(3, 4, 3), nn.MaxPool2d(2, return_indices=True)):
        input, kind = images(1, 3, 6, 6), type(layer)
        expected = layer(input)
        model = convert(layer, inplace=inplace)
        torch.testing.assert_close(model(input), expected)
        assert type(model).__module__ == "fastconv.layers"
        assert "(root)" in str(conversion_report(model))
        assert type(revert(model, inplace=inplace)) is kind


@pytest.mark.parametrize("inplace", [False, True])
def test_revert_is_the_inverse(inplace):
    original = alex()
    before = classes(original)
    model = convert(original)
    back = revert(model, inplace=inplace)
    assert classes(back) == before
    assert all(a is b for a, b in zip(back.parameters(), original.parameters(), strict=True))
    assert conversion_report(back).action == "revert"
    assert (type(model.pool) is fastconv.AdaptiveAvgPool2d) != inplace
    fastconv.reset_stats()
    assert torch.equal(back(images(*INPUT)), original(images(*INPUT)))
    assert fastconv.stats() == {}


def test_revert_of_blocks_and_fused_layers():
    block = ConvBNReLU2d(3, 4, 3).eval()
    model = revert(nn.Sequential(block, fastconv.GlobalAvgPool2d(), FusedConv2d(torch.ones(1, 4, 1, 1))))
    fastconv.reset_stats()
    result = model[:2](images(2, 3, 6, 6))
    assert fastconv.stats() == {}
    torch.testing.assert_close(result, block(images(2, 3, 6, 6)).mean((2, 3), keepdim=True))
    assert type(model[1]) is nn.AdaptiveAvgPool2d
    assert [entry.name for entry in conversion_report(model).left] == ["2"]


def test_converting_twice_changes_nothing():
    model = convert(convert(alex()))
    assert conversion_report(model).swapped == []
    assert conversion_report(model).left == []


@pytest.mark.parametrize("inplace", [False, True])
def test_copies_pickles_and_checkpoints(inplace):
    original = alex()
    model = convert(original, inplace=inplace)
    expected = model(images(*INPUT))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    fresh = convert(alex(seed=5))
    fresh.load_state_dict(model.state_dict())
    plain = alex(seed=6)
    plain.load_state_dict(model.state_dict())
    twins = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False), fresh)
    for twin in twins:
        assert torch.equal(twin(images(*INPUT)), expected)
        assert not set(map(id, twin.parameters())) & set(map(id, model.parameters()))
        assert len(conversion_report(twin).swapped) == 6
    torch.testing.assert_close(plain(images(*INPUT)), expected, rtol=1e-4, atol=1e-5)


def test_moving_the_copy_moves_the_shared_parameters():
    original = alex()
    model = convert(original)
    model.double()
    assert original.features[0].weight.dtype == torch.float64
    assert original.features[0].weight is model.features[0].weight


def test_traced_graphs_are_converted():
    original = fx.symbolic_trace(alex())
    original.register_forward_hook(lambda m, a, r: r * 2)
    model = convert(original)
    expected = original(images(*INPUT))
    assert isinstance(model, fx.GraphModule)
    assert type(model.features[0] if hasattr(model.features, "__getitem__") else model.get_submodule("features.0")) is (
        fastconv.Conv2d
    )
    assert type(original.get_submodule("features.0")) is nn.Conv2d
    assert model.graph is not original.graph
    torch.testing.assert_close(model(images(*INPUT)), expected, rtol=1e-4, atol=1e-5)


def test_compile_in_one_graph():
    original = alex()
    model = torch.compile(convert(original), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model(images(*INPUT)), original(images(*INPUT)), rtol=1e-4, atol=1e-5)
    assert len(conversion_report(model).swapped) == 6


def test_a_model_compiled_in_place_gives_an_eager_copy():
    original = alex()
    original.compile(backend="aot_eager")
    model = convert(original)
    assert "conv2d" in ran(lambda: model(images(*INPUT)))


def test_distributed_data_parallel():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        original = alex()
        wrapped = nn.parallel.DistributedDataParallel(convert(original))
        loss = wrapped(images(*INPUT)).sum()
        loss.backward()
        assert len(conversion_report(wrapped).swapped) == 6
        gradients = [p.grad.clone() for p in original.parameters()]
        original.zero_grad()
        original(images(*INPUT)).sum().backward()
        for ours, theirs in zip(gradients, original.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.grad, rtol=1e-3, atol=1e-3)
    finally:
        torch.distributed.destroy_process_group()
