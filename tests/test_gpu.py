"""The package on CUDA kernels, from the layer down: the operators, dispatch, autograd, stats, explain.

On a GPU (`make gpu-check`) tensors are on it. Elsewhere tests/test_emulated.py runs this file with FASTCONV_EMULATE:
tensors are on the CPU, and the same kernels run in the emulator. Without either everything here is skipped.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from cuda_device import DEVICE, ON_GPU, WHERE, cuda_kernels, on_a_gpu
from reference import GUARD, Conv, allowances, assert_within, guarded, results_by_torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastconv
from fastconv import functional
from fastconv._library import EMULATED
from fastconv.backends import choose
from fastconv.fused import fused_conv2d
from fastconv.models.lenet import LeNet5
from fastconv.ops import conv2d as ops
from fastconv.stats import stats

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

pytestmark = cuda_kernels


@pytest.fixture(autouse=True)
def _exact_torch() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def moved(value: Tensor | None, guard: int = GUARD) -> Tensor | None:
    """On the device, with the same strides, in the middle of a buffer of NaN."""
    if value is None:
        return None
    held = guarded(value.detach(), guard)
    buffer = torch.tensor([], dtype=held.dtype).set_(held.untyped_storage()).to(DEVICE)
    return buffer.as_strided(held.shape, held.stride(), held.storage_offset())


CONVOLUTIONS = {
    "stem-7x7": Conv(c_per_group=3, k_per_group=9, size=(17, 18), kernel=(7, 7), stride=(2, 2), padding=(3, 3, 3, 3)),
    "stem-11x11": Conv(c_per_group=3, k_per_group=5, size=(27, 26), kernel=(11, 11), stride=(4, 4), padding=(2,) * 4),
    "stem-3x3": Conv(c_per_group=3, k_per_group=8, size=(9, 12), padding=(1, 1, 1, 1)),
    "3x3": Conv(c_per_group=8, k_per_group=8, size=(6, 7), padding=(1, 1, 1, 1)),
    "3x3-stride-2": Conv(c_per_group=5, k_per_group=4, size=(7, 9), stride=(2, 2), padding=(1, 1, 1, 1)),
    "1x1": Conv(c_per_group=16, k_per_group=8, size=(4, 5), kernel=(1, 1), bias=False),
    "groups": Conv(groups=2, c_per_group=4, k_per_group=6, size=(6, 5), padding=(1, 1, 1, 1)),
    "depthwise-3x3": Conv(groups=8, c_per_group=1, k_per_group=1, size=(9, 16), padding=(1, 1, 1, 1)),
    "depthwise-5x5-stride-2": Conv(
        groups=8, c_per_group=1, k_per_group=1, size=(8, 11), kernel=(5, 5), stride=(2, 2), padding=(2, 2, 2, 2)
    ),
    "depthwise-multiplier": Conv(groups=4, c_per_group=1, k_per_group=2, padding=(1, 1, 1, 1)),
    "dilated": Conv(size=(11, 9), dilation=(2, 3), padding=(2, 1, 3, 4)),
    "no-images": Conv(n=0),
}
GENERAL = "direct|implicit_gemm_mma|implicit_gemm_fp32"
KERNELS = {
    "stem-7x7": "stem", "stem-11x11": "stem", "stem-3x3": "stem", "3x3": GENERAL, "depthwise-3x3": "depthwise",
    "depthwise-5x5-stride-2": "depthwise", "depthwise-multiplier": "direct", "dilated": f"stem|{GENERAL}",
}  # fmt: skip


def on_device(problem: Conv, guard: int = GUARD) -> dict[str, Tensor]:
    """Output and gradients, brought back to the CPU; the operands lie in buffers of NaN."""
    input, weight, bias, grad = (moved(t, guard) for t in problem.tensors())
    leaves = [t.requires_grad_() for t in (input, weight, bias) if t is not None]
    output = ops.conv2d(input, weight, bias, *problem.params, problem.algo)
    grads = torch.autograd.grad(output, leaves, grad)
    with torch.no_grad():
        assert torch.equal(ops.conv2d(input, weight, bias, *problem.params, problem.algo), output), "not deterministic"
    names = ["output", "input", "weight", "bias"]
    return {name: value.detach().cpu() for name, value in zip(names, (output, *grads), strict=False)}


@pytest.mark.sanitize
@pytest.mark.parametrize("layouts", [(False,) * 3, (True,) * 3], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name, dtype, layouts, poisoned):
    problem = Conv(**{**CONVOLUTIONS[name].__dict__, "dtype": dtype, "layouts": layouts, "integers": True})
    exact = results_by_torch(problem, torch.float64)
    for key, found in on_device(problem).items():
        assert torch.equal(found, exact[key].to(dtype)), key
    ran = [kernel for kernel in stats() if kernel.startswith(f"{WHERE}/conv2d/")]
    if name in KERNELS:
        assert any(word in ran[0] for word in KERNELS[name].split("|")), ran
    if name.startswith("stem"):
        assert f"{WHERE}/conv2d_input_grad/stem" in stats()
        assert f"{WHERE}/conv2d_weight_grad/stem" in stats()
    assert not [kernel for kernel in stats() if not kernel.startswith(f"{WHERE}/")]
    random = Conv(**{**problem.__dict__, "integers": False})
    exact, allowed = results_by_torch(random, torch.float64), allowances(random)
    for key, found in on_device(random).items():
        assert_within(found, exact[key], allowed[key], f"{key} of {random}")


@pytest.mark.parametrize("algo", ["direct", "stem", "stem_mma", "depthwise", "implicit_gemm_mma", "implicit_gemm_fp32"])
def test_algorithms_by_name(algo):
    dtype = torch.float32 if algo.endswith("fp32") else torch.float16
    x = torch.randn(2, 4 if algo != "depthwise" else 8, 9, 8).to(dtype).to(DEVICE)
    weight = torch.randn(8, 1 if algo == "depthwise" else 4, 3, 3).to(dtype).to(DEVICE)
    groups = 8 if algo == "depthwise" else 1
    y = functional.conv2d(x, weight, padding=1, groups=groups, algo=algo)
    assert stats() == {f"{WHERE}/conv2d/{algo}": 1}
    exact = F.conv2d(x.double().cpu(), weight.double().cpu(), padding=1, groups=groups)
    torch.testing.assert_close(y.double().cpu(), exact, rtol=1e-2, atol=1e-2)


def test_a_named_algorithm_has_gradients():
    """stem_mma has a forward pass of its own only; the gradients of a call that names it are stem's."""
    x = torch.randn(2, 3, 9, 8).half().to(DEVICE).requires_grad_()
    weight = torch.randn(8, 3, 3, 3).half().to(DEVICE).requires_grad_()
    functional.conv2d(x, weight, algo="stem_mma").sum().backward()
    ran = {f"{WHERE}/conv2d/stem_mma", f"{WHERE}/conv2d_input_grad/stem", f"{WHERE}/conv2d_weight_grad/stem"}
    assert set(stats()) == ran


