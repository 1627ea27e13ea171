"""LeNet-5 as the paper has it, and the lecture's formulas reproduced by number."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastconv
from fastconv.models import LeNet5, analysis
from fastconv.models.lenet import CONNECTIONS

# Table I of the paper, row by row: the input maps 0..5, an X wherever an output map 0..15 reads them.
TABLE_I = [
    "X...XXX..XXXX.XX",
    "XX...XXX..XXXX.X",
    "XXX...XXX..X.XXX",
    ".XXX..XXXX..X.XX",
    "..XXX..XXXX.XX.X",
    "...XXX..XXXX.XXX",
]


def test_connections_are_table_one_of_the_paper():
    rows = ["".join("X" if row in inputs else "." for inputs in CONNECTIONS) for row in range(6)]
    assert rows == TABLE_I
    assert sum(len(inputs) for inputs in CONNECTIONS) == 60


def test_lenet_never_reads_what_the_table_leaves_out():
    torch.manual_seed(0)
    model = LeNet5()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(3):
        model(torch.randn(4, 1, 32, 32)).sum().backward()
        optimizer.step()
    weight = model.c3.weight.detach()
    read = torch.tensor([[character == "X" for character in row] for row in TABLE_I]).T
    assert torch.all(weight[~read] == 0)
    assert torch.all(weight[read].abs().amax((-1, -2)) > 0)
    # 60 connections of 25 weights, 16 biases: the number that the paper gives for C3.
    assert int((weight != 0).sum()) + model.c3.bias.numel() == 1516


def test_lenet_layers_have_the_papers_sizes_and_parameters():
    cost = analysis.analyse(LeNet5(), (2, 1, 32, 32))
    rows = {layer.name: (layer.output_shape, layer.params) for layer in cost.layers}
    assert rows["c1"] == ((2, 6, 28, 28), 156)
    assert rows["s2"] == ((2, 6, 14, 14), 12)
    assert rows["c3"] == ((2, 16, 10, 10), 16 * (6 * 25 + 1))  # dense: the mask is not counted
    assert rows["s4"] == ((2, 16, 5, 5), 32)
    assert rows["c5"] == ((2, 120, 1, 1), 48120)
    assert rows["f6"] == ((2, 84), 10164)
    assert rows["output"] == ((2, 10), 840)
    assert cost.params == sum(layer.params for layer in cost.layers) == 61740
    assert analysis.receptive_field([(5, 1), (2, 2), (5, 1), (2, 2), (5, 1)]) == 32


def test_lenet_output_is_the_squared_distance_to_each_centre():
    torch.manual_seed(0)
    output = LeNet5().output
    features = torch.randn(3, 84)
    expected = [[((row - centre) ** 2).sum().item() for centre in output.centres.detach()] for row in features]
    torch.testing.assert_close(output(features).detach(), torch.tensor(expected))


def test_lenet_is_the_same_network_of_fastconv_and_of_torch_layers():
    torch.manual_seed(7)
    ours = LeNet5()
    torch.manual_seed(7)
    theirs = LeNet5(layers=nn)
    assert type(theirs.s2.pool) is nn.AvgPool2d
    assert isinstance(ours.c1, fastconv.Conv2d)
    assert isinstance(ours.s2.pool, fastconv.AvgPool2d)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name

    x = torch.randn(5, 1, 32, 32)
    fastconv.reset_stats()
    mine, other = ours(x), theirs(x)
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-3)
    mine.square().mean().backward()
    other.square().mean().backward()
    for (name, parameter), twin in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(
            parameter.grad, twin.grad, rtol=1e-3, atol=1e-3 * twin.grad.abs().max().item(), msg=name
        )
    handed_over = [kernel for kernel in fastconv.stats() if kernel.startswith("torch/")]
    assert not handed_over


def test_output_sizes_are_what_torch_computes():
    for size, kernel, stride, padding, dilation in [
        (32, 5, 1, 0, 1),
        (224, 7, 2, 3, 1),
        (227, 11, 4, 0, 1),
        (13, 3, 2, 0, 1),
        (9, 3, 3, 1, 2),
    ]:
        layer = nn.Conv2d(1, 1, kernel, stride, padding, dilation)
        assert (
            analysis.output_size(size, kernel, stride, padding, dilation)
            == layer(torch.zeros(1, 1, size, 5 * kernel)).shape[2]
        )
    with pytest.raises(ValueError, match="covers 5 pixels, but the padded input has 4"):
        analysis.output_size(4, 5)


def test_same_padding_keeps_ceil_of_the_size():
    assert [analysis.same_output_size(size, 2) for size in (1, 2, 7, 8, 224)] == [1, 1, 4, 4, 112]
    assert nn.Conv2d(1, 1, 5, padding="same")(torch.zeros(1, 1, 31, 31)).shape[-1] == analysis.same_output_size(31)


def test_lecture_example_of_16_filters_8x5x5():
    assert analysis.conv_params(8, 16, 5) == 3216
    assert 16 * 32 * 32 == 16384
    assert analysis.conv_flops(8, 16, 5, 32, 32) == 6_553_600  # the lecture prints 6.55 MFLOPs


def test_lecture_fully_connected_layers():
    small_in, small_out = 224 * 224 * 3, 224 * 224
    assert analysis.linear_params(small_in, small_out, bias=False) == pytest.approx(7.5e9, rel=0.01)
    assert analysis.linear_flops(small_in, small_out) == pytest.approx(15e9, rel=0.01)
    large_in, large_out = 1024 * 1024 * 3, 1024 * 1024
    # The lecture prints 3.2e12 and 6.4e12; the formula gives 3.30e12 and 6.60e12, 3 % more.
    assert analysis.linear_params(large_in, large_out, bias=False) == 3_298_534_883_328
    assert analysis.linear_flops(large_in, large_out) == 6_597_069_766_656


@pytest.mark.parametrize("channels", [64, 128, 256, 512])
def test_two_3x3_layers_see_what_a_5x5_layer_sees_for_less(channels):
    height, width = 14, 20
    assert analysis.receptive_field([(3, 1), (3, 1)]) == analysis.receptive_field([(5, 1)]) == 5
    assert analysis.conv_params(channels, channels, 5) == 25 * channels**2 + channels
    assert 2 * analysis.conv_params(channels, channels, 3) == 18 * channels**2 + 2 * channels
    assert analysis.conv_flops(channels, channels, 5, height, width) == 50 * channels**2 * width * height
    assert 2 * analysis.conv_flops(channels, channels, 3, height, width) == 36 * channels**2 * width * height


@pytest.mark.parametrize("channels", [64, 128, 256, 512])
def test_depthwise_separable_is_eight_times_cheaper(channels):
    standard = analysis.conv_flops(channels, channels, 3, 14, 14)
    depthwise = analysis.conv_flops(channels, channels, 3, 14, 14, groups=channels)
    pointwise = analysis.conv_flops(channels, channels, 1, 14, 14)
    assert standard / (depthwise + pointwise) == pytest.approx(18 * channels**2 / (18 * channels + 2 * channels**2))
    # The lecture prints 8 to 8.85; C = 64 gives 7.89 and C = 512 gives 8.84.
    assert 7.88 < standard / (depthwise + pointwise) < 8.85


def test_receptive_field_of_stride_one_layers_is_the_closed_form():
    for layers in range(1, 6):
        for kernel in (1, 3, 5, 7):
            assert analysis.receptive_field([(kernel, 1)] * layers) == 1 + layers * (kernel - 1)


def test_receptive_field_is_where_the_gradient_is_not_zero():
    layers = [(7, 2), (3, 2), (3, 1), (3, 2), (1, 1)]
    net = nn.Sequential(*(nn.Conv2d(1, 1, kernel, stride) for kernel, stride in layers)).double()
    for parameter in net.parameters():
        nn.init.ones_(parameter)
    x = torch.zeros(1, 1, 101, 101, dtype=torch.float64, requires_grad=True)
    y = net(x)
    y[0, 0, y.shape[2] // 2, y.shape[3] // 2].backward()
    assert int((x.grad[0, 0] != 0).any(0).sum()) == analysis.receptive_field(layers)


# (filters, kernel, output size, input channels, parameters and MFLOPs printed in the lecture)
ALEXNET = [
    (96, 11, 55, 3, 35e3, 211),
    (256, 5, 27, 96, 615e3, 896),
    (384, 3, 13, 256, 885e3, 299),
    (384, 3, 13, 384, 1.3e6, 448),
    (256, 3, 13, 384, 885e3, 299),
]


@pytest.mark.parametrize(("filters", "kernel", "size", "channels", "params", "mflops"), ALEXNET)
def test_alexnet_convolutions(filters, kernel, size, channels, params, mflops):
    assert analysis.conv_params(channels, filters, kernel) == pytest.approx(params, rel=0.025)
    assert analysis.conv_flops(channels, filters, kernel, size, size) / 1e6 == pytest.approx(mflops, abs=0.9)


def test_alexnet_output_sizes():
    assert analysis.output_size(224, 11, 4, 2) == 55
    assert [analysis.output_size(size, 3, 2) for size in (55, 27, 13)] == [27, 13, 6]


def test_vgg16_flops_by_the_formula_and_as_printed():
    sizes, widths, depths = (224, 112, 56, 28, 14), (64, 128, 256, 512, 512), (2, 2, 3, 3, 3)

    def total(stage_sizes: tuple[int, ...]) -> int:
        channels, flops = 3, 0
        for size, width, depth in zip(stage_sizes, widths, depths, strict=True):
            for _ in range(depth):
                flops += analysis.conv_flops(channels, width, 3, size, size)
                channels = width
        return flops

    classifier = sum(analysis.linear_flops(*layer) for layer in [(25088, 4096), (4096, 4096), (4096, 1000)])
    assert (total(sizes) + classifier) / 1e9 == pytest.approx(30.9, abs=0.05)
    # The lecture's 39 counts stage 5 at 28x28, where it runs at 14x14.
    assert (total((*sizes[:4], 28)) + classifier) / 1e9 == pytest.approx(39, abs=0.5)


def test_resnet18_shares():
    assert analysis.conv_flops(3, 64, 7, 112, 112) / 1e6 == pytest.approx(236, abs=0.5)
    assert 4 * analysis.conv_flops(64, 64, 3, 56, 56) / 1e9 == pytest.approx(0.9, abs=0.05)
    for channels, size in ((128, 28), (256, 14), (512, 7)):
        assert analysis.conv_flops(channels // 2, channels, 3, size, size) / 1e6 == pytest.approx(115, abs=1)
        assert 3 * analysis.conv_flops(channels, channels, 3, size, size) / 1e9 == pytest.approx(0.7, abs=0.01)


def test_analyse_counts_like_torchs_flop_counter_and_leaves_the_model_alone():
    from torch.utils.flop_counter import FlopCounterMode

    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.Flatten(),
        nn.Linear(8 * 25, 7),
    )
    net[1].eval()
    before = net[1].running_mean.clone()
    cost = analysis.analyse(net, (2, 3, 14, 14))
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(2, 3, 14, 14))
    assert cost.flops == counter.get_total_flops()
    assert net.training
    assert not net[1].training
    assert torch.equal(net[1].running_mean, before)
    assert not any(layer._forward_hooks for layer in net)
    assert "Conv2d" in str(cost)
    assert f"{cost.params:,}" in str(cost)
