"""torch's own samples for these functions (torch.testing._internal): values, gradients, errors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from reference import assert_as_good, kernel_counts, or_from_float32, tensors_in
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db

from fastconv import functional
from fastconv.stats import reset_stats, stats

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# The functions, and which kernels must run for their samples: forward, backward.
KERNELS = {
    "conv2d": ({"conv2d"}, {"conv2d_input_grad", "conv2d_weight_grad", "conv2d_bias_grad"}),
    "max_pool2d": ({"max_pool2d_with_offsets"}, {"max_pool2d_backward", "max_pool2d_indices"}),
    "avg_pool2d": ({"avg_pool2d"}, {"avg_pool2d_backward"}),
    "adaptive_avg_pool2d": ({"adaptive_avg_pool2d"}, {"adaptive_avg_pool2d_backward"}),
    "local_response_norm": ({"local_response_norm"}, {"local_response_norm_backward"}),
}
INFOS = {info.name.removeprefix("nn.functional."): info for info in op_db}
FEWEST_SAMPLES = {
    "conv2d": 25, "max_pool2d": 1000, "avg_pool2d": 7, "adaptive_avg_pool2d": 10, "local_response_norm": 10,
}  # fmt: skip


def copied(value: Any, dtype: torch.dtype, memory_format: torch.memory_format) -> Any:
    """The same sample with floating-point tensors in another dtype and format, as new leaves."""
    if not isinstance(value, Tensor):
        return type(value)(copied(item, dtype, memory_format) for item in value) if type(value) is tuple else value
    if not value.is_floating_point():
        return value
    result = value.detach().to(dtype, copy=True)
    result = result.to(memory_format=memory_format) if result.dim() == 4 else result
    return result.requires_grad_(value.requires_grad)


def run(function: Any, sample: Any, dtype: torch.dtype, memory_format: torch.memory_format) -> list[Tensor]:
    """Outputs, then the gradients of every tensor that wants one, for the same gradient of the output."""
    arguments = [copied(value, dtype, memory_format) for value in (sample.input, *sample.args)]
    keywords = {name: copied(value, dtype, memory_format) for name, value in sample.kwargs.items()}
    outputs = tensors_in(function(*arguments, **keywords))
    leaves = [t for t in [*arguments, *keywords.values()] if isinstance(t, Tensor) and t.requires_grad]
    generator = torch.Generator().manual_seed(1)
    # Whole numbers: the same gradient in every dtype.
    gradient = torch.randint(-3, 4, outputs[0].shape, generator=generator).to(dtype)
    return [t.detach() for t in outputs] + list(torch.autograd.grad(outputs[0], leaves, gradient))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_samples(name, dtype, memory_format):
    info, ours = INFOS[name], getattr(functional, name)
    seen: set[str] = set()
    samples = list(info.sample_inputs("cpu", dtype, requires_grad=True))
    assert len(samples) >= FEWEST_SAMPLES[name]
    for number, sample in enumerate(samples):
        if memory_format == torch.channels_last and sample.input.dim() != 4:
            continue
        reset_stats()
        actual = run(ours, sample, dtype, memory_format)
        counts = kernel_counts()
        theirs = or_from_float32(lambda d, sample=sample: run(info.op, sample, d, memory_format), dtype)
        exact = run(info.op, sample, torch.float64, memory_format)
        what = f"{name} sample {number}: {tuple(sample.input.shape)} {sample.args} {sample.kwargs}"
        for part, triple in enumerate(zip(actual, theirs, exact, strict=True)):
            assert_as_good(*triple, f"result {part} of {what}")
        assert actual[0].stride() == theirs[0].stride(), what
        seen |= {kernel.split("/")[0] for kernel in counts}
        if all(t.numel() for t in tensors_in([sample.input, *sample.args])):
            assert not [kernel for kernel in counts if kernel.startswith("torch/")], f"went to torch: {what}"
            assert KERNELS[name][0] <= {kernel.split("/")[0] for kernel in counts}, f"{counts} for {what}"
    assert KERNELS[name][1] <= seen or (name == "local_response_norm" and not seen), "torch has no 4-D samples of it"


@pytest.mark.parametrize("name", KERNELS)
def test_other_dtypes_go_to_torch_and_are_counted(name):
    info, ours = INFOS[name], getattr(functional, name)
    for dtype in sorted(info.dtypes - set(DTYPES), key=str):
        for sample in itertools.islice(info.sample_inputs("cpu", dtype), 20):
            reset_stats()
            actual, theirs = (f(sample.input, *sample.args, **sample.kwargs) for f in (ours, info.op))
            torch.testing.assert_close(actual, theirs, rtol=0, atol=0)
            assert stats() == {f"torch/{name}": 1}


@pytest.mark.parametrize("name", [name for name in KERNELS if INFOS[name].error_inputs_func])
def test_error_inputs(name):
    errors = list(INFOS[name].error_inputs("cpu"))
    assert len(errors) >= 3
    for error in errors:
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex) as caught:
            getattr(functional, name)(sample.input, *sample.args, **sample.kwargs)
        assert type(caught.value) is error.error_type
        assert f"fastconv.{name}: " in str(caught.value), "the message must also say what fastconv got and wanted"
        assert stats() == {}