def test_refusals_name_the_reason():
    x, weight = torch.randn(1, 8, 6, 6).to(DEVICE), torch.randn(8, 8, 3, 3).to(DEVICE)
    with pytest.raises(RuntimeError, match='algo="stem" refuses: it needs at most 4 input channels'):
        functional.conv2d(x, weight, algo="stem")
    with pytest.raises(
        RuntimeError,
        match='there is no algo "winograd"; choose one of stem_mma, stem, depthwise, implicit_gemm_mma, '
        "implicit_gemm_tf32, implicit_gemm_3xtf32, implicit_gemm_fp32, direct",
    ):
        functional.conv2d(x, weight, algo="winograd")
    with pytest.raises(RuntimeError, match="float64"):
        ops.conv2d(x.double(), weight.double(), None, (1, 1), (0, 0, 0, 0), (1, 1), 1)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("kind", ["dense", "stem", "depthwise"])
@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "tanh"])
def test_fused(kind, activation, memory_format, ran, poisoned):
    channels, groups = {"dense": (6, 1), "stem": (3, 1), "depthwise": (8, 8)}[kind]
    x = torch.randn(2, channels, 7, 9).to(memory_format=memory_format)
    weight = torch.randn(8, channels // groups, 3, 3)
    scale, shift, residual = torch.rand(16)[::2] + 0.5, torch.randn(8), torch.randn(2, 8, 7, 9)
    operands = [t.to(DEVICE) for t in (x, weight, scale, shift, residual)]
    with ran(*([] if ON_GPU and kind == "dense" else ["conv2d"]), torch_calls=int(ON_GPU and kind == "dense")):
        y = fused_conv2d(*operands, padding=(1, 1, 1, 1), groups=groups, activation=activation)
    exact = F.conv2d(x.double(), weight.double(), padding=1, groups=groups)
    exact = exact * scale.double().reshape(1, -1, 1, 1) + shift.double().reshape(1, -1, 1, 1) + residual.double()
    function = {"none": lambda t: t, "relu": torch.relu, "relu6": F.relu6, "tanh": torch.tanh}[activation]
    torch.testing.assert_close(y.double().cpu(), function(exact), rtol=1e-5, atol=2e-5)
    assert y.is_contiguous(memory_format=memory_format)


POOLS = {
    "max-2": (F.max_pool2d, (2,)), "max-3-2": (F.max_pool2d, (3, 2, 1)), "max-dilated": (F.max_pool2d, (2, 1, 0, 2)),
    "max-ceil": (F.max_pool2d, (3, 2, 1, 1, True)), "max-large": (F.max_pool2d, ((16, 17), 1)),
    "avg-2": (F.avg_pool2d, (2,)), "avg-3-2": (F.avg_pool2d, (3, 2, 1, True, False)),
    "avg-divisor": (F.avg_pool2d, (3, 2, 1, False, True, 5)), "adaptive": (F.adaptive_avg_pool2d, ((5, 3),)),
    "global": (F.adaptive_avg_pool2d, (1,)), "norm": (F.local_response_norm, (5, 1e-2, 0.75, 2.0)),
    "norm-even": (F.local_response_norm, (4, 1e-2, 0.5, 1.0)),
}  # fmt: skip


@pytest.mark.sanitize
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", POOLS)
def test_pools(name, dtype, memory_format, ran, poisoned):
    function, arguments = POOLS[name]
    ours = getattr(functional, function.__name__)
    values = torch.randn(2, 8, 17, 18, dtype=torch.float64).to(dtype).to(memory_format=memory_format)
    x = moved(values).requires_grad_()
    reference = values.double().requires_grad_()
    exact = function(reference, *arguments)
    gradient = torch.randint(-4, 5, exact.shape).to(dtype)
    with ran(function.__name__.replace("boolean_dispatch", "max_pool2d") + "_with_offsets" * ("max" in name)):
        y = ours(x, *arguments)
        [grad] = torch.autograd.grad(y, x, gradient.to(DEVICE))
    [exact_grad] = torch.autograd.grad(exact, reference, gradient.double())
    tolerance = 8 * torch.finfo(dtype).eps
    assert y.is_contiguous(memory_format=memory_format) or y.numel() == y.shape[0] * y.shape[1]
    torch.testing.assert_close(y.double().cpu(), exact.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad.double().cpu(), exact_grad, rtol=tolerance, atol=4 * tolerance)


def test_max_pool_indices_and_nan(ran):
    values = torch.randint(-3, 4, (2, 3, 7, 8)).float()
    values[0, 1, 3, 3] = float("nan")
    with ran("max_pool2d_indices"):
        y, indices = functional.max_pool2d(values.to(DEVICE), 3, 2, 1, return_indices=True)
    exact, exact_indices = F.max_pool2d(values, 3, 2, 1, return_indices=True)
    torch.testing.assert_close(y.cpu(), exact, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(indices.cpu(), exact_indices)


def test_inference_pools_save_no_offsets():
    with torch.no_grad():
        functional.max_pool2d(torch.randn(1, 3, 8, 8).to(DEVICE), 2)
    assert stats() == {f"{WHERE}/max_pool2d/windows": 1}


def test_a_network_trains_as_torchs(ran):
    torch.manual_seed(0)
    ours = LeNet5().to(DEVICE)
    theirs = LeNet5(layers=nn).double()
    theirs.load_state_dict(ours.state_dict())
    x, labels = torch.randn(2, 1, 32, 32), torch.tensor([3, 1])
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.001) for network in (ours, theirs)]
    # The two later convolutions are cuDNN's on a GPU: forward, twice, of each.
    with ran("conv2d", "conv2d_weight_grad", "conv2d_bias_grad", torch_calls=4 if ON_GPU else 0):
        for _ in range(2):
            for network, optimizer, images in zip((ours, theirs), optimizers, (x.to(DEVICE), x.double()), strict=True):
                optimizer.zero_grad()
                F.cross_entropy(-network(images), labels.to(images.device)).backward()
                optimizer.step()
    for found, exact in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(found.detach().double().cpu(), exact.detach(), rtol=1e-4, atol=1e-5)


