"""Memory that a fused model uses again: never under a result that somebody still holds."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch

import fastconv
from fastconv import _reuse
from fastconv.fused import FusedConv2d

pytestmark = pytest.mark.skipif(fastconv._library.EMULATED, reason="of the CPU's own kernels")

SIZE = 256  # 16 channels of it are _reuse.SMALLEST bytes


def network(padding_mode="zeros"):
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 16, 3, padding=1, padding_mode=padding_mode), torch.nn.ReLU()]
    layers += [torch.nn.Conv2d(16, 16, 3, padding=1), torch.nn.BatchNorm2d(16), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers).eval()


def images(seed, batch=1, size=SIZE):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def memory_of(model):
    (memory,) = {id(m.memory): m.memory for m in model.modules() if isinstance(m, FusedConv2d)}.values()
    return memory


def fused():
    model = fastconv.fuse(network())
    assert memory_of(model).bytes() == 0
    return model


@torch.no_grad()
def test_what_nobody_holds_is_used_again():
    model, x = fused(), images(0)
    first = model(x)
    blocks = memory_of(model).bytes()
    assert blocks == 2 * _reuse.SMALLEST
    place = first.data_ptr()
    torch.testing.assert_close(first, network()(x))
    del first
    places = set()
    for seed in range(4):
        places.add(model(images(seed)).data_ptr())
    assert memory_of(model).bytes() == blocks
    assert place in places


@torch.no_grad()
def test_what_cannot_be_resized_is_not_used_again():
    model = fused()
    model(images(0)).numpy()
    result = model(images(1))
    assert result.resize_(1, 32, SIZE, SIZE).shape[1] == 32


@torch.no_grad()
def test_what_another_process_may_read_is_never_used_again():
    model = fused()
    result = model(images(0)).share_memory_()
    kept, place = result.clone(), result.data_ptr()
    reader = torch.UntypedStorage._new_shared_filename_cpu(*result.untyped_storage()._share_filename_cpu_())
    del result
    for seed in range(1, 4):
        assert model(images(seed)).data_ptr() != place
    found = torch.empty(0).set_(reader)[: kept.numel()]
    assert torch.equal(found, kept.flatten())


@torch.no_grad()
@pytest.mark.parametrize("held", ["result", "view", "storage"])
def test_what_somebody_holds_stays(held):
    model = fused()
    result = model(images(0))
    expected = result.clone()
    kept = {"result": result, "view": result[0, 3], "storage": result.untyped_storage()}[held]
    del result
    for seed in range(1, 5):
        model(images(seed))
    if held == "storage":
        kept = torch.empty(0).set_(kept, 0, expected.shape, expected.stride())
    torch.testing.assert_close(kept, expected[0, 3] if held == "view" else expected, rtol=0, atol=0)


@torch.no_grad()
def test_what_a_hook_keeps_stays():
    model, seen = fused(), []
    next(m for m in model.modules() if isinstance(m, FusedConv2d)).register_forward_hook(
        lambda layer, inputs, output: seen.append((output, output.clone()))
    )
    for seed in range(3):
        model(images(seed))
    assert len(seen) == 3
    for output, expected in seen:
        torch.testing.assert_close(output, expected, rtol=0, atol=0)


def test_what_autograd_saved_stays():
    model = fused()
    head = torch.nn.Conv2d(16, 2, 1)
    with torch.no_grad():
        features = model(images(0))
    expected = features.clone()
    loss = head(features).square().sum()
    del features
    with torch.no_grad():
        for seed in range(1, 4):
            model(images(seed))
    loss.backward()
    wanted = torch.autograd.grad(head(expected).square().sum(), head.weight)[0]
    torch.testing.assert_close(head.weight.grad, wanted)


@torch.no_grad()
def test_threads_do_not_share_blocks():
    model = fused()
    expected = [model(images(seed)).clone() for seed in range(4)]
    wrong = []

    def work(seed):
        for _ in range(10):
            if not torch.equal(model(images(seed)), expected[seed]):
                wrong.append(seed)

    with_grad_off = [threading.Thread(target=torch.no_grad()(work), args=(seed,)) for seed in range(4)]
    for thread in with_grad_off:
        thread.start()
    for thread in with_grad_off:
        thread.join()
    assert wrong == []


@torch.no_grad()
def test_blocks_that_became_too_small_are_let_go():
    model = fused()
    model(images(0))
    model(images(0, batch=4))
    assert memory_of(model).bytes() == 2 * 4 * _reuse.SMALLEST
    model(images(0, batch=3))  # a result's storage is as large as the result
    assert memory_of(model).bytes() == 2 * (4 + 3) * _reuse.SMALLEST
    for _ in range(_reuse.KEPT):
        model(images(0, batch=3))
    assert memory_of(model).bytes() == 2 * 3 * _reuse.SMALLEST


@torch.no_grad()
def test_a_saved_result_holds_nothing_else():
    model = fused()
    model(images(0, batch=2))
    result = model(images(1))
    assert result.untyped_storage().nbytes() == result.numel() * result.element_size()


@torch.no_grad()
def test_what_was_held_once_is_given_back(monkeypatch):
    monkeypatch.setattr(_reuse, "KEPT", 8)
    model = fused()
    held = [model(images(seed)) for seed in range(20)]
    assert memory_of(model).bytes() >= 20 * _reuse.SMALLEST
    del held
    for seed in range(10):
        model(images(seed))
    assert memory_of(model).bytes() <= 3 * _reuse.SMALLEST


@torch.no_grad()
def test_small_results_are_left_to_the_allocator():
    model = fused()
    model(images(0, size=64))
    assert memory_of(model).bytes() == 0


def test_gradients_are_left_to_the_allocator():
    model = fused()
    x = images(0).requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None
    assert memory_of(model).bytes() == 0


@torch.no_grad()
def test_copies_have_memory_of_their_own():
    model = fused()
    model(images(0))
    file = io.BytesIO()
    torch.save(model, file)
    assert len(file.getvalue()) < _reuse.SMALLEST
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert memory_of(other) is not memory_of(model)
        assert memory_of(other).bytes() == 0
        torch.testing.assert_close(other(images(0)), model(images(0)), rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("inference", [False, True])
def test_results_are_ordinary_tensors(inference):
    model, x = fused(), images(0, batch=2).to(memory_format=torch.channels_last)
    with torch.inference_mode(inference):
        y = model(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert y._base is None
    assert y.is_inference() == inference
    torch.testing.assert_close(y, network()(x))


def test_the_operator_refuses_memory_that_does_not_fit():
    x, weight = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
    into = torch.ops.fastconv.conv2d_fused.eager_into
    arguments = (x, weight, None, None, None, [1, 1, 1, 1, 1, 1, 1, 1], 1, 0)
    expected = torch.nn.functional.conv2d(x, weight, padding=1)
    output = torch.full((1, 4, 8, 8), torch.nan)
    torch.testing.assert_close(into(*arguments, output), expected)
    torch.testing.assert_close(output, expected)
    for wrong, message in (
        (torch.empty(1, 4, 8, 7), "output"),
        (torch.empty(1, 4, 8, 8, dtype=torch.float64), "output"),
        (torch.empty(1, 4, 8, 8).to(memory_format=torch.channels_last), "output is not dense"),
        (torch.empty(4, 8, 8), "output"),
    ):
        with pytest.raises(RuntimeError, match=message):
            into(*arguments, wrong)
