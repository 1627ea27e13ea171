"""Fused models as few native calls: runs of layers become programs that the kernels' library carries out by itself.

A :class:`FusedGraph` is the model that :func:`fastconv.fuse` traced. In plain eager inference on the CPU its graph is
not run node by node: neighbouring layers that have kernels are one call of ``torch.ops.fastconv.network``
(``csrc/network``), with activations in channels_last whatever the caller's layout, weights packed, and all of them in
one workspace. Other nodes run as they would. Everything else (gradients, tracing, export, compilation, hooks) sees the
graph as it is.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from fastconv import _eager
from fastconv._graph_fusion import layer_of, written_by
from fastconv._huge_pages import advise_huge_pages, collapse_into_huge_pages
from fastconv._library import EMULATED, ops
from fastconv._network_layers import DENSE_BATCH, Emit, emitter, is_alias, tensors_of, trains
from fastconv._network_plan import Builder, Plan, Unplannable
from fastconv._network_watch import Watch
from fastconv._packed import PackedWeight
from fastconv.fused import has_hooks
from fastconv.ops._autograd import suggested_format

_function_modes = torch._C._len_torch_function_stack
_has_global_hook = nn.modules.module._has_any_global_hook
_network: Any = None if EMULATED else _eager._direct(ops.network.default)
PLANS = 64  # kinds of inputs that a run remembers


class FusedGraph(fx.GraphModule):
    """What :func:`fastconv.fuse` makes of a model that torch.fx can trace."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs and not EMULATED and not self._is_watched() and all(map(_eager._is_plain_conv, args)):
            networks = self.__dict__.get("_networks")
            if networks is None:
                networks = self.__dict__["_networks"] = Networks()
            network = networks.find(self, args)
            if network is not None:
                return network(args)
        return super().__call__(*args, **kwargs)

    def _is_watched(self) -> bool:
        return bool(self.training or has_hooks(self) or _has_global_hook() or _function_modes())  # type: ignore[no-untyped-call]

    def recompile(self) -> Any:
        self._forget()
        return super().recompile()

    def train(self, mode: bool = True) -> Any:
        if mode:
            self._forget()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._forget()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _forget(self) -> None:
        self.__dict__.pop("_networks", None)

    def __copy__(self) -> Any:
        return _as_fused(super().__copy__())

    def __reduce__(self) -> Any:
        make, arguments = super().__reduce__()[:2]
        return _reload, (make, arguments)


def _reload(make: Any, arguments: Any) -> Any:
    return _as_fused(make(*arguments))


def _as_fused(model: fx.GraphModule) -> Any:
    type(model).__bases__ = (FusedGraph,)  # torch makes a class for each GraphModule, of its own base
    return model


class Networks:
    """The networks of one graph. A copy, or one that was loaded, starts without any."""

    def __init__(self) -> None:
        self.workspaces = Workspaces()
        self.packed: weakref.WeakKeyDictionary[nn.Module, PackedWeight] = weakref.WeakKeyDictionary()
        self.found: dict[tuple[bool, bool], Network] = {}

    def __reduce__(self) -> Any:
        return Networks, ()

    def find(self, model: FusedGraph, args: Sequence[Any]) -> Network | None:
        """The network for these inputs; None if it would be no faster than the graph."""
        if not args:
            return None
        key = (torch.is_grad_enabled(), args[0].shape[0] <= DENSE_BATCH)
        network = self.found.get(key)
        if network is not None and not network.watch.is_current():
            self.found = {}  # the others hold what is gone as well
            network = None
        if network is None:
            network = self.found[key] = Network(model, self, *key)
        return network if network.runs and network.takes(len(args)) else None