def test_second_order_and_transforms():
    weight = torch.randn(4, 3, 3, 3).to(DEVICE)

    def energy(x: Tensor) -> Tensor:
        return functional.conv2d(x, weight, padding=1).square().sum()

    x = torch.randn(2, 3, 5, 6).to(DEVICE)
    tangent = torch.randn_like(x)
    product = torch.func.jvp(torch.func.grad(energy), (x,), (tangent,))[1]
    exact = torch.func.jvp(
        torch.func.grad(lambda t: F.conv2d(t, weight.double(), padding=1).square().sum()),
        (x.double(),),
        (tangent.double(),),
    )[1]
    torch.testing.assert_close(product.double(), exact, rtol=1e-4, atol=1e-3)
    batched = torch.func.vmap(lambda t: functional.conv2d(t, weight))(x[:, None])
    torch.testing.assert_close(batched[:, 0], functional.conv2d(x, weight), rtol=1e-5, atol=1e-5)


def test_compile(ran):
    layer = nn.Sequential(fastconv.Conv2d(3, 8, 3, padding=1), nn.ReLU(), fastconv.MaxPool2d(2)).to(DEVICE)
    x = torch.randn(2, 3, 8, 8).to(DEVICE)
    expected = layer(x)
    with ran("conv2d", "max_pool2d_with_offsets"):
        found = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_autocast():
    layer = fastconv.Conv2d(3, 8, 3).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert layer(torch.randn(1, 3, 6, 6).to(DEVICE)).dtype == torch.bfloat16
    assert stats() == {f"{WHERE}/conv2d/stem_mma": 1}


