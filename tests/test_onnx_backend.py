"""onnx's backend tests for Conv, MaxPool, AveragePool, GlobalAveragePool and LRN, through fastconv.functional.

The data are onnx's own: node tests computed by its numpy reference, and models converted from torch years ago.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastconv import functional
from fastconv.ops import conv2d as raw_conv2d
from fastconv.stats import stats

onnx = pytest.importorskip("onnx")

from onnx import helper, numpy_helper  # noqa: E402
from onnx.backend.test.case import node as node_cases  # noqa: E402
from onnx.backend.test.case.node import averagepool, conv, globalaveragepool, lrn, maxpool  # noqa: E402, F401
from onnx.backend.test.loader import load_model_tests  # noqa: E402

Attributes = dict[str, Any]
Pads = tuple[int, int, int, int]  # top, left, bottom, right: ONNX's order


def pads_of(attributes: Attributes, input: Tensor, kernel: tuple[int, int], stride: Any, dilation: Any) -> Pads:
    auto = attributes.get("auto_pad", "NOTSET")
    if auto in ("NOTSET", "VALID"):
        return tuple(attributes.get("pads", (0, 0, 0, 0)))  # type: ignore[return-value]
    begin, end = [], []
    for size, window, step, gap in zip(input.shape[2:], kernel, stride, dilation, strict=True):
        total = max(0, (-(-size // step) - 1) * step + gap * (window - 1) + 1 - size)
        small, large = total // 2, total - total // 2
        begin.append(small if auto == "SAME_UPPER" else large)
        end.append(large if auto == "SAME_UPPER" else small)
    return begin[0], begin[1], end[0], end[1]


def run_conv(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Tensor]:
    stride, dilation = tuple(a.get("strides", (1, 1))), tuple(a.get("dilations", (1, 1)))
    pads = pads_of(a, x, tuple(weight.shape[2:]), stride, dilation)
    if pads[:2] == pads[2:]:
        return [functional.conv2d(x, weight, bias, stride, pads[:2], dilation, a.get("group", 1))]
    return [raw_conv2d.conv2d(x, weight, bias, stride, pads, dilation, a.get("group", 1))]


def padded(x: Tensor, pads: Pads, value: float) -> Tensor:
    top, left, bottom, right = pads
    return torch.nn.functional.pad(x, (left, right, top, bottom), value=value)


def run_max_pool(a: Attributes, x: Tensor) -> list[Tensor]:
    kernel, dilation = tuple(a["kernel_shape"]), tuple(a.get("dilations", (1, 1)))
    stride = tuple(a.get("strides", (1, 1)))
    pads = pads_of(a, x, kernel, stride, dilation)
    shift = (0, 0)
    source = x
    if pads[:2] != pads[2:] or pads[0] * 2 > kernel[0] or pads[1] * 2 > kernel[1]:
        source, shift, pads = padded(x, pads, float("-inf")), pads[:2], (0, 0, 0, 0)
    values, flat = functional.max_pool2d(
        source, kernel, stride, pads[:2], dilation, bool(a.get("ceil_mode", 0)), return_indices=True
    )
    # ONNX numbers the elements of the whole tensor, torch those of a plane; storage_order 1 goes down columns first.
    rows, columns = flat // source.shape[3] - shift[0], flat % source.shape[3] - shift[1]
    (n, c), (h, w) = x.shape[:2], x.shape[2:]
    planes = torch.arange(n * c).reshape(n, c, 1, 1) * h * w
    return [values, planes + (columns * h + rows if a.get("storage_order", 0) else rows * w + columns)]


def run_average_pool(a: Attributes, x: Tensor) -> list[Tensor]:
    kernel, stride = tuple(a["kernel_shape"]), tuple(a.get("strides", (1, 1)))
    pads, ceil = pads_of(a, x, kernel, stride, (1, 1)), bool(a.get("ceil_mode", 0))
    include = bool(a.get("count_include_pad", 0))
    if pads[:2] == pads[2:] and pads[0] * 2 <= kernel[0] and pads[1] * 2 <= kernel[1]:
        return [functional.avg_pool2d(x, kernel, stride, pads[:2], ceil, include)]
    total = functional.avg_pool2d(padded(x, pads, 0), kernel, stride, 0, ceil, divisor_override=1)
    counted = padded(torch.ones_like(x), pads, 1.0 if include else 0.0)
    return [total / functional.avg_pool2d(counted, kernel, stride, 0, ceil, divisor_override=1)]


def run_lrn(a: Attributes, x: Tensor) -> list[Tensor]:
    # ONNX looks at (size - 1) // 2 channels before and the rest behind, torch at size // 2 before.
    return [functional.local_response_norm(x, a["size"], a.get("alpha", 1e-4), a.get("beta", 0.75), a.get("bias", 1.0))]


RUN: dict[str, Callable[..., list[Tensor]]] = {
    "Conv": run_conv,
    "MaxPool": run_max_pool,
    "AveragePool": run_average_pool,
    "GlobalAveragePool": lambda _, x: [functional.adaptive_avg_pool2d(x, 1)],
    "LRN": run_lrn,
}


def reason_to_skip(case: Any) -> str | None:
    """Why a test of these operators is not fastconv's business."""
    [node] = [node for node in case.model.graph.node if node.op_type in RUN]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    input = case.data_sets[0][0][0]
    if input.ndim != 4:
        return f"{input.ndim - 2}-D, fastconv is 2-D"
    if input.dtype == np.uint8:
        return "uint8, which torch does not pool with kernels of ours"
    if node.op_type == "AveragePool" and max(attributes.get("dilations", [1])) > 1:
        return "torch's average pooling has no dilation"
    if node.op_type == "LRN" and attributes["size"] % 2 == 0:
        return "an even window lies differently in ONNX"
    return None


