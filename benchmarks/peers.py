"""What else runs a torch model on a CPU: eager torch in both layouts, torch.compile, onnxruntime, openvino.

``pip install '.[bench]'`` brings the last two. A peer that is not there raises Missing, and is shown as such.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Call


class Missing(Exception):
    """Says why a peer cannot run here."""


Prepare = Callable[[nn.Module, Tensor, Path], Call]


def _eager(model: nn.Module, x: Tensor, folder: Path) -> Call:
    return lambda: model(x)


def _channels_last(model: nn.Module, x: Tensor, folder: Path) -> Call:
    changed = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = x.to(memory_format=torch.channels_last)
    return lambda: changed(images)


def _inductor(model: nn.Module, x: Tensor, folder: Path) -> Call:
    """With freezing: weights are constants, packed and folded when the model is compiled."""
    if shutil.which("g++") is None:
        raise Missing("no g++")
    torch._dynamo.reset()  # type: ignore[no-untyped-call]
    with torch._inductor.config.patch(freezing=True), _quietly():
        compiled = torch.compile(model)
        compiled(x)
    return lambda: compiled(x)


def _onnxruntime(model: nn.Module, x: Tensor, folder: Path) -> Call:
    runtime = _import("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(_onnx(model, x, folder)), options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


def _openvino(model: nn.Module, x: Tensor, folder: Path) -> Call:
    openvino = _import("openvino")
    # The default would multiply in bfloat16 where the CPU can.
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(
        _onnx(model, x, folder), "CPU", {"PERFORMANCE_HINT": "LATENCY", **settings}
    )
    images = x.numpy()
    return lambda: torch.from_numpy(compiled(images)[0])


EAGER, CHANNELS_LAST, INDUCTOR = "eager NCHW", "eager channels_last", "inductor"
PEERS: dict[str, Prepare] = {
    EAGER: _eager,
    CHANNELS_LAST: _channels_last,
    INDUCTOR: _inductor,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
COMPILERS = (INDUCTOR, "onnxruntime", "openvino")  # the goal is set by the best of them


def versions() -> dict[str, str]:
    """Of the peers that are packages of their own."""
    found = {}
    for name in ("onnxruntime", "openvino"):
        try:
            found[name] = str(_import(name).__version__)
        except Missing as reason:
            found[name] = str(reason)
    return found


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise Missing("not installed") from None


def _onnx(model: nn.Module, x: Tensor, folder: Path) -> Path:
    path = folder / "model.onnx"
    if not path.exists():
        _import("onnxscript")
        with _quietly():
            torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    return path


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Exporters and compilers talk about their own progress."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
