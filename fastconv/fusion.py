"""Models for inference: convolution, batch normalisation, addition and activation as one kernel call each."""

from __future__ import annotations

import contextlib
import functools
import inspect
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY

from fastconv._graph_fusion import IN_PLACE_OPERATORS, fuse_graph, layer_of
from fastconv._module_copy import copy_structure, layer_type, opaque_reason, own_tensors
from fastconv._network import FusedGraph
from fastconv._packed import packed_weight
from fastconv._report import ConversionReport, Entry, attach
from fastconv.convert import TO_FASTCONV, exchange_layer, named_layers, require_model
from fastconv.fused import BATCH_NORMS, ConvBNReLU2d, FusedConv2d, activation_name, has_hooks
from fastconv.layers import Conv2d

__all__ = ["fuse"]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def fuse(model: nn.Module) -> nn.Module:
    """A copy of ``model`` for inference, with its convolutions fused with what follows them.

    A convolution, the batch normalisation after it, an addition (of a residual branch) and ReLU, ReLU6 or tanh become
    one :class:`fastconv.fused.FusedConv2d`, whose frozen weight holds the normalisation, folded in float32 or wider.
    Other layers are exchanged as by :func:`fastconv.convert`.

    The model's ``forward`` is traced by torch.fx: its optional arguments are fixed at their defaults, and the result is
    a ``torch.fx.GraphModule``. A part that cannot be traced (it branches on values, or draws random numbers) keeps its
    ``forward``; inside it the children are fused one by one, an ``nn.Sequential`` as a run of layers that is taken to
    be called as a whole.

    In plain inference on the CPU (no gradients wanted, no hooks, no tracing) neighbouring layers that have kernels run
    as one native call, channels_last inside whatever the caller's layout, with what lies between them in memory that
    the model keeps for the next call. The weights of these layers are kept in the form that their kernels read, 64 MiB
    a layer at most: 3x3 layers transformed (Winograd), two to four times their size, others in panels, of their size
    in float32. All of it is made at the first call that has a use for it, and again after a weight or a layer was
    replaced, loaded, cast or written to by an operator in place. Writing that does not count up the weight's version
    (``weight.data``, ``weight.numpy()``) is not noticed; call ``model.train().eval()`` after it, which drops what is
    kept.

    Args:
        model: a module in eval mode; it is not changed.

    Returns:
        The fused model; its ``fastconv_report`` (:func:`fastconv.conversion_report`) says what became of each layer.

    Raises:
        RuntimeError: if ``model`` is in training mode.
        TypeError: if ``model`` is no module, or one compiled by torch.jit or torch.compile.
    """
    require_model("fuse", model)
    if model.training:
        raise RuntimeError(
            "fastconv.fuse: the model is in training mode, where batch normalisation uses the statistics of each "
            "batch, which cannot be folded into weights; expected eval mode, call model.eval() first"
        )
    # Tensors made in inference mode count no versions, so that nothing could be kept of them.
    with torch.inference_mode(False), torch.no_grad():
        return _fuse(model)


def _fuse(model: nn.Module) -> nn.Module:
    report = ConversionReport("fuse")
    root = copy_structure(model)[id(model)]
    own_tensors(root)
    result = _Fuser(report).fuse(root, "")
    for name, module in named_layers(result):
        exchange_layer(report, TO_FASTCONV, name, module, module)
    for module in result.modules():
        if isinstance(module, FusedConv2d):
            module.packed = packed_weight(module)
    attach(result, report)
    if isinstance(result, fx.GraphModule):
        result.meta[_USER_PRESERVED_ATTRIBUTES_KEY]["fastconv_report"] = report
    return result


class _Proxy(fx.Proxy):
    """Records ``x += y`` and ``x[i] = y`` as they are; fx makes ``x = x + y`` of the first and refuses the other."""

    def _write(self, function: Callable[..., Any], *operands: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, *operands), {})


