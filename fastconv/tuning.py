"""The fastest CUDA kernel of a convolution, by measurement.

``torch.backends.cudnn.benchmark = True`` means here what it means for cuDNN: the first call of each problem (operator,
shapes, dtype, memory format, stride, padding, dilation, groups) times every kernel that can serve it, and the winner
serves the rest. Winners can be saved and loaded, so that a program need not measure again; a loaded table is used
whether or not the switch is on. Timing runs appear in :func:`fastconv.stats`. Nothing is timed while a CUDA graph is
captured, on fake tensors, under a dispatch mode, nor inside ``torch.compile``, whose graphs hold no choice; a call that
names its kernel (``algo=``) is left alone. Convolutions that go to cuDNN (dense ones of float32) are neither timed nor
looked up here.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastconv._library import EMULATED, runs_cuda_kernels
from fastconv._plans import plan_of
from fastconv._precision import may_be_chosen, precision_refusal
from fastconv.ops._autograd import call_raw, suggested_format

__all__ = ["clear", "load", "save", "winners"]

_RUNS = 3  # of which the fastest counts, after two that do not
_HOPELESS = 10  # a kernel this many times slower than the best is not timed again

_winners: dict[str, str] = {}
_loaded: dict[str, str] = {}  # not looked at yet: a file may be of another release, whose kernels were others
_lock = threading.Lock()


def winners() -> dict[str, str]:
    """Problem -> name of the fastest kernel, measured or loaded."""
    return {**_loaded, **_winners}


def clear() -> None:
    """Forgets all winners."""
    _winners.clear()
    _loaded.clear()


def save(path: str | os.PathLike[str]) -> None:
    """Writes the winners to a JSON file, whole or not at all."""
    target = Path(path)
    fresh = target.with_name(f"{target.name}.{os.getpid()}.{threading.get_ident()}")
    fresh.write_text(json.dumps({"fastconv winners": winners()}, indent=1, sort_keys=True) + "\n")
    fresh.replace(target)


def load(path: str | os.PathLike[str]) -> None:
    """Adds the winners of a file that :func:`save` wrote; those measured here have precedence.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such file.
    """
    try:
        table = json.loads(Path(path).read_text())["fastconv winners"]
        texts = [*table, *table.values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no table of winners, expected a file that fastconv.tuning.save wrote") from error
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{path} holds a winner that is no name; save the table again")
    _loaded.update(table)


def applies(tensor: Tensor) -> bool:
    """True if a call on ``tensor`` may have a winner."""
    return runs_cuda_kernels(tensor) and bool(torch.backends.cudnn.benchmark or _winners or _loaded)


def call_tuned(op: Any, *args: Any) -> Any:
    """``call_raw`` for a convolution operator, whose last argument is ``algo``."""
    if args[-1] is None and applies(args[0]):
        args = (*args[:-1], _winner(op, args))
    elif runs_cuda_kernels(args[0]) and (reason := precision_refusal(args[-1])) is not None:
        raise RuntimeError(f"{op.name()}: algo={args[-1]!r} does not serve this convolution: {reason}")
    return call_raw(op, *args)


def _winner(op: Any, args: tuple[Any, ...]) -> str | None:
    key = _key(op, args)
    known = _winners.get(key)
    if known is not None and may_be_chosen(known):
        return known
    candidate = _loaded.get(key)
    may_measure = bool(torch.backends.cudnn.benchmark) and _can_be_timed(args[0])
    if candidate is None and not may_measure:
        return None
    plan = plan_of(op, args, None)
    if plan is None:
        return None
    algos = [algo for algo in (plan.kernel.split("/")[-1], *plan.others) if may_be_chosen(algo)]
    if candidate in algos:
        _winners[key] = candidate
        return candidate
    if not may_measure:
        return None
    with _lock:
        winner = _winners.get(key)
        if winner not in algos:
            winner = _fastest(algos, lambda algo: call_raw(op, *args[:-1], algo), args[0])
        _winners[key] = winner
    return winner


def _fastest(algos: list[str], run: Callable[[str], Any], tensor: Tensor) -> str:
    if len(algos) == 1:
        return algos[0]
    best: dict[str, float] = {}
    able = []
    for algo in algos:
        try:
            run(algo)  # loads the kernel
        except torch.OutOfMemoryError:  # of its workspace; another kernel may do with less
            continue
        able.append(algo)
    for algo in able:
        # The first run fills the caches; where it is far behind, one is enough.
        first = _seconds(lambda algo=algo: run(algo), tensor)  # type: ignore[misc]
        if best and first > _HOPELESS * min(best.values()):
            continue
        best[algo] = min(_seconds(lambda algo=algo: run(algo), tensor) for _ in range(_RUNS))  # type: ignore[misc]
    return min(best, key=best.__getitem__) if best else algos[0]


def _seconds(run: Callable[[], Any], tensor: Tensor) -> float:
    if not tensor.is_cuda:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    with torch.cuda.device(tensor.device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000


def _can_be_timed(tensor: Tensor) -> bool:
    """False for tensors without data, under a mode that watches calls, and while a CUDA graph is captured."""
    if isinstance(tensor, FakeTensor) or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if not tensor.is_cuda:
        return True
    with torch.cuda.device(tensor.device):
        return not torch.cuda.is_current_stream_capturing()


def _key(op: Any, args: tuple[Any, ...]) -> str:
    tensors = [value for value in args if isinstance(value, Tensor)]
    where = "emulated" if EMULATED else torch.cuda.get_device_name(tensors[0].device)
    layout = "channels_last" if suggested_format(*tensors[:2]) == torch.channels_last else "contiguous"
    words = [where, op._schema.name.split("::")[-1], str(tensors[0].dtype).removeprefix("torch."), layout]
    for argument, value in zip(op._schema.arguments, args, strict=False):
        if argument.name != "algo":
            shown = tuple(value.shape) if isinstance(value, Tensor) else value
            words.append(f"{argument.name} {json.dumps(shown, default=str)}")
    return "; ".join(words)
