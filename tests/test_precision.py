"""Which of torch's settings forbid TF32."""

from __future__ import annotations

import pytest
import torch

from fastconv._precision import may_be_chosen, precision_refusal, tf32_is_allowed

CUDNN = torch.backends.cudnn


@pytest.fixture(autouse=True)
def _restored():
    before = CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision
    yield
    CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision = before


def allow(is_allowed: bool) -> None:
    """``CUDNN.allow_tf32 = is_allowed``, which torch.testing._internal forbids to the rest of its process."""
    torch._C._set_cudnn_allow_tf32(is_allowed)


def test_torchs_settings_decide():
    allow(True)
    assert tf32_is_allowed()
    assert precision_refusal("implicit_gemm_tf32") is None
    assert may_be_chosen("implicit_gemm_tf32")
    allow(False)
    assert not tf32_is_allowed()
    assert "torch's settings forbid" in precision_refusal("implicit_gemm_tf32")
    assert not may_be_chosen("implicit_gemm_tf32")
    for precision in ("tf32", "ieee"):
        CUDNN.conv.fp32_precision = precision
        assert tf32_is_allowed() == (precision == "tf32")


def test_other_kernels_are_not_asked():
    allow(False)
    for algo in (None, "direct", "implicit_gemm_mma", "implicit_gemm_3xtf32"):
        assert precision_refusal(algo) is None
    assert may_be_chosen("direct")
    assert not may_be_chosen("implicit_gemm_3xtf32")