for _name, _function in IN_PLACE_OPERATORS.items():
    setattr(_Proxy, f"__{_name}__", functools.partialmethod(_Proxy._write, _function))


class _Tracer(fx.Tracer):
    """Goes into every module but layers, modules that someone watches, and those known to resist."""

    # Otherwise an update of a buffer would be carried out while tracing, on the original's buffer.
    proxy_buffer_attributes = True

    def __init__(self, resisting: frozenset[nn.Module] = frozenset()) -> None:
        super().__init__()
        self.resisting = resisting
        self.failed_in: list[nn.Module] = []  # from the innermost outwards

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m in self.resisting or opaque_reason(m) is not None or has_hooks(m) or is_layer(m):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed_in.append(m)
            raise


def is_layer(module: nn.Module) -> bool:
    """True for single layers, as against modules made of others."""
    return isinstance(module, (*TO_FASTCONV, FusedConv2d))


class _Fuser:
    """Works in place on a copy of the model."""

    def __init__(self, report: ConversionReport) -> None:
        self.report = report
        self.done: dict[int, nn.Module] = {}

    def fuse(self, module: nn.Module, path: str) -> nn.Module:
        """What takes the place of ``module``; a module used at several places is treated once."""
        if id(module) not in self.done:
            self.done[id(module)] = module  # a cycle ends here
            self.done[id(module)] = self._fuse(module, path)
        return self.done[id(module)]

    def _fuse(self, module: nn.Module, path: str) -> nn.Module:
        if opaque_reason(module) is not None or is_layer(module) or not module._modules:
            return module
        if path and type(module).__module__.startswith("torch.nn.") and not isinstance(module, _CONTAINERS):
            return module
        if type(module) is ConvBNReLU2d and not has_hooks(module):
            names = [f"{path}.{name}".lstrip(".") for name in ("conv", "bn", "activation")]
            folded = self._fuse_run([module.conv, module.bn, module.activation], names)
            if isinstance(folded[2], nn.Identity) and isinstance(folded[0], FusedConv2d):
                return folded[0]
        if path and isinstance(module, _CONTAINERS):
            return self._fuse_children(module, path)
        resisting: frozenset[nn.Module] = frozenset()
        while True:
            tracer = _Tracer(resisting)
            try:
                graph = self._trace(tracer, module)
            except Exception as error:  # anything may be raised by a forward that is given proxies
                parts = set(module.modules())
                candidates = (m for m in tracer.failed_in if m in parts and not tracer.is_leaf_module(m, ""))
                culprit = next(candidates, None)
                if culprit is None:
                    reason = f"torch.fx cannot trace it ({_first_line(error)}); its children are fused one by one"
                    self.report.left.append(Entry(path, type(module).__name__, reason))
                    return self._fuse_children(module, path)
                resisting |= {culprit}  # its turn comes when what is around it has been traced
            else:
                return self._rewrite(module, graph, path)

    def _trace(self, tracer: _Tracer, module: nn.Module) -> fx.Graph:
        if "forward" in module.__dict__:
            raise TypeError("forward is replaced on the object itself")
        simple = (type(None), bool, int, float, str)
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(module.forward).parameters.items()
            if parameter.default is not inspect.Parameter.empty and isinstance(parameter.default, simple)
        }
        with _without_side_effects(module):
            graph = tracer.trace(module, concrete_args=defaults or None)
        for node in graph.nodes:
            if node.op == "placeholder" and str(node.target)[:-2] in defaults and str(node.target).endswith("_1"):
                node.target = str(node.target)[:-2]  # the tracer numbers fixed arguments; callers use their names
        return graph

    def _rewrite(self, module: nn.Module, graph: fx.Graph, path: str) -> nn.Module:
        prefix = f"{path}." if path else ""
        for node in graph.nodes:
            layer = layer_of(module, node)
            if layer is not None:
                fused = self.fuse(layer, prefix + str(node.target))
                if fused is not layer:
                    parent, _, name = str(node.target).rpartition(".")
                    module.get_submodule(parent)._modules[name] = fused
        fuse_graph(module, graph, prefix, self.report)
        result = FusedGraph(module, graph, type(module).__name__)
        for name, part in result.named_modules():
            original = module.get_submodule(name)  # fx makes every buffer persistent
            part._non_persistent_buffers_set = original._non_persistent_buffers_set & set(part._buffers)
        # What else the module carries: hooks and plain attributes.
        kept = {
            name: value
            for name, value in module.__dict__.items()
            if name not in result.__dict__ and not isinstance(value, (Tensor, nn.Module))
        }
        result.__dict__.update(kept)
        result.__dict__.update({name: value for name, value in module.__dict__.items() if "_hook" in name})
        result.meta[_USER_PRESERVED_ATTRIBUTES_KEY] = kept
        return result

    def _fuse_children(self, module: nn.Module, path: str) -> nn.Module:
        prefix = f"{path}." if path else ""
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            names = list(module._modules)
            layers = [child for child in module._modules.values() if child is not None]
            if len(layers) == len(names):
                fused = self._fuse_run(layers, [prefix + name for name in names])
                module._modules.update(zip(names, fused, strict=True))
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = self.fuse(child, prefix + name)
        return module

    def _fuse_run(self, layers: list[nn.Module], names: list[str]) -> list[nn.Module]:
        """Folds within layers that are called one after the other; what was folded away leaves an Identity behind."""
        result = list(layers)
        for index, conv in enumerate(layers):
            if layer_type(conv) not in (nn.Conv2d, Conv2d) or has_hooks(conv) or result[index] is not conv:
                continue
            followers = layers[index + 1 : index + 3]
            norm = followers.pop(0) if followers and _is_foldable(followers[0], conv) else None
            name = activation_name(followers[0]) if followers and not has_hooks(followers[0]) else None
            if norm is None and name in (None, "none"):
                continue
            assert isinstance(conv, nn.Conv2d)
            result[index] = FusedConv2d.from_layers(conv, norm, name or "none")
            end = index + 1 + (norm is not None) + (name is not None)
            result[index + 1 : end] = [nn.Identity() for _ in range(index + 1, end)]
            parts = ["Conv2d", *(["BatchNorm2d"] if norm is not None else []), *([name] if name else [])]
            self.report.swapped.append(Entry(names[index], " + ".join(parts), "fastconv.FusedConv2d"))
        return result


