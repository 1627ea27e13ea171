"""Patterns in an fx graph: a convolution and what follows it, as one node.

A chain is convolution, then batch normalisation, then one addition, then an activation, each optional, each the only
reader of the one before. The fused node takes the place of the chain's last node, so that both the convolution's input
and the other addend exist there; it is formed only if nobody writes to them in the meantime.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from fastconv._arguments import DTYPES
from fastconv._module_copy import layer_type
from fastconv._report import ConversionReport, Entry
from fastconv.fused import BATCH_NORMS, FusedConv2d, fused_conv2d, has_hooks
from fastconv.layers import Conv2d

_ACTIVATION_LAYERS: dict[type, str] = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Tanh: "tanh"}
_ACTIVATION_FUNCTIONS: dict[Any, str] = {
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu: "relu",
    F.relu6: "relu6",
    torch.tanh: "tanh",
    torch.tanh_: "tanh",
    F.tanh: "tanh",
}
_ACTIVATION_METHODS = {"relu": "relu", "relu_": "relu", "tanh": "tanh", "tanh_": "tanh"}
IN_PLACE_OPERATORS = {
    name: getattr(operator, name)
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "setitem")
}
# Layers and functions whose result shares no memory with their input, unless they work in place.
_FRESH_LAYERS = (
    *(nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.Linear, nn.MaxPool2d, nn.AvgPool2d, FusedConv2d),
    *(nn.ReLU, nn.ReLU6, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU, nn.Hardswish, nn.LeakyReLU),
)
_FRESH_FUNCTIONS: frozenset[Any] = frozenset(
    {
        *(operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.sub, torch.mul, torch.cat),
        *(torch.relu, torch.tanh, torch.sigmoid, F.relu, F.relu6, F.conv2d, fused_conv2d),
    }
)


@dataclass
class Chain:
    """Nodes that become one, in the order in which they run."""

    conv: fx.Node
    norm: fx.Node | None = None
    add: fx.Node | None = None
    activation: fx.Node | None = None
    activation_name: str = "none"
    nodes: list[fx.Node] = field(default_factory=list)

    @property
    def last(self) -> fx.Node:
        return self.nodes[-1]

    def residual(self) -> fx.Node | None:
        """The other addend, as the graph is now."""
        if self.add is None:
            return None
        before = self.nodes[self.nodes.index(self.add) - 1]
        first, second = self.add.args[:2]
        other = second if first is before else first
        return other if isinstance(other, fx.Node) else None


def fuse_graph(root: nn.Module, graph: fx.Graph, prefix: str, report: ConversionReport) -> None:
    """Replaces every chain in ``graph`` by a call of a FusedConv2d, which becomes a submodule of ``root``."""
    matcher = _Matcher(root, prefix, report)
    chains: list[Chain] = []
    taken: set[fx.Node] = set()
    for node in graph.nodes:
        chain = matcher.chain_from(node, taken) if node not in taken else None
        if chain is not None:
            chains.append(chain)
            taken.update(chain.nodes)
    _replace(root, graph, chains, prefix, report)
    graph.lint()


def layer_of(root: nn.Module, node: fx.Node) -> nn.Module | None:
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def _replace(root: nn.Module, graph: fx.Graph, chains: list[Chain], prefix: str, report: ConversionReport) -> None:
    calls: dict[Any, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1
    keys = [(chain.conv.target, chain.norm and chain.norm.target, chain.activation_name) for chain in chains]
    layers: dict[Any, str] = {}
    planned: list[tuple[str, FusedConv2d]] = []
    for chain, key in zip(chains, keys, strict=True):
        if key not in layers:
            # The convolution's own name, unless the convolution is also called elsewhere in another company.
            alone = keys.count(key) == calls[chain.conv.target]
            layers[key] = str(chain.conv.target) if alone else _free_name(root, str(chain.conv.target), layers)
            conv: Any = layer_of(root, chain.conv)
            norm = layer_of(root, chain.norm) if chain.norm is not None else None
            planned.append((layers[key], FusedConv2d.from_layers(conv, norm, chain.activation_name)))
            parts = ["Conv2d", *(["BatchNorm2d"] if norm is not None else [])]
            parts += ["add"] if chain.add is not None else []
            parts += [chain.activation_name] if chain.activation is not None else []
            report.swapped.append(Entry(prefix + layers[key], " + ".join(parts), "fastconv.FusedConv2d"))
    for name, layer in planned:
        parent, _, leaf = name.rpartition(".")
        root.get_submodule(parent)._modules[leaf] = layer
    for chain, key in zip(chains, keys, strict=True):
        residual = chain.residual()
        arguments = (chain.conv.args[0],) if residual is None else (chain.conv.args[0], residual)
        with graph.inserting_before(chain.last):
            fused = graph.call_module(layers[key], arguments)
        chain.last.replace_all_uses_with(fused)
        for node in reversed(chain.nodes):
            graph.erase_node(node)


def _free_name(root: nn.Module, target: str, names: dict[Any, str]) -> str:
    parent = root.get_submodule(target.rpartition(".")[0])
    number = 1
    while f"{target}_fused{number}" in names.values() or hasattr(parent, f"{target.rpartition('.')[2]}_fused{number}"):
        number += 1
    return f"{target}_fused{number}"


class _Matcher:
    def __init__(self, root: nn.Module, prefix: str, report: ConversionReport) -> None:
        self.root, self.prefix, self.report = root, prefix, report

    def chain_from(self, node: fx.Node, taken: set[fx.Node]) -> Chain | None:
        """The longest chain that begins at ``node``; None if there is nothing to fold into it."""
        conv = layer_of(self.root, node)
        if conv is None or layer_type(conv) not in (nn.Conv2d, Conv2d):
            return None
        if has_hooks(conv):
            return self._leave(node, conv, "it has hooks")
        if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            return self._leave(node, conv, "it is called with other arguments than its input")
        chain = Chain(node, nodes=[node])
        steps: tuple[Callable[[Chain, fx.Node], bool], ...] = (self._take_norm, self._take_add, self._take_activation)
        for step in steps:
            follower = self._only_reader(chain, conv)
            if follower is None or follower in taken:
                break
            if step(chain, follower):
                chain.nodes.append(follower)
        if len(chain.nodes) == 1:
            return None
        weight: Any = conv.weight
        if weight.dtype not in DTYPES:
            return self._leave(node, conv, f"its weight is {weight.dtype}")
        if not self._is_undisturbed(chain):
            return self._leave(
                node, conv, "its input or the other addend is changed in place before the result is read"
            )
        return chain

    def _leave(self, node: fx.Node, layer: nn.Module, reason: str) -> Chain | None:
        """Notes why no chain goes through ``node``."""
        name = self.prefix + str(node.target)
        if not any(entry.name == name for entry in self.report.left):
            self.report.left.append(Entry(name, layer_type(layer).__name__, f"not fused: {reason}"))
        return None

    def _only_reader(self, chain: Chain, conv: nn.Module) -> fx.Node | None:
        readers = list(chain.last.users)
        if len(readers) == 1:
            return readers[0]
        if chain.last is chain.conv and any(self._is_norm(reader) for reader in readers):
            self._leave(chain.conv, conv, f"its output is read at {len(readers)} places")
        return None

    def _is_norm(self, node: fx.Node) -> bool:
        layer = layer_of(self.root, node)
        return layer is not None and type(layer) in BATCH_NORMS

    def _take_norm(self, chain: Chain, node: fx.Node) -> bool:
        if not self._is_norm(node):
            return False
        norm: Any = layer_of(self.root, node)
        conv: Any = layer_of(self.root, chain.conv)
        reason = None
        if norm.training:
            reason = "it is in training mode; call .eval()"
        elif norm.running_mean is None or norm.running_var is None:
            reason = "it has no running statistics and normalises by the batch's own"
        elif has_hooks(norm):
            reason = "it has hooks"
        elif node.args != (chain.last,) or norm.num_features != conv.out_channels:
            reason = "it does not fit the convolution before it"
        if reason is not None:
            self._leave(node, norm, reason)
            return False
        chain.norm = node
        return True

    def _take_add(self, chain: Chain, node: fx.Node) -> bool:
        functions = (operator.add, operator.iadd, torch.add)
        in_place = node.target in (operator.iadd, "add_")
        if not (node.op == "call_function" and node.target in functions) and not (
            node.op == "call_method" and node.target in ("add", "add_")
        ):
            return False
        if len(node.args) != 2 or any(name != "alpha" or value != 1 for name, value in node.kwargs.items()):
            return False
        first, second = node.args
        other = second if first is chain.last else first
        # Numbers stay outside; so does writing into the other addend, which others may hold.
        if not isinstance(other, fx.Node) or first is second or (in_place and first is not chain.last):
            return False
        chain.add = node
        return True

    def _take_activation(self, chain: Chain, node: fx.Node) -> bool:
        layer = layer_of(self.root, node)
        name: str | None = None
        if layer is not None:
            name = None if has_hooks(layer) else _ACTIVATION_LAYERS.get(type(layer))
            plain = not node.kwargs and len(node.args) == 1
        elif node.op == "call_function":
            name = _ACTIVATION_FUNCTIONS.get(node.target)
            plain = set(node.kwargs) <= {"inplace"} and 1 <= len(node.args) <= 2
        else:
            name = _ACTIVATION_METHODS.get(str(node.target)) if node.op == "call_method" else None
            plain = not node.kwargs and len(node.args) == 1
        if name is None or not plain or node.args[0] is not chain.last:
            return False
        chain.activation, chain.activation_name = node, name
        return True

    def _is_undisturbed(self, chain: Chain) -> bool:
        """True if the convolution's input, and from the addition on the other addend, are as they were at the end."""
        absorbed = set(chain.nodes)
        input, residual = chain.conv.args[0], chain.residual()
        assert isinstance(input, fx.Node)
        if self._is_written(input, _between(chain.conv, chain.last), absorbed):
            return False
        if residual is None or chain.add is None:
            return True
        return not self._is_written(residual, _between(chain.add, chain.last), absorbed)

    def _is_written(self, value: fx.Node, nodes: Iterator[fx.Node], absorbed: set[fx.Node]) -> bool:
        origins: set[fx.Node] | None = None
        for node in nodes:
            for written in self._written_by(node) if node not in absorbed else ():
                origins = self._origins(value) if origins is None else origins
                if origins & self._origins(written):
                    return True
        return False

    def _written_by(self, node: fx.Node) -> list[fx.Node]:
        return written_by(layer_of(self.root, node), node)

    def _origins(self, node: fx.Node) -> set[fx.Node]:
        """The nodes whose memory ``node`` may share, itself among them."""
        found: set[fx.Node] = set()
        pending = [node]
        while pending:
            current = pending.pop()
            if current in found:
                continue
            found.add(current)
            layer = layer_of(self.root, current)
            fresh = isinstance(layer, _FRESH_LAYERS) or (
                current.op == "call_function" and current.target in _FRESH_FUNCTIONS
            )
            if not fresh or self._written_by(current):
                pending += current.all_input_nodes
        return found


def written_by(layer: nn.Module | None, node: fx.Node) -> list[fx.Node]:
    """The arguments that ``node`` changes, or may change."""
    if layer is not None:
        own = type(layer).__module__
        if own.startswith(("torch.nn.", "fastconv.")):
            return list(node.all_input_nodes[:1]) if getattr(layer, "inplace", False) else []
        return list(node.all_input_nodes)
    if node.op == "call_method":
        name = str(node.target)
        return list(node.all_input_nodes[:1]) if name.endswith("_") and name != "__getitem__" else []
    if node.op != "call_function":
        return []
    function: Any = node.target
    home = getattr(function, "__module__", None) or "torch"
    if not home.startswith(("torch", "fastconv", "_operator", "operator", "builtins", "math")):
        return list(node.all_input_nodes)
    flagged = any(argument is True for argument in (*node.args[1:], node.kwargs.get("inplace"))) or "out" in node.kwargs
    written = flagged or function in IN_PLACE_OPERATORS.values() or getattr(function, "__name__", "").endswith("_")
    return list(node.all_input_nodes) if written else []


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    node = first
    while node is not last:
        if node is not first:
            yield node
        node = node.next