def test_float64_goes_to_torch_and_is_counted():
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64).to(DEVICE)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64).to(DEVICE)
    y = functional.conv2d(x, weight)
    torch.testing.assert_close(y, F.conv2d(x, weight))
    assert stats() == {"torch/conv2d": 1}
    backend, refusal = choose("conv2d", x, weight)
    assert backend == "torch"
    assert "the CUDA kernels compute in float32" in str(refusal)
    assert choose("conv2d", x.float(), weight.float()) == ("cuda", None)


def test_pools_that_count_beyond_32_bits_go_to_torch():
    """Steps beyond the input do not count: they leave one window."""
    x = torch.ones(1, 1, 1, 1, device=DEVICE)
    assert functional.adaptive_avg_pool2d(x.expand(1, 1, 50_000, 1), (50_000, 1)).sum() == 50_000
    assert functional.max_pool2d(x, 1, 2**30) == 1
    assert stats() == {"torch/adaptive_avg_pool2d": 1, f"{WHERE}/max_pool2d/windows": 1}


@on_a_gpu
def test_convolutions_that_only_the_reference_serves_are_left_to_cudnn():
    x, weight = torch.randn(1, 8, 6, 6).to(DEVICE), torch.randn(8, 8, 3, 3).to(DEVICE)
    functional.conv2d(x, weight)
    assert stats() == {"torch/conv2d": 1}
    fastconv.reset_stats()
    functional.conv2d(x, weight, algo="direct")
    assert stats() == {"cuda/conv2d/direct": 1}


@pytest.mark.parametrize("backward", [False, True])
def test_explain_tells_what_runs(backward):
    model = nn.Sequential(
        fastconv.Conv2d(3, 8, 7, stride=2, padding=3), fastconv.MaxPool2d(3, 2, 1),
        fastconv.Conv2d(8, 8, 3, groups=8, padding=1), fastconv.Conv2d(8, 4, 1), fastconv.LocalResponseNorm(5),
        fastconv.GlobalAvgPool2d(),
    ).to(DEVICE)  # fmt: skip
    report = fastconv.explain(model, (2, 3, 32, 32), device=DEVICE, backward=backward, quiet=True)
    x = torch.randn(2, 3, 32, 32).to(DEVICE).requires_grad_(backward)
    with torch.set_grad_enabled(backward):
        y = model(x)
    if backward:
        y.sum().backward()
    assert report.kernels == {name: count for name, count in stats().items() if not name.startswith("torch/")}
    assert [call.by_torch is not None for call in report.calls].count(True) == stats().get("torch/conv2d", 0)
    assert ("emulated" if EMULATED else "cuda") in str(report).splitlines()[0]


