"""conv2d: numbers worked out by hand, every small case exactly, long sums, determinism."""

from __future__ import annotations

import itertools

import pytest
import reference
import torch
from reference import Conv

from fastconv import _C, functional
from fastconv._library import ops as raw
from fastconv.ops import conv2d as ops
from fastconv.stats import reset_stats, stats

pytestmark = pytest.mark.usefixtures("poisoned")
ALGOS = ["tiled", "naive", "rows"]  # rows is for NCHW
PAIRS = _C.active_isa() == "avx512_bf16"  # bfloat16 has a kernel of its own


@pytest.mark.sanitize
@pytest.mark.parametrize("algo", [None, *ALGOS])
def test_by_hand(dtype, memory_format, algo):
    # The lecture's kind of example: a 3x3 image, a 2x2 filter, cross-correlation (no flip), a bias of 10.
    image = torch.tensor([[[[1, 2, 3], [4, 5, 6], [7, 8, 9]]]], dtype=dtype).to(memory_format=memory_format)
    weight = torch.tensor([[[[1, 2], [3, 4]]]], dtype=dtype)
    bias = torch.tensor([10], dtype=dtype)
    if algo == "rows" and memory_format == torch.channels_last:
        pytest.skip("rows reads NCHW")
    output = functional.conv2d(image, weight, bias, algo=algo)
    assert output.tolist() == [[[[47, 57], [77, 87]]]]
    # With padding 1 and stride 3 the four windows see the corners only.
    assert functional.conv2d(image, weight, padding=1, stride=3, algo=algo).tolist() == [[[[4, 9], [14, 9]]]]
    chosen = "pairs" if PAIRS and dtype == torch.bfloat16 else "tiled"
    assert stats() == {f"conv2d/{algo or chosen}": 2}


@pytest.mark.sanitize
def test_gradients_by_hand(dtype, memory_format):
    image = torch.tensor([[[[1, 2, 3], [4, 5, 6], [7, 8, 9]]]], dtype=dtype).to(memory_format=memory_format)
    weight = torch.tensor([[[[1, 2], [3, 4]]]], dtype=dtype)
    grad = torch.tensor([[[[1, 0], [0, 2]]]], dtype=dtype)
    arguments = ((1, 1), (0, 0, 0, 0), (1, 1), 1)
    # Each output element spreads the filter over what it saw; each weight collects what it was multiplied with.
    assert ops.conv2d_input_grad(grad, weight, (3, 3), *arguments).tolist() == [[[[1, 2, 0], [3, 6, 4], [0, 6, 8]]]]
    assert ops.conv2d_weight_grad(grad, image, (2, 2), *arguments).tolist() == [[[[11, 14], [20, 23]]]]
    assert ops.conv2d_bias_grad(grad).tolist() == [3]


SMALL = [
    Conv(groups=groups, c_per_group=c, k_per_group=k, size=(h, h + 1), kernel=(r, s), stride=stride, padding=padding,
         dilation=dilation, integers=True, dtype=torch.float32, layouts=(last, last, last), algo=algo)
    for (groups, c, k), h, (r, s), stride, padding, dilation, last, algo in itertools.product(
        [(1, 1, 1), (1, 3, 5), (3, 2, 2), (4, 1, 1), (3, 1, 2)],
        [5, 8],
        [(1, 1), (3, 3), (2, 5)],
        [(1, 1), (2, 3)],
        [(0, 0, 0, 0), (1, 2, 0, 3)],
        [(1, 1), (2, 1)],
        [False, True],
        ALGOS,
    )
    if h + padding[0] + padding[2] > dilation[0] * (r - 1) and h + 1 + padding[1] + padding[3] > dilation[1] * (s - 1)
    and not (last and algo == "rows")
]  # fmt: skip


@pytest.mark.sanitize
def test_every_small_case_is_exact():
    assert len(SMALL) > 800
    for problem in SMALL:
        reference.check(problem)


# Windows as large as the image run as 1x1; weights of input gradients are packed in squares of eight, or tap by tap.
EXACT = [
    Conv(n=3, groups=groups, c_per_group=c, k_per_group=k, size=size, kernel=kernel, stride=stride,
         padding=(padding,) * 4, integers=True, dtype=dtype, layouts=(last, last, last))
    for (groups, c, k), (size, kernel, padding), stride, dtype, last in itertools.product(
        [(1, 29, 37), (2, 14, 9), (1, 3, 20)],
        [((5, 6), (5, 6), 0), ((7, 7), (1, 1), 0), ((7, 6), (3, 3), 1), ((13, 13), (5, 5), 2), ((9, 9), (3, 5), 1),
         ((32, 32), (3, 3), 1)],
        [(1, 1), (2, 2)],
        [torch.float32, torch.float64],
        [False, True],
    )
]  # fmt: skip


def test_packed_cases_are_exact():
    for problem in EXACT:
        reference.check(problem)


