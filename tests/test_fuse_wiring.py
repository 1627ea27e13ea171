"""fuse on every way to wire a convolution: who reads, who writes in place, who is called twice; and random programs."""

from __future__ import annotations

import operator

import pytest
import torch
from fusing import check, images, kinds, norm
from torch import nn
from torch.nn import functional as F

from fastconv.fused import FusedConv2d
from fastconv.fusion import fuse


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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
