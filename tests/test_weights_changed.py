"""Weights that change behind the layer's back between two eval calls: the second call must see them.

A layer that keeps packed weights must notice every one of these, and none of them has to bump a version counter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fastconv


def sgd(fused: bool) -> Callable[[nn.Conv2d], None]:
    def step(layer: nn.Conv2d) -> None:
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter)
        torch.optim.SGD(layer.parameters(), lr=0.5, fused=fused).step()

    return step


def adam(fused: bool) -> Callable[[nn.Conv2d], None]:
    def step(layer: nn.Conv2d) -> None:
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter)
        torch.optim.Adam(layer.parameters(), lr=0.5, fused=fused).step()

    return step


def through_numpy(layer: nn.Conv2d) -> None:
    layer.weight.detach().numpy()[:] = 3.0


def through_data(layer: nn.Conv2d) -> None:
    layer.weight.data.mul_(2.0)


def data_replaced(layer: nn.Conv2d) -> None:
    layer.weight.data = torch.full_like(layer.weight, 0.25)


def under_no_grad(layer: nn.Conv2d) -> None:
    with torch.no_grad():
        layer.weight.add_(1.0)


def in_inference_mode(layer: nn.Conv2d) -> None:
    with torch.inference_mode():
        layer.weight.add_(1.0)


def loaded(layer: nn.Conv2d) -> None:
    layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()})


def loaded_by_assignment(layer: nn.Conv2d) -> None:
    layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()}, assign=True)


def parameter_replaced(layer: nn.Conv2d) -> None:
    layer.weight = nn.Parameter(torch.full_like(layer.weight, -1.5))


def one_element_by_pointer(layer: nn.Conv2d) -> None:
    torch.tensor([], dtype=layer.weight.dtype).set_(layer.weight.detach().untyped_storage())[7] += 100.0


def foreach(layer: nn.Conv2d) -> None:
    torch._foreach_mul_([parameter.data for parameter in layer.parameters()], -2.0)


def trained(layer: nn.Conv2d) -> None:
    layer.train()
    layer(torch.randn(1, 4, 6, 6)).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    layer.eval()


CHANGES = [
    sgd(False), sgd(True), adam(False), adam(True), through_numpy, through_data, data_replaced, under_no_grad,
    in_inference_mode, loaded, loaded_by_assignment, parameter_replaced, one_element_by_pointer, foreach, trained,
]  # fmt: skip
NAMES = ["sgd", "fused-sgd", "adam", "fused-adam", *(change.__name__ for change in CHANGES[4:])]


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("change", CHANGES, ids=NAMES)
def test_the_next_call_sees_it(change, groups, memory_format):
    layer = fastconv.Conv2d(4, 8, 3, groups=groups).eval().to(memory_format=memory_format)
    image = torch.randn(2, 4, 6, 6).to(memory_format=memory_format)
    for gradient in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with gradient():
            before = [layer(image).detach().clone() for _ in range(3)][-1]
        change(layer)
        with gradient():
            after = layer(image).detach()
        expected = nn.functional.conv2d(image, layer.weight, layer.bias, groups=groups)
        torch.testing.assert_close(after, expected)
        assert not torch.allclose(before, after), "the change changed nothing: this test could not fail"
        layer.weight.data.uniform_(-1, 1)


def test_swapped_tensors():
    """How module.to() replaces parameters under torch.__future__.set_swap_module_params_on_conversion."""
    layer, image = fastconv.Conv2d(4, 8, 3).eval(), torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        before = layer(image)
        torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.full_like(layer.weight, 0.5)))
        after = layer(image)
        torch.testing.assert_close(after, nn.functional.conv2d(image, layer.weight, layer.bias))
    assert not torch.allclose(before, after)


def test_a_layer_built_in_inference_mode():
    """Reading the version counter of an inference tensor raises; nobody may try."""
    with torch.inference_mode():
        layer = fastconv.Conv2d(4, 8, 3).eval()
        image = torch.randn(2, 4, 6, 6)
        layer(image)
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(image), nn.functional.conv2d(image, layer.weight, layer.bias))


def test_copies_in_mid_life_go_their_own_way():
    layer = fastconv.Conv2d(4, 8, 3).eval()
    image = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        before = layer(image)
        twin = copy.deepcopy(layer)
        twin.weight.data.zero_()
        assert torch.equal(twin(image), twin.bias.reshape(1, 8, 1, 1).expand(2, 8, 4, 4))
        assert torch.equal(layer(image), before)
        layer.weight.data.zero_()
        assert torch.equal(layer(image), twin(image))


def test_shared_parameters():
    one, two = fastconv.Conv2d(4, 8, 3).eval(), fastconv.Conv2d(4, 8, 3).eval()
    two.weight, two.bias = one.weight, one.bias
    image = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        assert torch.equal(one(image), two(image))
        one.weight.detach().numpy()[:] += 1
        assert torch.equal(one(image), two(image))


def test_memory_reused_by_another_weight():
    """A new tensor at the address of a freed one is not the old one."""
    image = torch.randn(1, 4, 6, 6)
    for step in range(20):
        layer = fastconv.Conv2d(4, 8, 3, bias=False).eval()
        nn.init.constant_(layer.weight, float(step))
        with torch.no_grad():
            torch.testing.assert_close(layer(image), nn.functional.conv2d(image, layer.weight))
        del layer
