"""When Winograd is chosen on the CPU, on what condition on the values, and what its results then are worth."""

from __future__ import annotations

import itertools

import pytest
import torch
from reference import guarded
from torch import Tensor
from torch.nn import functional as F

from fastconv import _C, functional
from fastconv.fused import fused_conv2d
from fastconv.ops import conv2d as ops
from fastconv.stats import reset_stats, stats

BOUND = 2e-5
FORMATS = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
BOTH = {"conv2d/winograd", "conv2d/tiled"}


def without_winograd(dtype: torch.dtype) -> str:
    """What serves the images that Winograd does not."""
    return "pairs" if dtype == torch.bfloat16 and _C.active_isa() == "avx512_bf16" else "tiled"


def filters(channels: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(channels, channels, 3, 3, generator=torch.Generator().manual_seed(seed))


def images(n: int = 1, channels: int = 64, size: int = 28, seed: int = 1) -> Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def kernels() -> set[str]:
    found = {name for name in stats() if name.startswith("conv2d")}
    reset_stats()
    return found


def error(x: Tensor, weight: Tensor, result: Tensor) -> float:
    """The largest error, in units of |g_k| max(R, r): filter's norm, RMS of the image, RMS of what the output reads.

    |g_k| R is the RMS that the outputs of a filter have where inputs are independent of each other.
    """
    x, weight = x.double(), weight.double()
    exact = F.conv2d(x, weight, padding=1)
    energy = x.square().mean(1, keepdim=True)
    seen = F.conv2d(energy, torch.full((1, 1, 3, 3), 1 / 9, dtype=torch.float64), padding=1)
    scale = torch.maximum(energy.mean((2, 3), keepdim=True), seen).sqrt()
    norm = weight.square().sum((1, 2, 3)).sqrt().reshape(1, -1, 1, 1)
    return ((result.double() - exact).abs() / (norm * scale)).max().item()


def plan(shape: tuple[int, ...], weight: tuple[int, ...], **changes: object) -> dict[str, object]:
    arguments = {
        "stride": (1, 1), "padding": (1,) * 4, "dilation": (1, 1), "groups": 1, "channels_last": False,
        "dtype": "float32", "pass_name": "forward", **changes,
    }  # fmt: skip
    found: dict[str, object] = _C.plan_conv2d(shape, weight, **arguments)
    return found


def test_it_is_chosen_where_it_wins_and_only_there():
    def kernel(*shapes: tuple[int, ...], **changes: object) -> str:
        return str(plan(*shapes, **changes)["kernel"])

    wide = ((1, 64, 56, 56), (64, 64, 3, 3))
    assert kernel(*wide) == "conv2d/winograd"
    assert kernel(*wide, pass_name="input_grad") == "conv2d_input_grad/winograd"
    assert kernel(*wide, pass_name="weight_grad") == "conv2d_weight_grad/tiled"
    for changes in ({"stride": (2, 2)}, {"dilation": (2, 2)}, {"dtype": "float64"}, {"algo": "direct"}):
        assert "winograd" not in kernel(*wide, **changes)
    assert "winograd" not in kernel((1, 31, 56, 56), (64, 31, 3, 3))
    assert "winograd" not in kernel((1, 64, 9, 9), (64, 64, 3, 3))
    assert "winograd" not in kernel((1, 512, 28, 28), (1024, 512, 3, 3)), "its memory"
    for channels_last in (False, True):
        thin = ((1, 32, 28, 28), (32, 32, 3, 3))
        assert kernel(*thin, channels_last=channels_last) == "conv2d/winograd"
        assert kernel((1, 64, 14, 14), (64, 64, 3, 3), channels_last=channels_last) == "conv2d/winograd"
    assert "winograd" not in kernel((64, 64, 3, 3), (64, 64, 3, 3))
    assert kernel((4, 64, 9, 9), (64, 64, 3, 3)) == "conv2d/winograd"
    assert kernel((8, 64, 14, 14), (64, 64, 3, 3)) == "conv2d/winograd"


def test_the_plan_tells_the_condition_where_there_is_one():
    wide = ((1, 64, 56, 56), (64, 64, 3, 3))
    assert "large values beside small" in str(plan(*wide)["condition"])
    assert plan(*wide, algo="winograd")["condition"] is None, "named means unconditional"
    assert plan(*wide, algo="direct")["condition"] is None
    assert plan((1, 64, 8, 8), (64, 64, 3, 3))["condition"] is None


def test_the_form_of_winograd_is_told():
    def tile(*shapes: tuple[int, ...], **changes: object) -> object:
        return plan(*shapes, **changes)["winograd_tile"]

    assert tile((1, 64, 56, 56), (64, 64, 3, 3)) == 4
    assert tile((1, 64, 12, 12), (64, 64, 3, 3)) == 2
    assert tile((1, 512, 28, 28), (512, 512, 3, 3)) == 2, "36 MiB of filters otherwise"
    assert tile((1, 64, 7, 7), (64, 64, 3, 3), packed=True) == 4
    assert tile((1, 64, 6, 6), (64, 64, 3, 3), packed=True) == 2
    assert tile((1, 512, 7, 7), (512, 512, 3, 3), packed=True) == 2
    assert tile((4, 512, 7, 7), (512, 512, 3, 3), packed=True) == 4
    assert tile((1, 64, 56, 56), (64, 64, 3, 3), algo="direct") is None
    assert plan((1, 64, 12, 12), (64, 64, 3, 3))["condition"] == (
        'finite images (csrc/conv2d/README.md); others as algo="direct"'
    )


@FORMATS
@pytest.mark.parametrize("channels", [32, 256])
def test_small_tiles_need_no_condition_but_finite_numbers(channels, memory_format):
    """An output of F(2x2) comes from products of what it reads: however large a value is, the others do not see it."""
    weight, worst = filters(channels), 0.0
    for amplitude, size, random in itertools.product((1, 10, 1e3, 1e6, 1e12), (1, 2, 5), (False, True)):
        block = torch.randn(channels, size, size) if random else torch.ones(channels, size, size)
        for row, column in ((0, 0), (4, 5), (5, 5), (7, 6)):
            x = images(channels=channels, size=12)
            x[0, :, row : row + size, column : column + size] = amplitude * block
            x = x.to(memory_format=memory_format)
            result = functional.conv2d(x, weight, padding=1)
            assert kernels() == {"conv2d/winograd"}
            worst = max(worst, error(x, weight, result))
            unseen = torch.ones(12, 12, dtype=torch.bool)
            unseen[max(row - 1, 0) : row + size + 1, max(column - 1, 0) : column + size + 1] = False
            exact = F.conv2d(x.double(), weight.double(), padding=1)
            assert (result - exact)[..., unseen].abs().max() < BOUND * 3 * channels**0.5
    assert worst < BOUND / 4
    for value in (float("inf"), float("nan")):
        x[0, 0, 3, 3] = value
        found = functional.conv2d(x, weight, padding=1)
        assert kernels() == {"conv2d/tiled"}
        assert torch.equal(found.isnan(), F.conv2d(x, weight, padding=1).isnan())


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_algorithms_change_nothing(deterministic):
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(deterministic)
        result = functional.conv2d(images(), filters(), padding=1)
    finally:
        torch.use_deterministic_algorithms(before)
    assert kernels() == {"conv2d/winograd"}
    assert torch.equal(result, functional.conv2d(images(), filters(), padding=1))


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_large_input_spoils_no_output_that_does_not_see_it(memory_format, dtype):
    x, weight = images(size=30).to(dtype), (filters() / 24).to(dtype)
    x[0, :, 16, 16] = 6e4
    x = x.to(memory_format=memory_format)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    unseen = torch.ones(30, 30, dtype=torch.bool)
    unseen[15:18, 15:18] = False
    chosen = functional.conv2d(x, weight, padding=1)
    assert kernels() == {f"conv2d/{without_winograd(dtype)}"}
    named = functional.conv2d(x, weight, padding=1, algo="winograd")
    assert kernels() == {"conv2d/winograd"}
    rounding = 1e-5 + 4 * torch.finfo(dtype).eps * (dtype != torch.float32)
    assert (chosen.double() - exact)[..., unseen].abs().max() < rounding
    if dtype == torch.float32:
        assert (named - exact)[..., unseen].abs().max() > 1e-3, "the reason for the condition is gone"


@FORMATS
@pytest.mark.parametrize("channels", [32, 64, 256])
def test_the_error_at_the_edge_of_the_condition(channels, memory_format):
    """Blocks of large values in a quiet image, as large as the condition lets them be, at the places that hurt most."""
    weight = filters(channels)
    worst = 0.0
    for size, (row, column), random in itertools.product((1, 2, 4, 7), ((11, 11), (13, 13), (14, 13)), (False, True)):
        block = torch.randn(channels, size, size) if random else torch.ones(channels, size, size)

        def image(amplitude: float, size=size, row=row, column=column, block=block) -> Tensor:
            x = images(channels=channels, size=40)
            x[0, :, row : row + size, column : column + size] = amplitude * block
            return x.to(memory_format=memory_format)

        low, high = 1.0, 1e4
        for _ in range(12):
            middle = (low * high) ** 0.5
            functional.conv2d(image(middle), weight[:48], padding=1)
            low, high = (middle, high) if kernels() == {"conv2d/winograd"} else (low, middle)
        assert 1.5 < low < 1e3, (size, row, column, low)
        result = functional.conv2d(image(low), weight, padding=1)
        assert kernels() == {"conv2d/winograd"}
        worst = max(worst, error(image(low), weight, result))
    assert worst < BOUND


@FORMATS
@pytest.mark.parametrize("channels", [32, 256])
def test_the_error_of_other_distributions(channels, memory_format):
    x, weight = images(channels=channels), filters(channels)
    one_loud = x.clone()
    one_loud[:, 5] *= 1e3
    half = x.clone()
    half[..., :14] = 0
    spotted = torch.where(torch.rand(x.shape) < 0.05, x, 0)
    slope = x * torch.logspace(0, 3, 28)
    cases = {"relu": x.relu(), "mean": x + 3, "loud": one_loud, "half": half, "spotted": spotted, "slope": slope}
    ran = set()
    for name, case in cases.items():
        for scale in (1e-12, 1.0, 1e12):
            scaled = (case * scale).to(memory_format=memory_format)
            assert error(scaled, weight, functional.conv2d(scaled, weight, padding=1)) < BOUND, (name, scale)
            ran |= {name} if kernels() == {"conv2d/winograd"} else set()
    assert ran >= {"relu", "mean", "loud", "half", "spotted"}, "the condition keeps out what is harmless"


@FORMATS
def test_a_filter_that_hears_only_the_quiet_channels(memory_format):
    """What a filter does not read, or hardly, does not disturb its outputs, however loud."""
    x, weight = images(), filters()
    x[:, 7] *= 1e4
    weight[:, 7] = 0
    weight[1::2, 7] = 1e-6
    x = x.to(memory_format=memory_format)
    result = functional.conv2d(x, weight, padding=1)
    assert kernels() == {"conv2d/winograd"}
    quiet = images()
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    scale = F.conv2d(quiet.double(), weight.double(), padding=1).square().mean((2, 3), keepdim=True).sqrt()
    assert ((result - exact).abs() / scale).max() < BOUND


@FORMATS
def test_filters_of_any_scale_beside_each_other(memory_format):
    x, weight = images().to(memory_format=memory_format), filters()
    weight *= torch.logspace(-12, 12, 64).reshape(-1, 1, 1, 1)
    assert error(x, weight, functional.conv2d(x, weight, padding=1)) < BOUND
    assert kernels() == {"conv2d/winograd"}


@FORMATS
def test_large_values_in_a_channel_that_a_filter_reads_alone(memory_format):
    """The condition is on the sum over channels: a filter of one channel meets more of its unevenness (README)."""
    x, weight = images(size=56), torch.zeros(64, 64, 3, 3)
    weight[:, 7] = torch.randn(64, 3, 3)
    low, high = 1.0, 1e4
    for _ in range(12):
        middle = (low * high) ** 0.5
        x[0, 7, 25:28, 25:28] = middle
        functional.conv2d(x.to(memory_format=memory_format), weight, padding=1)
        low, high = (middle, high) if kernels() == {"conv2d/winograd"} else (low, middle)
    x[0, 7, 25:28, 25:28] = low
    x = x.to(memory_format=memory_format)
    assert error(x, weight, functional.conv2d(x, weight, padding=1)) < 64**0.5 * BOUND
    assert kernels() == {"conv2d/winograd"}


@FORMATS
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_spreads_as_in_direct_sums(value, memory_format):
    x, weight = images(n=2).to(memory_format=memory_format), filters()
    x[1, 3, 9, 9] = value
    result = functional.conv2d(x, weight, padding=1)
    assert kernels() == BOTH
    assert torch.equal(result[1:], functional.conv2d(x[1:], weight, padding=1, algo="direct")) or value != value
    spread = ~result.isfinite()
    assert not spread[0].any()
    assert spread[1, :, 8:11, 8:11].all()
    spread[1, :, 8:11, 8:11] = False
    assert not spread.any()
    weight[5, 3, 1, 1] = value
    reset_stats()
    result = functional.conv2d(images(), weight, padding=1)
    assert kernels() == {"conv2d/tiled"}
    assert result[:, torch.arange(64) != 5].isfinite().all()
    assert torch.equal(result.isnan(), functional.conv2d(images(), weight, padding=1, algo="direct").isnan())


@FORMATS
def test_numbers_near_the_ends_of_the_range(memory_format):
    weight = filters()
    for dtype, value in (
        (torch.bfloat16, torch.finfo(torch.bfloat16).max),
        (torch.bfloat16, torch.finfo(torch.bfloat16).min),
        (torch.float32, torch.finfo(torch.float32).max),
        (torch.float32, 1e19),
    ):
        x = images().to(dtype).to(memory_format=memory_format)
        x[0, 2, 3, 4] = value
        for case in (x, torch.full_like(x, value)):
            chosen = functional.conv2d(case, weight.to(dtype) * 2**-12, padding=1)
            assert kernels() == {f"conv2d/{without_winograd(dtype)}"}, (dtype, value)
            direct = functional.conv2d(case, weight.to(dtype) * 2**-12, padding=1, algo="direct")
            assert torch.equal(chosen.nan_to_num(), direct.nan_to_num())
            reset_stats()
    # Outputs within range whose intermediate numbers are not.
    x = images().to(memory_format=memory_format)
    result = functional.conv2d(x * 1e14, weight * 1e22, padding=1)
    assert kernels() == {"conv2d/tiled"}
    assert result.isfinite().all()
    for tiny in (0.0, 1e-40, 1e-30):
        chosen = functional.conv2d(x * tiny, weight, padding=1)
        assert kernels() == {"conv2d/tiled"}
        assert torch.equal(chosen, functional.conv2d(x * tiny, weight, padding=1, algo="direct"))
        reset_stats()


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_image_does_not_depend_on_the_others(memory_format, dtype, poisoned):
    """Nor on the number of threads; residual and epilogue go with their image."""
    x, weight = images(n=6, channels=48, size=42).to(dtype), filters(48).to(dtype)
    for image, pixel in ((1, 3), (2, 29), (4, 17)):
        x[image, :, pixel, 16] = 3e4
    x[3, 0, 0, 0] = float("nan")
    x = guarded(x.to(memory_format=memory_format))
    shift = torch.randn(48)
    residual = guarded(images(n=6, channels=48, size=42, seed=7).to(dtype).to(memory_format=memory_format))

    def run(select: slice) -> Tensor:
        return fused_conv2d(x[select], weight, None, shift, residual[select], padding=(1, 1, 1, 1), activation="relu")

    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(run(slice(0, 6)))
            assert stats() == {"conv2d/winograd": 1, f"conv2d/{without_winograd(dtype)}": 1}
            reset_stats()
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0].nan_to_num(), found[1].nan_to_num())
    assert torch.equal(found[0].nan_to_num(), found[2].nan_to_num())
    alone = []
    for image in range(6):
        alone.append(run(slice(image, image + 1)))
        assert kernels() == {f"conv2d/{without_winograd(dtype)}" if image in (1, 2, 3, 4) else "conv2d/winograd"}
    assert torch.equal(found[0].nan_to_num(), torch.cat(alone).nan_to_num())
    assert bool(found[0][3].isnan().any())
    assert not found[0][[0, 1, 2, 4, 5]].isnan().any()


