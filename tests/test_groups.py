"""Groups of few channels, several of which share a register in channels_last: every width around a vector's."""

from __future__ import annotations

import pytest
import torch

from fastconv import _C
from fastconv.stats import reset_stats, stats

pytestmark = pytest.mark.sanitize

SHAPES = [  # groups, inputs and outputs of a group
    *[(groups, width, width) for groups, width in ((5, 2), (7, 3), (32, 4), (3, 5), (9, 7), (4, 8), (3, 15), (5, 16))],
    *[(6, 1, 3), (5, 4, 2), (7, 2, 5), (3, 16, 1), (2, 1, 16), (3, 17, 4)],
]


@pytest.mark.parametrize(("groups", "inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [((3, 3), (1, 1), (1, 1)), ((3, 2), (2, 1), (1, 2))])
def test_integers_come_out_exact(groups, inputs, outputs, dtype, memory_format, kernel, stride, dilation, poisoned):
    generator = torch.Generator().manual_seed(groups * 100 + inputs * 10 + outputs)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-2, 3, shape, generator=generator).to(dtype).to(memory_format=memory_format)

    x, weight = integers(2, groups * inputs, 9, 14), integers(groups * outputs, inputs, *kernel)
    geometry = (stride, (1, 2, 1, 2), dilation, groups)
    expected = torch.nn.functional.conv2d(x.double(), weight.double(), None, stride, (1, 2), dilation, groups)
    grad = integers(*expected.shape)
    reset_stats()
    found = torch.ops.fastconv.conv2d(x, weight, None, *geometry, "tiled")
    assert torch.equal(found.double(), expected)
    found_grad = torch.ops.fastconv.conv2d_input_grad(grad, weight, x.shape[2:], *geometry, "tiled")
    expected_grad = torch.nn.grad.conv2d_input(
        x.shape, weight.double(), grad.double(), stride, (1, 2), dilation, groups
    )
    assert torch.equal(found_grad.double(), expected_grad)
    assert stats() == {"conv2d/tiled": 1, "conv2d_input_grad/tiled": 1}


@torch.no_grad()
def test_an_infinite_input_stays_in_its_group_and_its_windows():
    x = torch.randn(1, 32, 6, 6).to(memory_format=torch.channels_last)
    weight = torch.randn(32, 4, 3, 3)
    x[0, 9, 2, 2] = float("inf")
    found = torch.ops.fastconv.conv2d(x, weight, None, (1, 1), (1, 1, 1, 1), (1, 1), 8, "tiled")
    touched = torch.zeros(1, 32, 6, 6, dtype=torch.bool)
    touched[:, 8:12, 1:4, 1:4] = True
    assert torch.equal(~found.isfinite(), touched)


@pytest.mark.skipif(_C.active_isa() != "avx512_bf16", reason="pairs of bfloat16 are of that level")
@pytest.mark.parametrize("pass_name", ["forward", "input_grad"])
def test_pairs_leave_groups_that_share_registers_to_tiled(pass_name):
    def kernel(width: int, last: bool) -> str:
        plan = _C.plan_conv2d(
            (1, 4 * width, 14, 14), (4 * width, width, 3, 3), stride=(1, 1), padding=(1,) * 4, dilation=(1, 1),
            groups=4, channels_last=last, dtype="bfloat16", pass_name=pass_name,
        )  # fmt: skip
        return str(plan["algo"])

    assert [kernel(width, True) for width in (2, 8, 9, 16)] == ["tiled", "tiled", "pairs", "pairs"]
    assert kernel(8, False) == "pairs"