@pytest.mark.parametrize("algo", [None, *ALGOS])
@pytest.mark.parametrize("stride", [1, 3])
def test_taps_far_outside_the_image_cost_nothing(algo, stride):
    """Copies with padding must not grow with the dilation: at 50,000 their square would not fit any memory."""
    far = 50_000
    x = torch.randint(-3, 4, (1, 3, 20, 33)).float().requires_grad_()
    w = torch.randint(-3, 4, (4, 3, 3, 3)).float().requires_grad_()
    actual = functional.conv2d(x, w, padding=far, dilation=far, stride=stride, algo=algo)
    wanted = torch.nn.functional.conv2d(x, w[:, :, 1:2, 1:2], stride=stride)  # the only tap that sees the image
    assert torch.equal(actual, wanted)
    grad = torch.randint(-3, 4, wanted.shape).float()
    for ours, theirs in zip(*(torch.autograd.grad(y, (x, w), grad) for y in (actual, wanted)), strict=True):
        assert torch.equal(ours, theirs)


LONG = {
    # reduced lengths as in the lecture's networks: 512 x 3 x 3, 2048 pixels, 25088 is a fully connected layer as 7 x 7
    "vgg": Conv(n=1, c_per_group=512, k_per_group=70, size=(14, 14), kernel=(3, 3), padding=(1, 1, 1, 1)),
    "alexnet-first": Conv(n=2, c_per_group=3, k_per_group=64, size=(67, 67), kernel=(11, 11), stride=(4, 4),
                          padding=(2, 2, 2, 2)),
    "resnet-1x1": Conv(n=2, c_per_group=1024, k_per_group=33, size=(7, 7), kernel=(1, 1)),
    "resnet-1x1-stride": Conv(n=2, c_per_group=256, k_per_group=64, size=(28, 28), kernel=(1, 1), stride=(2, 2)),
    "fully-connected": Conv(n=4, c_per_group=512, k_per_group=17, size=(7, 7), kernel=(7, 7)),
    "resnext": Conv(n=1, groups=32, c_per_group=4, k_per_group=4, size=(28, 28), kernel=(3, 3), padding=(1, 1, 1, 1)),
    "mobilenet": Conv(n=2, groups=96, c_per_group=1, k_per_group=1, size=(56, 56), kernel=(3, 3), stride=(2, 2),
                      padding=(1, 1, 1, 1)),
    "many-pixels": Conv(n=2, c_per_group=5, k_per_group=7, size=(160, 160), kernel=(3, 3), padding=(1, 1, 1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", LONG)
def test_long_sums(name, dtype, memory_format):
    last = memory_format == torch.channels_last
    problem = reference.replace(LONG[name], dtype=dtype, layouts=(last, last, last))
    reference.check(problem)


@pytest.mark.parametrize("threads", [1, 3, 7])
@pytest.mark.parametrize("name", LONG)
def test_results_do_not_depend_on_threads_or_runs(name, threads, memory_format):
    last = memory_format == torch.channels_last
    problem = reference.replace(LONG[name], layouts=(last, last, last))
    first = reference.results_by_fastconv(problem)
    torch.set_num_threads(threads)
    again = reference.results_by_fastconv(problem)
    for result, values in first.items():
        assert torch.equal(values, again[result]), f"{result} changed with the number of threads"


@pytest.mark.parametrize("input_last", [False, True])
@pytest.mark.parametrize("weight_last", [False, True])
def test_memory_format_of_results_is_torchs(input_last, weight_last, dtype):
    problem = Conv(
        n=2, c_per_group=4, k_per_group=6, size=(5, 6), dtype=dtype, layouts=(input_last, weight_last, False)
    )
    ours, theirs = reference.results_by_fastconv(problem), reference.results_by_torch(problem, dtype)
    assert ours["output"].stride() == theirs["output"].stride()


def test_algo_is_obeyed_and_unknown_names_are_refused():
    x, w = torch.randn(1, 3, 5, 5), torch.randn(2, 3, 3, 3)
    for algo in ALGOS:
        reset_stats()
        functional.conv2d(x, w, algo=algo)
        assert stats() == {f"conv2d/{algo}": 1}
    with pytest.raises(RuntimeError, match=r"fastest.*choose one of .*tiled"):
        functional.conv2d(x, w, algo="fastest")


@pytest.mark.sanitize
@pytest.mark.parametrize("algo", ALGOS)
def test_non_finite_numbers_spread_as_in_torch(algo, memory_format):
    """Also past the edge: a padded zero times infinity is not computed."""
    if algo == "rows" and memory_format == torch.channels_last:
        pytest.skip("rows reads NCHW")
    x = torch.randn(1, 3, 6, 6).to(memory_format=memory_format)
    x[0, 1, 2, 3], x[0, 0, 0, 0], x[0, 2, 5, 5] = float("nan"), float("inf"), float("-inf")
    w = torch.randn(5, 3, 3, 3)
    ours, theirs = functional.conv2d(x, w, padding=1, algo=algo), torch.nn.functional.conv2d(x, w, padding=1)
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    w[0, 0, 1, 1] = float("inf")
    ours, theirs = functional.conv2d(x, w, padding=1, algo=algo), torch.nn.functional.conv2d(x, w, padding=1)
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
def test_opcheck(last):
    """Schema, fake tensors (shapes, strides, dynamic sizes) and the autograd registration of the raw ops."""
    problem = Conv(groups=2, c_per_group=3, k_per_group=2, stride=(2, 1), padding=(1, 0, 2, 1), dtype=torch.float64,
                   layouts=(last, last, last))  # fmt: skip
    x, w, b, g = problem.tensors()
    for leaf in (x, w, b):
        leaf.requires_grad_()
    torch.library.opcheck(raw.conv2d.default, (x, w, b, *problem.params, None))
    torch.library.opcheck(raw.conv2d_input_grad.default, (g, w, problem.size, *problem.params, None))
    torch.library.opcheck(raw.conv2d_weight_grad.default, (g, x, problem.kernel, *problem.params, None))
    torch.library.opcheck(raw.conv2d_bias_grad.default, (g,))


@pytest.mark.skipif(not PAIRS, reason="this CPU has no AVX512-BF16, or FASTCONV_CPU_ISA forbids it")
@pytest.mark.parametrize("channels", [1, 3, 16, 33])
def test_pairs_of_bfloat16_see_nothing_beside_their_window(channels, memory_format):
    """Odd depths are filled up with zeros, not with what lies there: an infinity would become NaN."""
    x = torch.full((1, channels, 12, 37), float("inf")).bfloat16().to(memory_format=memory_format)
    x[:, :, 3:8, 4:30] = 1
    weight = torch.ones(33, channels, 3, 3).bfloat16()
    arguments = ([1, 1], [0] * 4, [1, 1], 1, "pairs")
    inner = raw.conv2d(x, weight, None, *arguments)[:, :, 3:6, 4:28]
    assert torch.equal(inner, torch.full_like(inner, 9 * channels))
    grad = torch.full((1, 33, 12, 37), float("inf")).bfloat16().to(memory_format=memory_format)
    grad[:, :, 3:8, 4:30] = 1
    seen = raw.conv2d_input_grad(grad, weight, [14, 39], *arguments)[:, :, 5:8, 6:30]
    assert torch.equal(seen, torch.full_like(seen, 9 * 33))


@pytest.mark.skipif(not PAIRS, reason="this CPU has no AVX512-BF16, or FASTCONV_CPU_ISA forbids it")
@pytest.mark.parametrize(("kernel", "stride"), [((6, 7), 1), ((1, 40), 2), ((40, 1), 3), ((33, 2), 1), ((25, 25), 5)])
def test_pairs_of_bfloat16_of_windows_larger_than_a_vector(kernel, stride, memory_format):
    x = torch.randint(-2, 3, (1, 4, 60, 60)).bfloat16().to(memory_format=memory_format)
    weight = torch.randint(-1, 2, (5, 4, *kernel)).bfloat16()
    wanted = torch.nn.functional.conv2d(x.double(), weight.double(), stride=stride)
    geometry = [stride, stride], [0] * 4, [1, 1], 1, "pairs"
    assert torch.equal(raw.conv2d(x, weight, None, *geometry), wanted.bfloat16())
    grad = torch.randint(-1, 2, wanted.shape).bfloat16().to(memory_format=memory_format)
    exact = torch.nn.grad.conv2d_input(x.shape, weight.double(), grad.double(), stride)
    assert torch.equal(raw.conv2d_input_grad(grad, weight, [60, 60], *geometry), exact.bfloat16())


@pytest.mark.skipif(not PAIRS, reason="this CPU has no AVX512-BF16, or FASTCONV_CPU_ISA forbids it")
def test_a_weight_gradient_of_pairs_has_the_same_bits_on_any_number_of_threads(memory_format):
    """Shares of the pixels are cut and added by the problem alone."""
    x = torch.randn(5, 40, 31, 29).bfloat16().to(memory_format=memory_format)
    grad = torch.randn(5, 33, 31, 29).bfloat16().to(memory_format=memory_format)
    arguments = [3, 3], [1, 1], [1] * 4, [1, 1], 1, None
    threads, found = torch.get_num_threads(), []
    reset_stats()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(raw.conv2d_weight_grad(grad, x, *arguments))
    finally:
        torch.set_num_threads(threads)
    assert stats() == {"conv2d_weight_grad/pairs": 3}
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    exact = torch.nn.grad.conv2d_weight(x.double(), (33, 40, 3, 3), grad.double(), padding=1)
    torch.testing.assert_close(found[0].double(), exact, rtol=2**-8, atol=2e-3)
