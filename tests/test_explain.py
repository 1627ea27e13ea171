"""explain() says what then runs, and invents nothing."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastconv
from fastconv import _C, _arguments, _library, backends
from fastconv.explain import explain as explain_function

CSRC = Path(__file__).resolve().parents[1] / "csrc"

LAYERS = [
    (lambda: fastconv.Conv2d(3, 16, 7, stride=2, padding=3), (2, 3, 20, 20)),
    (lambda: fastconv.Conv2d(16, 32, 3, padding=1), (1, 16, 9, 9)),
    (lambda: fastconv.Conv2d(16, 32, 1), (2, 16, 9, 9)),
    (lambda: fastconv.Conv2d(16, 16, 3, groups=16), (2, 16, 9, 9)),
    (lambda: fastconv.Conv2d(16, 32, 3, groups=16, stride=2, dilation=2, padding=2), (2, 16, 9, 9)),
    (lambda: fastconv.Conv2d(16, 32, 3, groups=4, padding="same"), (2, 16, 9, 9)),
    (lambda: fastconv.Conv2d(8, 8, (1, 5), bias=False, padding_mode="circular", padding=(0, 2)), (2, 8, 9, 9)),
    (lambda: fastconv.Conv2d(8, 8, 3), (8, 9, 9)),
    (lambda: fastconv.Conv2d(8, 8, 3), (0, 8, 9, 9)),
    (lambda: fastconv.MaxPool2d(3, 2, 1), (2, 8, 9, 9)),
    (lambda: fastconv.MaxPool2d(2, return_indices=True), (2, 8, 9, 9)),
    (lambda: fastconv.AvgPool2d(2, ceil_mode=True), (2, 8, 9, 9)),
    (lambda: fastconv.AvgPool2d(9), (2, 8, 9, 9)),
    (lambda: fastconv.AvgPool2d(9, divisor_override=3), (2, 8, 9, 9)),
    (lambda: fastconv.AdaptiveAvgPool2d(3), (2, 8, 9, 9)),
    (lambda: fastconv.GlobalAvgPool2d(), (2, 8, 9, 9)),
    (lambda: fastconv.LocalResponseNorm(5), (2, 8, 9, 9)),
]


def run_for_real(layer, shape, dtype, memory_format, backward):
    x = torch.randn(shape).to(dtype)
    if x.dim() == 4:
        x = x.to(memory_format=memory_format)
    x.requires_grad_(backward)
    fastconv.reset_stats()
    with torch.set_grad_enabled(backward):
        y = layer(x)
        y = y[0] if isinstance(y, tuple) else y
        if backward:
            y.backward(torch.ones_like(y))
    return fastconv.stats()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_kernels_are_those_that_run(make, shape, dtype, memory_format, backward):
    torch.manual_seed(0)
    layer = make().to(dtype)
    plan = fastconv.explain(layer, shape, dtype=dtype, memory_format=memory_format, backward=backward, quiet=True)
    ran = run_for_real(layer, shape, dtype, memory_format, backward)
    assert plan.kernels == ran
    assert ran or 0 in shape


def test_every_algo_is_the_kernel_that_runs():
    offered = set()
    for algo in {name.split("/")[1] for name in _C.kernel_names() if name.startswith("conv2d/")}:
        if algo == "pairs" and _C.active_isa() != "avx512_bf16":
            continue
        groups = 8 if algo == "depthwise" else 1
        dtype = torch.bfloat16 if algo == "pairs" else torch.float32
        x, weight = torch.randn(1, 8, 6, 6).to(dtype), torch.randn(8, 8 // groups, 3, 3).to(dtype)

        def call(x, weight, algo=algo, groups=groups):
            return fastconv.functional.conv2d(x, weight, groups=groups, algo=algo)

        plan = fastconv.explain(call, x.shape, weight.shape, dtype=dtype, quiet=True)
        fastconv.reset_stats()
        call(x, weight)
        assert plan.kernels == fastconv.stats() == {f"conv2d/{algo}": 1}
        offered.add(algo)
    assert {"naive", "tiled", "rows", "winograd", "depthwise"} == offered - {"pairs"}


def test_refusals_are_reasons():
    plan = _C.plan_conv2d(
        (1, 8, 6, 6), (8, 8, 3, 3), stride=(1, 1), padding=(1, 1, 1, 1), dilation=(1, 1), groups=1,
        channels_last=False, dtype="float32", pass_name="forward",
    )  # fmt: skip
    algos = {name.split("/")[1] for name in _C.kernel_names() if name.startswith("conv2d/")}
    assert set(plan["able"]) | set(plan["refused"]) <= algos
    assert plan["algo"] in plan["able"]
    assert not set(plan["able"]) & set(plan["refused"])
    assert all(len(reason) > 10 for reason in plan["refused"].values())
    x, weight = torch.randn(1, 8, 6, 6), torch.randn(8, 8, 3, 3)
    for algo, reason in plan["refused"].items():
        with pytest.raises(RuntimeError, match=re.escape(reason)):
            fastconv.functional.conv2d(x, weight, padding=1, algo=algo)


def test_path_leads_from_layer_to_kernel_in_few_hops():
    (call,) = fastconv.explain(fastconv.Conv2d(4, 8, 3), (1, 4, 8, 8), quiet=True).calls
    assert call.path[0] == "fastconv.Conv2d"
    assert "fastconv.functional.conv2d" in call.path
    assert call.path[-2:] == ("torch.ops.fastconv.conv2d", call.kernel)
    assert len(call.path) <= 6


def test_costs_are_the_formulas():
    conv = fastconv.Conv2d(3, 16, (8, 5), padding="same")  # the lecture's layer: 16 filters of 8 x 5 x 5
    (call,) = fastconv.explain(fastconv.Conv2d(8, 16, 5, padding=2), (1, 8, 32, 32), quiet=True).calls
    assert call.flops == 2 * 16 * 32 * 32 * 8 * 25 == 6_553_600
    assert call.bytes == 4 * (8 * 32 * 32 + 16 * 8 * 25 + 16 + 16 * 32 * 32)
    assert call.intensity == pytest.approx(call.flops / call.bytes)
    assert fastconv.explain(conv, (1, 3, 9, 9), quiet=True).flops == 2 * 16 * 81 * 3 * 40


def test_a_model_gets_a_line_for_each_layer_under_its_name():
    model = nn.Sequential(
        fastconv.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(288, 5)
    )
    plan = fastconv.explain(model, (2, 3, 10, 10), backward=True, quiet=True)
    forward = [call.layer for call in plan.calls[:6]]
    assert forward == ["0", "1", "2", "3", "4", "5"]
    assert [call.kernel for call in plan.calls[:6]] == ["conv2d/tiled", None, None, None, None, None]
    gradients = {(call.layer, call.op) for call in plan.calls[6:]}
    assert ("0", "fastconv::conv2d_input_grad") in gradients
    assert ("0", "fastconv::conv2d_weight_grad") in gradients
    assert ("3", "aten::convolution_backward") in gradients
    assert ("5", "aten::mm") in gradients
    for name in ("0", "3", "5"):
        assert re.search(rf"^{name} ", str(plan), re.MULTILINE)


def test_a_shared_layer_is_reported_at_each_use():
    conv = fastconv.Conv2d(4, 4, 3, padding=1)
    plan = fastconv.explain(nn.Sequential(conv, nn.Tanh(), conv), (1, 4, 8, 8), quiet=True)
    assert plan.kernels == {"conv2d/tiled": 2}


def test_nothing_is_touched():
    model = nn.Sequential(fastconv.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    fastconv.reset_stats()
    fastconv.explain(model, (2, 3, 8, 8), backward=True, quiet=True)
    fastconv.explain(fastconv.functional.conv2d, (1, 1, 4, 4), (1, 1, 3, 3), dtype=torch.int64, quiet=True)
    assert fastconv.stats() == {}
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model(torch.randn(2, 3, 8, 8))
    assert fastconv.stats() == {"conv2d/tiled": 1}


def test_calls_that_go_to_torch_say_why():
    plan = fastconv.explain(fastconv.functional.conv2d, (1, 3, 8, 8), (4, 3, 3, 3), dtype=torch.int64, quiet=True)
    (call,) = plan.calls
    assert call.kernel is None
    assert call.input_shape == (1, 3, 8, 8)
    assert "torch.int64" in call.by_torch
    assert "by torch" in str(plan)


def test_it_prints_what_it_returns(capsys):
    plan = fastconv.explain(fastconv.Conv2d(4, 8, 3), (1, 4, 8, 8))
    assert capsys.readouterr().out.strip() == str(plan)
    assert _C.active_isa() in str(plan)
    assert "conv2d/tiled" in str(plan)
    assert "calls" in repr(plan)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((3, (1, 4, 8, 8)), "call is int"),
        ((fastconv.Conv2d(4, 4, 3),), "no input shape"),
    ],
)
def test_bad_arguments(arguments, error):
    with pytest.raises(TypeError, match=error):
        fastconv.explain(*arguments)


def test_bad_memory_format_and_bad_shape():
    with pytest.raises(TypeError, match="memory_format is 'nhwc'"):
        fastconv.explain(fastconv.Conv2d(4, 4, 3), (1, 4, 8, 8), memory_format="nhwc")
    with pytest.raises(RuntimeError, match="check groups and the input's channels"):
        fastconv.explain(fastconv.Conv2d(4, 4, 3), (1, 3, 8, 8))
    assert fastconv.explain is explain_function


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"dtype": "int8"}, "dtype is int8"),
        ({"pass_name": "sideways"}, "pass is sideways"),
        ({"stride": (1,)}, "stride has 1 numbers, expected 2"),
        ({"groups": 3}, "weight_shape"),
    ],
)
def test_plan_checks_its_arguments(changes, error):
    arguments = {
        "stride": (1, 1), "padding": (1, 1, 1, 1), "dilation": (1, 1), "groups": 1, "channels_last": False,
        "dtype": "float32", "pass_name": "forward",
    }  # fmt: skip
    with pytest.raises(ValueError, match=error):
        _C.plan_conv2d((1, 8, 6, 6), (8, 8, 3, 3), **{**arguments, **changes})


@pytest.mark.skipif(not CSRC.is_dir(), reason="the sources are not here")
def test_the_described_tile_is_the_kernels_tile():
    kernels = (CSRC / "conv2d/cpu_tile.h").read_text()
    described = (CSRC / "conv2d/tile_shape.h").read_text()
    for isa, branch in (
        ("avx512", r"SIMD_AVX512\)"), ("avx2", r"SIMD_AVX2\)"), ("neon", r"SIMD_NEON\)"), ("generic", "#else")
    ):  # fmt: skip
        part = re.search(branch + r"\s(.*?)#e", kernels, re.DOTALL).group(1)
        rows = re.search(r"kTileRows = (\d+);", part).group(1)
        vectors = re.search(r"kTileVectors = (\d+);", part).group(1)
        target = (CSRC / f"common/simd/target_{isa}.h").read_text()
        vector_bytes = re.search(r"FASTCONV_VECTOR_BYTES (\d+)", target).group(1)
        found = re.search(rf"Isa::{isa}:\s+return \{{(\d+), (\d+), (\d+)\}};", described).groups()
        assert found == (rows, vectors, vector_bytes), isa


@pytest.mark.filterwarnings("ignore:.*quantized:UserWarning")
def test_can_run_gives_functionals_own_reasons():
    x, weight = torch.zeros(1, 3, 8, 8), torch.zeros(4, 3, 3, 3)
    assert backends.can_run("conv2d", x, weight) is None
    assert backends.choose("conv2d", x, weight) == ("cpu", None)
    for bad, reason in (
        ((x.long(), weight.long()), "torch.int64"),
        ((x.double(), weight), "one dtype"),
        ((x.to_sparse(), weight), "to_dense"),
        ((x[:, :2], weight), "check groups"),
        ((torch._empty_affine_quantized((1, 3, 8, 8), scale=1, zero_point=0, dtype=torch.quint8), weight), "quint8"),
    ):
        backend, refusal = backends.choose("conv2d", *bad)
        assert backend == "torch"
        assert reason in refusal.reason
        assert str(refusal).startswith("conv2d: ")
    assert backends.can_run("conv2d", x, weight, algo="tiled") is None
    assert "there is no algo" in backends.can_run("conv2d", x, weight, algo="nonsense").reason
    assert "groups == in_channels" in backends.can_run("conv2d", x, weight, algo="depthwise").reason
    with pytest.raises(ValueError, match="function is 'conv3d'"):
        backends.can_run("conv3d", x, weight)


def test_cudnn_keeps_the_convolutions_that_only_general_kernels_serve():
    class OnCuda(torch.Tensor):
        is_cuda = True

    float32, float16 = torch.float32, torch.float16
    for channels, dtype, algo, left in (
        (8, float32, None, True), (8, float32, "direct", False), (3, float32, None, False), (8, float16, None, False),
    ):  # fmt: skip
        x, weight = torch.empty(1, channels, 6, 6, dtype=dtype), torch.empty(8, channels, 3, 3, dtype=dtype)
        params = ((1, 1), (1, 1), 1, algo)
        assert (_arguments.slow_on_cuda(x.as_subclass(OnCuda), weight, *params) is not None) == left
        assert _arguments.slow_on_cuda(x, weight, *params) is None


def test_what_only_general_kernels_serve_is_what_the_native_choice_says():
    general = ("direct", "implicit_gemm_fp32")
    served: Counter[str] = Counter()
    for depth, groups, filters, rows, columns, stride, dilation, layout, dtype in itertools.product(
        (1, 3, 4, 5), (1, 2, 16), (1, 2, 32), (1, 3, 7, 11, 12), (3, 5, 7), ((1, 1), (2, 2), (1, 2), (4, 4), (5, 1)),
        ((1, 1), (2, 1)), (False, True), (torch.float32, torch.float16),
    ):  # fmt: skip
        weight = (filters * groups, depth, rows, columns)
        plan = _C.plan_conv2d(
            (2, depth * groups, 40, 40), weight, stride=stride, padding=(1,) * 4, dilation=dilation, groups=groups,
            channels_last=layout, dtype=str(dtype).removeprefix("torch."), pass_name="forward", device="cuda",
        )  # fmt: skip
        only_general = _arguments.only_general_kernels_serve(weight, stride, dilation, groups, dtype)
        assert only_general == (plan["algo"] in general)
        served[plan["algo"]] += 1
    assert set(served) == {*general, "implicit_gemm_mma", "stem", "stem_mma", "depthwise"}
    assert sum(count for algo, count in served.items() if algo not in general) > 100


def test_the_question_who_serves_does_not_break_a_compiled_graph():
    @torch.compile(fullgraph=True, dynamic=True, backend="eager")
    def call(x, weight, stride):
        x = (
            x + 1
            if _arguments.only_general_kernels_serve(weight.shape, (stride, stride), (1, 1), 1, x.dtype)
            else x - 1
        )
        return x.sum(), x.shape[0] * x.shape[2]

    for channels, shift in ((8, 1), (3, -1), (9, 1)):
        total, _ = call(torch.zeros(channels, 2, 5), torch.empty(4, channels, 3, 3), 2)
        assert total == shift * channels * 10


def test_a_gpu_or_a_driver_that_is_too_old_is_said_to_be(monkeypatch):
    assert _library.driver_problem(0, 13000) is None  # no driver, no CUDA tensor
    assert _library.driver_problem(13000, 13020) is None
    assert "the driver serves CUDA 12.4" in _library.driver_problem(12040, 13000)
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for major, reason in ((9, None), (8, None), (7, "compute capability 7.5")):
        properties = SimpleNamespace(name="a GPU", major=major, minor=5)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, found=properties: found)
        problem = _library.device_problem(device)
        assert problem is None if reason is None else reason in problem
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(backends, "cuda_problem", None)
        assert backends.unavailable("cuda") == problem
    assert _library.device_problem(torch.device("cpu")) is None


def test_backends_without_kernels_say_so():
    assert backends.unavailable("cpu") is None
    if torch.version.cuda is None:
        assert re.search("_C_cuda is not built|a build without CUDA", backends.unavailable("cuda"))
    assert "no Triton kernels yet" in backends.unavailable("triton")
    with pytest.raises(ValueError, match="expected one of cpu, cuda, triton"):
        backends.unavailable("tpu")
