"""The implicit GEMMs through the operators: on a GPU problems for its largest tiles, in the emulator small ones."""

from __future__ import annotations

import pytest
import torch
from cuda_device import ON_GPU, WHERE, cuda_kernels
from reference import Conv, results_by_torch
from test_gpu import on_device

from fastconv.stats import stats

pytestmark = cuda_kernels

MANY = 64 if ON_GPU else 1  # images, so that a GPU takes its largest tiles
GEMMS = {
    "3x3": Conv(n=MANY, c_per_group=128, k_per_group=132, size=(15, 16), padding=(1, 1, 1, 1)),
    "1x1": Conv(n=MANY, c_per_group=132, k_per_group=124, size=(16, 16), kernel=(1, 1)),
    "64 filters, stride 2": Conv(
        n=MANY, c_per_group=64, k_per_group=61, size=(17, 31), stride=(2, 2), padding=(1,) * 4
    ),
    "groups, dilated": Conv(n=MANY, groups=3, c_per_group=20, k_per_group=36, size=(15, 16), dilation=(2, 1)),
    "one image": Conv(n=1, c_per_group=160, k_per_group=96, size=(7, 7), padding=(1, 1, 1, 1)),
}


@pytest.mark.sanitize
@pytest.mark.parametrize("layouts", [(False,) * 3, (True,) * 3], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", GEMMS)
def test_implicit_gemm(name, layouts, poisoned):
    problem = Conv(**{**GEMMS[name].__dict__, "layouts": layouts, "integers": True, "algo": "implicit_gemm_fp32"})
    exact = results_by_torch(problem, torch.float64)
    for key, found in on_device(problem).items():
        assert torch.equal(found, exact[key].float()), key
    assert f"{WHERE}/conv2d_weight_grad/implicit_gemm_fp32" in stats()