def load_cases() -> list[Any]:
    cases = [case for case in node_cases._NodeTestCases if case.model.graph.node[0].op_type in RUN]
    for kind in ("pytorch-converted", "pytorch-operator"):
        for case in load_model_tests(kind=kind):
            if not any(word in case.name.lower() for word in ("conv", "pool")) or "transpose" in case.name.lower():
                continue
            model = onnx.load(f"{case.model_dir}/model.onnx")
            if {node.op_type for node in model.graph.node} - {"Constant"} <= set(RUN):
                cases.append(read_model(case, model))
    return cases


def read_model(case: Any, model: Any) -> Any:
    """A model test as a node test: its tensors are files."""

    def tensors(prefix: str, count: int) -> list[np.ndarray]:
        paths = [f"{case.model_dir}/test_data_set_0/{prefix}_{i}.pb" for i in range(count)]
        return [numpy_helper.to_array(onnx.load_tensor(path)) for path in paths]

    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    inputs = [value.name for value in model.graph.input if value.name not in weights]
    given = dict(zip(inputs, tensors("input", len(inputs)), strict=True)) | weights
    [node] = [node for node in model.graph.node if node.op_type in RUN]
    data = ([given[name] for name in node.input], tensors("output", len(model.graph.output)))
    return dataclasses.replace(case, model=model, data_sets=[data])


CASES = load_cases()
SKIPPED = {case.name: reason for case in CASES if (reason := reason_to_skip(case))}
SERVED = [case for case in CASES if case.name not in SKIPPED]


def test_what_runs_and_what_does_not():
    """A case that is skipped for no good reason, or a loader that finds nothing, would go unnoticed otherwise."""
    assert len(SERVED) >= 45, [case.name for case in SERVED]
    assert all("2d" not in name or "uint8" in name or "dilations" in name for name in SKIPPED), SKIPPED
    assert {case.model.graph.node[-1].op_type for case in SERVED} == set(RUN)


@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_case(case, memory_format):
    [node] = [node for node in case.model.graph.node if node.op_type in RUN]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    attributes = {name: value.decode() if isinstance(value, bytes) else value for name, value in attributes.items()}
    for inputs, wanted in case.data_sets:
        tensors = [torch.from_numpy(np.array(value)) for value in inputs]
        tensors = [t.to(memory_format=memory_format) if t.dim() == 4 else t for t in tensors]
        outputs = RUN[node.op_type](attributes, *tensors)
        for output, expected in zip(outputs[: len(wanted)], wanted, strict=True):
            assert output.shape == expected.shape
            np.testing.assert_allclose(output.numpy(), expected, rtol=case.rtol, atol=max(case.atol, 1e-6))
    assert stats()
    assert not [name for name in stats() if name.startswith("torch/")]