# ---------------------------------------------------------------- a GPU's own


@on_a_gpu
def test_operands_on_two_devices():
    x, weight = torch.randn(1, 3, 8, 8, device="cuda"), torch.randn(4, 3, 3, 3)
    with pytest.raises(RuntimeError):
        functional.conv2d(x, weight)
    with pytest.raises(RuntimeError, match="weight is on the CPU, expected CUDA device 0"):
        torch.ops.fastconv.conv2d(x, weight, None, [1, 1], [0] * 4, [1, 1], 1, None)


@on_a_gpu
def test_the_current_stream_is_used():
    """The kernel must wait for what its stream does first, and nothing but the stream orders the two."""
    x, weight = torch.zeros(8, 3, 64, 64, device="cuda"), torch.ones(4, 3, 3, 3, device="cuda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(1)
        y = functional.conv2d(x, weight)
    stream.synchronize()
    assert torch.equal(y, torch.full_like(y, 27))


@on_a_gpu
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_cuda_graphs_capture_forward_and_backward(memory_format):
    model = nn.Sequential(
        fastconv.Conv2d(3, 8, 3, padding=1), fastconv.MaxPool2d(2), fastconv.Conv2d(8, 8, 3, groups=8, padding=1),
        fastconv.AvgPool2d(2), fastconv.LocalResponseNorm(5), fastconv.GlobalAvgPool2d(),
    ).cuda().half()  # fmt: skip
    x = torch.randn(4, 3, 32, 32, device="cuda").half().to(memory_format=memory_format).requires_grad_()

    def step() -> list[Tensor]:
        y = model(x)
        return [y, *torch.autograd.grad(y.float().square().sum(), [x, *model.parameters()])]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    for found, expected in zip(captured, step(), strict=True):
        assert torch.equal(found, expected)


@on_a_gpu
@pytest.mark.skipif(not ON_GPU or torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_decide_the_device():
    x, weight = torch.randn(1, 3, 8, 8, device="cuda:1"), torch.randn(4, 3, 3, 3, device="cuda:1")
    with torch.cuda.device(0):
        y = functional.conv2d(x, weight)
    assert y.device == x.device
    torch.testing.assert_close(y.cpu(), F.conv2d(x.cpu(), weight.cpu()), rtol=1e-5, atol=1e-5)


@on_a_gpu
@pytest.mark.slow
def test_tensors_of_more_than_2_31_elements():
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    x = torch.randint(-2, 3, (1, 8, 16400, 16400), device="cuda", dtype=torch.int8).half()
    assert x.numel() > 2**31
    weight = torch.randint(-2, 3, (8, 1, 3, 3), device="cuda").half()
    y = functional.conv2d(x, weight, padding=1, groups=8)
    corner = F.conv2d(x[:, -1:, -40:, -40:].float(), weight[-1:].float(), padding=1)
    assert torch.equal(y[:, -1:, -39:, -39:].float(), corner[:, :, 1:, 1:])
    pooled = functional.max_pool2d(x, 2)
    assert torch.equal(pooled[:, -1, -20:, -20:], F.max_pool2d(x[:, -1, -40:, -40:], 2))


def test_channel_counts_around_a_vector():
    """Pointers and channels that 16-byte accesses cannot take: every count up to two vectors, from odd addresses."""
    for channels, last in itertools.product(range(1, 18, 3), (False, True)):
        problem = Conv(
            groups=channels, c_per_group=1, k_per_group=1, padding=(1, 1, 1, 1), layouts=(last,) * 3,
            dtype=torch.float16, integers=True,
        )  # fmt: skip
        exact = results_by_torch(problem, torch.float64)
        for key, found in on_device(problem).items():
            assert torch.equal(found, exact[key].half()), (channels, last, key)