def _is_foldable(norm: Any, conv: Any) -> bool:
    return (
        type(norm) in BATCH_NORMS
        and not norm.training
        and norm.running_mean is not None
        and norm.running_var is not None
        and not has_hooks(norm)
        and norm.num_features == conv.out_channels
    )


@contextlib.contextmanager
def _without_side_effects(module: nn.Module) -> Iterator[None]:
    """Undoes what a traced forward did outside its graph; raises if the graph would miss it."""
    parts = [(part, dict(part.__dict__), dict(part._buffers)) for part in module.modules()]
    assigned = []
    with torch.random.fork_rng(devices=[]):
        states = (torch.get_rng_state(), random.getstate())
        try:
            yield
        finally:
            drawn = not torch.equal(torch.get_rng_state(), states[0]) or random.getstate() != states[1]
            random.setstate(states[1])
            for part, attributes, buffers in parts:
                assigned += [name for name, value in buffers.items() if part._buffers.get(name) is not value]
                part._buffers.update(buffers)
                # What forward kept in its module were proxies.
                part.__dict__.clear()
                part.__dict__.update(attributes)
    if drawn:
        raise RuntimeError("its forward draws random numbers, which tracing would fix")
    if assigned:
        raise RuntimeError(f"its forward assigns the buffer {assigned[0]}, which tracing would miss")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:120] or type(error).__name__