@FORMATS
def test_the_gradient_of_the_input_has_the_same_condition(memory_format):
    grad, weight = images(n=3).to(memory_format=memory_format), filters()
    grad[1, :, 9, 9] = 1e6
    arguments = ((28, 28), (1, 1), (1,) * 4, (1, 1), 1)
    result = ops.conv2d_input_grad(grad, weight, *arguments)
    assert stats() == {"conv2d_input_grad/winograd": 1, "conv2d_input_grad/tiled": 1}
    for image in range(3):
        algo = "direct" if image == 1 else "winograd"
        assert torch.equal(result[image], ops.conv2d_input_grad(grad[image : image + 1], weight, *arguments, algo)[0])


def test_fused_layers_use_it():
    fused_conv2d(images(), filters(), padding=(1, 1, 1, 1), activation="relu")
    assert stats() == {"conv2d/winograd": 1}


@FORMATS
@pytest.mark.parametrize("every", [None, 12], ids=["one", "many"])
def test_large_values_leave_no_trace_in_outputs_that_do_not_read_them(memory_format, every):
    """At every place in a tile, on planes of several sizes, of every size; measured on the untouched outputs alone."""
    weight = filters() * 0.04
    norm = weight.double().square().sum((1, 2, 3)).sqrt().reshape(1, -1, 1, 1)
    worst = 0.0
    for size, place, value in itertools.product((16, 20, 28), range(16), (4.0, 30.0, 1e3, 1e6, 1e15)):
        x, large = images(2, size=size), torch.zeros(1, 1, size, size, dtype=torch.bool)
        where = slice(place // 4 + 4, None, every or size), slice(place % 4 + 4, None, every or size)
        large[(..., *where)] = True
        x = torch.where(large & (torch.arange(64) % 7 == 5).reshape(1, -1, 1, 1), value, x)
        touched = F.max_pool2d(large.float(), 3, 1, 1) > 0
        found = functional.conv2d(x.contiguous(memory_format=memory_format), weight, padding=1)
        exact = F.conv2d(x.double(), weight.double(), padding=1)
        worst = max(worst, ((found.double() - exact).abs() / norm).masked_fill(touched, 0).max().item())
    scale = 8.0  # the RMS of a pixel over 64 channels; every other value is of order 1
    assert worst < BOUND * scale, worst / scale
