"""torch.export, ONNX and TorchScript: the graph that leaves fastconv holds the operators that other runtimes know."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastconv

onnx = pytest.importorskip("onnx")


class Net(nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(
            module.Conv2d(3, 8, 3, padding=1), nn.ReLU(), module.MaxPool2d(2),
            module.Conv2d(8, 8, 3, groups=8, stride=2, padding=1), module.AvgPool2d(2),
        )  # fmt: skip
        self.pool = module.AdaptiveAvgPool2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(self.features(x)).flatten(1)


def image(n: int = 2) -> torch.Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def call_functions(program: Any) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def test_torch_export_is_torchs_graph():
    """The exported program needs no fastconv to run: it is the one that torch's own layers export."""
    mine, theirs = (torch.export.export(Net(module), (image(),)) for module in (fastconv, nn))
    assert call_functions(mine) == call_functions(theirs)
    assert "aten.conv2d.default" in call_functions(mine)
    assert not [name for name in call_functions(mine) if "fastconv" in name]
    torch.testing.assert_close(mine.module()(image()), Net(nn)(image()))


def test_torch_export_with_dynamic_batch_and_saved():
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Net(fastconv), (image(),), dynamic_shapes={"x": {0: batch}})
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    for n in (1, 5):
        torch.testing.assert_close(loaded.module()(image(n)), Net(nn)(image(n)))


def test_layers_run_our_kernels_after_an_export(ran):
    net = Net(fastconv)
    torch.export.export(net, (image(),))
    with ran("conv2d", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"), torch.no_grad():
        net(image())


def check_onnx(model: Any) -> None:
    onnx.checker.check_model(model)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Conv") == 2, kinds
    assert kinds.count("MaxPool") == 1
    assert kinds.count("AveragePool") == 1
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}, "only standard operators"
    from onnx.reference import ReferenceEvaluator

    [name] = [value.name for value in model.graph.input]
    [output] = ReferenceEvaluator(model).run(None, {name: image().numpy()})
    np.testing.assert_allclose(output, Net(nn)(image()).detach().numpy(), rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_onnx_by_tracing():
    file = io.BytesIO()
    torch.onnx.export(Net(fastconv).eval(), (image(),), file, dynamo=False, opset_version=17)
    check_onnx(onnx.load_from_string(file.getvalue()))


def test_onnx_by_dynamo():
    pytest.importorskip("onnxscript", reason="torch's newer ONNX exporter needs onnxscript")
    program = torch.onnx.export(Net(fastconv).eval(), (image(),), dynamo=True)
    check_onnx(program.model_proto)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_torchscript_trace(ran):
    """A trace holds fastconv's operators, and runs them at other sizes too."""
    net = Net(fastconv).eval()
    with torch.no_grad():
        traced = torch.jit.trace(net, image())
        other = torch.randn(3, 3, 24, 20)
        with ran("conv2d", "max_pool2d", "avg_pool2d"):
            actual = traced(other)
        torch.testing.assert_close(actual, net(other))
