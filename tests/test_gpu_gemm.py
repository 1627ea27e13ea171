"""The implicit GEMMs through the operators: on a GPU problems for its largest tiles, in the emulator small ones."""

from __future__ import annotations

import pytest
import torch
from cuda_device import DEVICE, ON_GPU, WHERE, cuda_kernels
from reference import Conv, results_by_torch
from test_gpu import on_device
from torch.nn import functional as F

import fastconv
from fastconv import functional
from fastconv._library import ops
from fastconv.stats import stats

pytestmark = cuda_kernels

MANY = 64 if ON_GPU else 1  # images, so that a GPU takes its largest tiles
GEMMS = {
    "3x3": Conv(n=MANY, c_per_group=128, k_per_group=136, size=(15, 16), padding=(1, 1, 1, 1)),
    "1x1": Conv(n=MANY, c_per_group=136, k_per_group=120, size=(16, 16), kernel=(1, 1)),
    "64 filters, stride 2": Conv(
        n=MANY, c_per_group=64, k_per_group=61, size=(17, 31), stride=(2, 2), padding=(1,) * 4
    ),
    "groups, dilated": Conv(n=MANY, groups=3, c_per_group=20, k_per_group=36, size=(15, 16), dilation=(2, 1)),
    "one image": Conv(n=1, c_per_group=160, k_per_group=96, size=(7, 7), padding=(1, 1, 1, 1)),
}


ALGOS = {
    "implicit_gemm_fp32": torch.float32, "implicit_gemm_tf32": torch.float32, "implicit_gemm_3xtf32": torch.float32,
    "implicit_gemm_mma": torch.float16,
}  # fmt: skip


@pytest.mark.sanitize
@pytest.mark.parametrize("layouts", [(False,) * 3, (True,) * 3], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", GEMMS)
@pytest.mark.parametrize("algo", ALGOS)
@pytest.mark.parametrize("guard", [37, 64], ids=["numbers", "vectors"])  # no address allows 16-byte copies, or all do
def test_implicit_gemm(algo, name, layouts, guard, poisoned, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    problem = Conv(**{**GEMMS[name].__dict__, "layouts": layouts, "integers": True, "algo": algo, "dtype": ALGOS[algo]})
    exact = results_by_torch(problem, torch.float64)
    for key, found in on_device(problem, guard).items():
        assert torch.equal(found, exact[key].to(ALGOS[algo])), key
    assert f"{WHERE}/conv2d_weight_grad/{algo}" in stats()


def test_tf32_needs_torchs_leave(monkeypatch):
    x, weight = torch.randn(2, 8, 9, 8).to(DEVICE), torch.randn(8, 8, 3, 3).to(DEVICE)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with pytest.raises(RuntimeError, match="torch's settings forbid"):
        functional.conv2d(x, weight, algo="implicit_gemm_tf32")
    exact = F.conv2d(x.double().cpu(), weight.double().cpu())
    for algo, tolerance in (("implicit_gemm_tf32", 1e-2), ("implicit_gemm_3xtf32", 1e-5)):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", algo == "implicit_gemm_tf32")
        fastconv.reset_stats()
        y = functional.conv2d(x, weight, algo=algo)
        assert stats() == {f"{WHERE}/conv2d/{algo}": 1}
        torch.testing.assert_close(y.double().cpu(), exact, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_dense_16_bit_layers_train_on_tensor_cores(memory_format):
    layer = fastconv.Conv2d(16, 24, 3, padding=1).half().to(DEVICE).to(memory_format=memory_format)
    x = torch.randn(2, 16, 8, 8).half().to(DEVICE).to(memory_format=memory_format).requires_grad_()
    layer(x).sum().backward()
    ran = {f"{WHERE}/{op}/implicit_gemm_mma" for op in ("conv2d", "conv2d_input_grad", "conv2d_weight_grad")}
    assert ran <= set(stats())
    assert not any(name.startswith("torch/") for name in stats())


def test_tf32_is_asked_about_in_every_pass(monkeypatch):
    x, weight = (torch.randn(size).to(DEVICE).requires_grad_() for size in ((2, 8, 9, 8), (8, 8, 3, 3)))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    y = functional.conv2d(x, weight, algo="implicit_gemm_tf32")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with pytest.raises(RuntimeError, match="torch's settings forbid"):
        y.sum().backward()


def test_no_channels_at_all():
    x, weight = torch.zeros(2, 0, 4, 4).to(DEVICE), torch.zeros(0, 0, 3, 3).to(DEVICE)
    for dtype in (torch.float32, torch.float16):
        y = ops.conv2d(x.to(dtype), weight.to(dtype), None, [1, 1], [0] * 4, [1, 1], 1, None)
        assert y.shape == (2, 0, 2, 2)
