"""Transformed weights that a fused model keeps: what they change is the kernel and the time, never a result."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from packing import fused, images, kept, layer_of
from torch import Tensor, nn

import fastconv
from fastconv import _C
from fastconv._packed import PackedWeight
from fastconv.fused import FusedConv2d
from fastconv.stats import reset_stats, stats

pytestmark = pytest.mark.skipif(fastconv._library.EMULATED, reason="of the CPU's own kernels")
FORMATS = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
GEOMETRY = (1, 1, 1, 1, 1, 1, 1, 1)


@torch.no_grad()
def exact(model: nn.Module, x: Tensor) -> Tensor:
    layer = layer_of(model)
    shift = layer.bias.to(torch.float64)
    geometry = layer.stride, layer.padding[:2], layer.dilation, layer.groups
    return nn.functional.conv2d(x.double(), layer.weight.double(), shift, *geometry).relu()


@FORMATS
@DTYPES
@pytest.mark.parametrize(("n", "channels", "filters", "size"), [(1, 64, 64, 28), (3, 50, 75, 27), (2, 256, 256, 14)])
@torch.no_grad()
def test_the_same_kernel_gives_the_same_bits(memory_format, dtype, n, channels, filters, size, poisoned):
    model = fused(channels, filters).to(dtype)
    layer = layer_of(model)
    x = images(channels, size, n).to(dtype).to(memory_format=memory_format)
    residual = torch.randn(n, filters, size, size).to(dtype).to(memory_format=memory_format)
    operands = (x, layer.weight, None, layer.bias, residual)
    named = torch.ops.fastconv.conv2d_fused(*operands, [1, 1], [1] * 4, [1, 1], 1, 1, "winograd")
    reset_stats()
    for _ in range(2):
        found = layer(x, residual)
        assert torch.equal(found, named)
        assert found.stride() == named.stride()
    assert {key: value for key, value in stats().items() if key.startswith("conv2d")} == {"conv2d/winograd": 2}
    assert kept(model) > 36 * 4 * channels * filters


@torch.no_grad()
def test_one_form_serves_every_image():
    model = fused()
    for size, n in ((28, 1), (40, 2), (30, 1)):
        x = images(size=size, n=n)
        torch.testing.assert_close(model(x).double(), exact(model, x), rtol=1e-4, atol=1e-4)
    once, expected = kept(model), model(images())
    torch.testing.assert_close(
        model(images().to(memory_format=torch.channels_last)).double(), exact(model, images()), rtol=1e-4, atol=1e-4
    )
    assert kept(model) == once, "the layout changes nothing"
    twin = fused()  # its form is made of channels_last weights
    twin(images().to(memory_format=torch.channels_last))
    assert torch.equal(twin(images()), expected)


def test_what_kernel_packed_weights_choose():
    def kernels(channels: int, size: int, **changes: Any) -> list[str]:
        arguments = {
            "stride": (1, 1), "padding": (1,) * 4, "dilation": (1, 1), "groups": 1, "dtype": "float32",
            "pass_name": "forward", **changes,
        }  # fmt: skip
        shapes = (1, channels, size, size), (channels, channels, 3, 3)
        plans = [_C.plan_conv2d(*shapes, channels_last=last, packed=True, **arguments) for last in (False, True)]
        return [str(plan["kernel"]).removeprefix("conv2d/") for plan in plans]

    for channels, size in ((512, 7), (256, 14), (512, 14), (128, 14), (32, 7), (64, 13), (64, 6)):
        assert kernels(channels, size) == ["winograd", "winograd"]
    assert "winograd" not in kernels(1056, 14), "its memory"
    assert "winograd" not in kernels(512, 4)
    assert kernels(64, 4) == ["winograd", "winograd"]
    assert "winograd" not in kernels(64, 3)
    assert "winograd" not in kernels(256, 14, dtype="float64")
    assert "winograd" not in kernels(256, 14, stride=(2, 2))
    if _C.active_isa() == "avx512_bf16":
        assert kernels(256, 14, dtype="bfloat16") == ["winograd", "winograd"]
        assert kernels(256, 14, dtype="bfloat16", stride=(2, 2)) == ["pairs", "pairs"]


@torch.no_grad()
def test_no_form_is_made_where_no_kernel_reads_it():
    model = fused(512, 512)
    layer_of(model)(images(512, 4))
    assert kept(model) == 0
    model(images(512, 7))
    assert 16 << 20 <= kept(model) <= 18 << 20
    for options in ({"groups": 64}, {"groups": 16}):  # depthwise; four filters a group
        assert layer_of(fused(64, 64, **options)).packed is None
    large = fused(4200, 4100, 1)
    large(images(4200, 1))
    assert kept(large) == 0, "more than 64 MiB"


@FORMATS
@torch.no_grad()
def test_images_outside_the_condition_go_to_direct(memory_format):
    model, x = fused(), images(n=2)
    x[1, :, 9, 9] = 6e4
    x = x.to(memory_format=memory_format)
    layer = layer_of(model)
    reset_stats()
    found = layer(x)
    assert {key for key in stats() if key.startswith("conv2d")} == {"conv2d/winograd", "conv2d/tiled"}
    arguments = (layer.weight, None, layer.bias, None, [1, 1], [1] * 4, [1, 1], 1, 1)
    assert torch.equal(found[1:], torch.ops.fastconv.conv2d_fused(x[1:], *arguments, "direct"))


@pytest.mark.parametrize(("channels", "size"), [(64, 4), (64, 6), (32, 7), (512, 7), (64, 14), (512, 14)])
@FORMATS
@torch.no_grad()
def test_errors_on_small_maps(channels, size, memory_format):
    """Maps that have Winograd only with kept filters: the bound of test_winograd_choice.py."""
    model = fused(channels, channels)
    layer, x = layer_of(model), images(channels, size, 2).relu()
    layer.activation = "none"
    reset_stats()
    found = layer(x.to(memory_format=memory_format))
    assert [key for key in stats() if key.startswith("conv2d")] == ["conv2d/winograd"]
    shift = layer.bias.double()
    wanted = nn.functional.conv2d(x.double(), layer.weight.double(), shift, padding=1)
    energy = x.double().square().mean((1, 2, 3)).sqrt().reshape(-1, 1, 1, 1)
    norm = layer.weight.double().square().sum((1, 2, 3)).sqrt().reshape(1, -1, 1, 1)
    assert ((found - wanted).abs() / (norm * energy)).max() < 2e-5


def added(layer: Any) -> None:
    layer.weight.add_(1.0)


def added_in_inference_mode(layer: Any) -> None:
    with torch.inference_mode():
        layer.weight.add_(1.0)


def replaced(layer: Any) -> None:
    layer.weight = torch.full_like(layer.weight, 0.25)


def data_replaced(layer: Any) -> None:
    layer.weight.data = torch.full_like(layer.weight, 0.25)


def data_replaced_twice(layer: Any) -> None:
    for value in (3.0, 0.25):
        layer.weight.data = torch.full_like(layer.weight, value)


def loaded(layer: Any) -> None:
    layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()})


def loaded_by_assignment(layer: Any) -> None:
    layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()}, assign=True)


def through_numpy_then_dropped(layer: Any) -> None:
    layer.weight.numpy()[:] = 0.5
    layer.train().eval()


def through_data_then_loaded(layer: Any) -> None:
    layer.weight.data.mul_(2)
    layer.load_state_dict(layer.state_dict())


def swapped(layer: Any) -> None:
    torch.utils.swap_tensors(layer.weight, torch.full_like(layer.weight, 0.5))


CHANGES = [
    added, added_in_inference_mode, replaced, data_replaced, data_replaced_twice, loaded, loaded_by_assignment,
    through_numpy_then_dropped, through_data_then_loaded, swapped,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("kernel", [1, 3])
@torch.no_grad()
def test_the_next_call_sees_a_change(change: Callable[[Any], None], kernel, memory_format):
    model = fused(kernel=kernel)
    if kernel == 1:
        memory_format = torch.channels_last
    x = images().to(memory_format=memory_format)
    before = model(x).clone()
    assert kept(model) > 0
    change(layer_of(model))
    after = model(x)
    torch.testing.assert_close(after.double(), exact(model, x), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(before, after), "the change changed nothing: this test could not fail"


@torch.no_grad()
def test_casts_drop_the_form():
    model, x = fused(), images()
    model(x)
    model.double()
    assert kept(model) == 0
    torch.testing.assert_close(layer_of(model)(x.double()), exact(model, x))
    assert kept(model) == 0, "float64 has no Winograd"
    model.half()
    torch.testing.assert_close(model(x.half()).double(), exact(model, x.half()), rtol=2e-2, atol=2e-2)
    assert kept(model) > 0


@torch.no_grad()
def test_copies_start_without_forms_and_go_their_own_way():
    model, x = fused(), images()
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    assert len(file.getvalue()) < kept(model), "the form was saved"
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False), fastconv.fuse(model)):
        assert layer_of(twin).packed is not layer_of(model).packed
        assert kept(twin) == 0
        assert torch.equal(twin(x), expected)
        twin.load_state_dict({name: value * 2 for name, value in twin.state_dict().items()}, assign=True)
        assert not torch.equal(twin(x), expected)
        assert torch.equal(model(x), expected)
    assert set(model.state_dict()) == {f"0.{name}" for name in ("weight", "bias")}


@torch.no_grad()
def test_a_write_to_shared_memory_is_seen_by_both():
    model, x = fused(), images()
    twin = fastconv.fuse(model)
    assert torch.equal(model(x), twin(x))
    layer_of(model).weight.mul_(2)
    assert torch.equal(model(x), twin(x))


@torch.no_grad()
def test_threads_agree():
    model, inputs = fused(), [images(seed=seed) for seed in range(4)]
    expected = [fused()(x) for x in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(10):
            if not torch.equal(model(inputs[index]), expected[index]):
                wrong.append(index)
            layer_of(model).packed.clear()

    threads = [threading.Thread(target=torch.no_grad()(work), args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_calls_that_something_watches_keep_nothing():
    model, x = fused(), images()
    model(x.clone().requires_grad_()).sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x)
    torch.func.vmap(model)(x[None])
    torch.export.export(model, (x,))
    torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    assert kept(model) == 0


def test_weights_of_inference_mode_are_not_kept():
    model, x = fused(), images()
    layer = layer_of(model)
    with torch.inference_mode():
        layer.weight = layer.weight.clone()
        before = model(x)
        layer.weight.mul_(2)
        assert not torch.equal(model(x), before)
    assert kept(model) == 0


def test_layers_that_fuse_did_not_make_keep_nothing():
    layer = FusedConv2d(torch.randn(64, 64, 3, 3), None, padding=(1, 1, 1, 1))
    with torch.no_grad():
        layer(images())
    assert layer.packed is None


def test_few_kinds_of_inputs_are_remembered():
    packed, weight = PackedWeight(), torch.randn(64, 64, 3, 3)
    for n in range(1, 200):
        assert packed.find(torch.empty(n, 64, 28, 28), weight, GEOMETRY, 1) is not None
    assert packed._forms is not None
    assert len(packed._forms.by_input) <= 64
    assert len(packed._forms.by_kernel) == 1


def test_the_operators_refuse_what_is_not_theirs():
    pack, eager = torch.ops.fastconv.conv2d_pack, torch.ops.fastconv.conv2d_fused.eager
    x, weight = images(), torch.randn(64, 64, 3, 3)
    packed = pack(weight, GEOMETRY, 1, False, "winograd")
    assert packed.dtype == torch.uint8
    assert packed.dim() == 1
    last = pack(weight, GEOMETRY, 1, True, "tiled")
    for wrong in (packed[1:], packed.double(), last, pack(weight[32:], GEOMETRY, 1, False, "winograd")):
        with pytest.raises(RuntimeError, match="packed"):
            eager(x, weight, None, None, None, GEOMETRY, 1, 0, wrong)
    for arguments, message in (
        ((weight.double(), GEOMETRY, 1, False, "winograd"), "float32"),
        ((weight, (2, 2, 1, 1, 1, 1, 1, 1), 1, False, "winograd"), "stride"),
        ((weight, GEOMETRY, 2, False, "winograd"), "groups"),
        ((weight[..., :1], GEOMETRY, 1, False, "winograd"), "3x3"),
        ((weight[0], GEOMETRY, 1, False, "winograd"), "weight"),
        ((weight, GEOMETRY, 1, False, "tiled"), "NCHW"),
        ((weight, GEOMETRY, 8, True, "tiled"), "padding"),
        ((weight, GEOMETRY, 1, True, "rows"), "expected winograd or tiled"),
    ):
        with pytest.raises(RuntimeError, match=message):
            pack(*arguments)
    with pytest.raises(RuntimeError, match="leave packed out"):  # an image without Winograd
        eager(torch.randn(1, 64, 3, 3), weight, None, None, None, GEOMETRY, 1, 0, packed)