class Workspaces:
    """Memory for what lies between layers, used again by the next call; threads that call at once have one each."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[Tensor] = []

    def take(self, size: int) -> Tensor:
        with self._lock:
            kept = self._free.pop() if self._free else None
        # What is far too large was for another batch.
        if kept is not None and size <= kept.numel() <= 4 * size + (1 << 20):
            return kept
        fresh = torch.empty(size, dtype=torch.uint8, device="cpu")
        advise_huge_pages(fresh)
        return fresh

    def give(self, workspace: Tensor) -> None:
        with self._lock:
            self._free.append(workspace)

    def bytes(self) -> int:
        return sum(workspace.numel() for workspace in self._free)


class Network:
    """A graph cut into runs and single nodes, for calls with or without gradients, of few images or many."""

    def __init__(self, model: FusedGraph, owner: Networks, grads: bool, few: bool) -> None:
        self.model, self.owner, self.grads = model, owner, grads
        self.watch = Watch(model)
        self.copies: dict[int, Tensor] = {}
        self.parts: list[Run | fx.Node] = []
        nodes = list(model.graph.nodes)
        self.placeholders = [node for node in nodes if node.op == "placeholder"]
        layers = {node: layer_of(model, node) for node in nodes}
        emitters: dict[fx.Node, Emit | None] = {}
        for node, layer in layers.items():
            may_run = layer is None or self._may_run(layer, grads, few)
            emitters[node] = emitter(node, layers, emitters) if may_run else None
        # What writes in place would see whether a view is one.
        written = any(written_by(layers[node], node) for node in nodes if emitters[node] is None)
        run: list[tuple[fx.Node, Emit, Any]] = []
        for node in nodes:
            emit = emitters[node]
            if emit is None or (written and is_alias(node, layers[node])):
                self._close(run)
                self.parts.append(node)
            else:
                run.append((node, emit, layers[node]))
        self._close(run)
        self.runs = [part for part in self.parts if isinstance(part, Run)]
        self.ends = self._last_uses()

    def takes(self, count: int) -> bool:
        """True if so many arguments are enough, and no placeholder stands for several."""
        if len(self.placeholders) < count or any(str(node.target).startswith("*") for node in self.placeholders):
            return False
        return all(node.args for node in self.placeholders[count:])

    def _may_run(self, layer: nn.Module, grads: bool, few: bool) -> bool:
        if has_hooks(layer) or layer.training or (isinstance(layer, nn.Linear) and not few):
            return False
        tensors = tensors_of(layer)
        return all(type(tensor) in _eager._TYPES and not tensor.is_inference() for tensor in tensors) and not (
            grads and trains(layer)
        )

    def _close(self, run: list[tuple[fx.Node, Emit, Any]]) -> None:
        """Ends a run of nodes, less those at its end that would give away a view."""
        inside = {node for node, _, _ in run}
        tail: list[fx.Node] = []
        while run and is_alias(run[-1][0], run[-1][2]) and any(user not in inside for user in run[-1][0].users):
            tail.append(run[-1][0])
            inside.remove(run.pop()[0])
        if any(not is_alias(node, layer) for node, _, layer in run):
            self.parts.append(Run(run))
            for node, _, layer in run:
                if layer is not None:
                    self.watch.add(node, layer, self.packed_of(layer))
        else:
            self.parts += [node for node, _, _ in run]
        self.parts += reversed(tail)
        run.clear()

    def packed_of(self, layer: Any) -> PackedWeight:
        own: PackedWeight | None = getattr(layer, "packed", None)
        return self.owner.packed.setdefault(layer, PackedWeight()) if own is None else own

    def channels_last(self, weight: Tensor) -> Tensor:
        """A copy of ``weight``, one for all programs."""
        if id(weight) not in self.copies:
            self.copies[id(weight)] = weight.detach().contiguous(memory_format=torch.channels_last)
        return self.copies[id(weight)]

    def _last_uses(self) -> dict[int, list[fx.Node]]:
        """The values that nobody reads after a part."""
        last: dict[fx.Node, int] = {}
        for index, part in enumerate(self.parts):
            for node in part.inputs if isinstance(part, Run) else part.all_input_nodes:
                last[node] = index
        ends: dict[int, list[fx.Node]] = {}
        for node, index in last.items():
            ends.setdefault(index, []).append(node)
        return ends

    def __call__(self, args: Sequence[Tensor]) -> Any:
        values: dict[fx.Node, Any] = {}
        remaining = iter(args)
        for index, part in enumerate(self.parts):
            if isinstance(part, Run):
                part(self, values)
            elif part.op == "output":
                return _looked_up(part.args[0], values)
            elif part.op == "placeholder":
                values[part] = next(remaining, part.args[0] if part.args else None)
            else:
                values[part] = self.run_node(part, values)
            for node in self.ends.get(index, ()):
                values.pop(node, None)
        raise RuntimeError("fastconv: the model's graph has no output")

    def run_node(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """One node as the graph has it."""
        args, kwargs = _looked_up(node.args, values), _looked_up(node.kwargs, values)
        target: Any = node.target
        if node.op == "call_module":
            return self.model.get_submodule(target)(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        if node.op == "get_attr":
            found: Any = self.model
            for name in target.split("."):
                found = getattr(found, name)
            return found
        return target(*args, **kwargs)


class Run:
    """Neighbouring nodes that are one call, for inputs that there is a program for."""

    def __init__(self, run: list[tuple[fx.Node, Emit, Any]]) -> None:
        self.nodes = list(run)
        inside = {node for node, _, _ in run}
        self.inputs = list(dict.fromkeys(arg for node in inside for arg in node.all_input_nodes if arg not in inside))
        self.outputs = [node for node, _, _ in run if any(user not in inside for user in node.users)]
        self.plans: dict[Any, Plan | None] = {}

    def __call__(self, network: Network, values: dict[fx.Node, Any]) -> None:
        inputs = [_dense(values[node]) for node in self.inputs]
        key = tuple(
            (x.shape, x.stride(), x.dtype, network.grads and x.requires_grad) if _is_plain(x) else None for x in inputs
        )
        try:
            plan = self.plans[key]
        except KeyError:
            plan = self._plan(network, inputs)
            if len(self.plans) >= PLANS:
                self.plans.pop(next(iter(self.plans)), None)
            self.plans[key] = plan
        if plan is None:
            for node, _, _ in self.nodes:
                values[node] = network.run_node(node, values)
            return
        outputs = [
            torch.empty_strided(shape, stride, dtype=dtype, device="cpu") for shape, stride, dtype in plan.outputs
        ]
        workspace = network.owner.workspaces.take(plan.workspace)
        try:
            _network(plan.program, inputs + outputs, plan.constants, workspace)
        finally:
            network.owner.workspaces.give(workspace)
        values.update(zip(self.outputs, outputs, strict=True))

    def _plan(self, network: Network, inputs: Sequence[Any]) -> Plan | None:
        folded = {node for node, _, layer in self.nodes if type(layer) is nn.ReLU}
        builder = Builder(network.packed_of, network.channels_last, folded)
        try:
            for node, tensor in zip(self.inputs, inputs, strict=True):
                if not _is_plain(tensor):
                    raise Unplannable("an input is no plain tensor")
                if network.grads and tensor.requires_grad:
                    raise Unplannable("an input wants a gradient")
                builder.add_input(node, tensor)
            for node, emit, layer in self.nodes:
                emit(builder, node, layer)
            plan = builder.finish(self.outputs)
        except (Unplannable, AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            return None  # the layers themselves say what is wrong
        for constant in plan.constants:
            collapse_into_huge_pages(constant)
        return plan


def _looked_up(argument: Any, values: dict[fx.Node, Any]) -> Any:
    """``argument`` with values in place of nodes, in lists and dicts that are Python's own."""
    if isinstance(argument, fx.Node):
        return values[argument]
    if isinstance(argument, dict):
        return {key: _looked_up(value, values) for key, value in argument.items()}
    if type(argument) is tuple or isinstance(argument, list):
        items = [_looked_up(item, values) for item in argument]
        return items if isinstance(argument, list) else tuple(items)
    return map_arg(argument, values.__getitem__)


def _is_plain(value: Any) -> bool:
    return type(value) is Tensor and value.is_cpu and not value._is_zerotensor()


def _dense(value: Any) -> Any:
    """A tensor that is dense in one of the two formats."""
    if type(value) is not Tensor or value.is_contiguous():
        return value
    if value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last):
        return value
    return value.contiguous(memory_format=suggested_format(value))
