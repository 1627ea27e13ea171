"""A copy of a model's modules that shares its parameters and buffers, and the exchange of a module's class."""

from __future__ import annotations

import copy
import functools
from types import MethodType
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

# The dictionaries that every module has: children, parameters, buffers, hooks.
_INTERNALS = frozenset(name for name, value in nn.Module().__dict__.items() if isinstance(value, (dict, set)))
_TENSORS_AND_CHILDREN = frozenset({"_parameters", "_buffers", "_modules"})


def opaque_reason(module: nn.Module) -> str | None:
    """Why the layers inside ``module`` cannot be exchanged, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by torch.jit; work on the Python model, then script or trace it"
    if isinstance(module, torch._dynamo.OptimizedModule):
        return "compiled by torch.compile; work on the Python model, then compile it"
    return None


def is_uninitialised(module: nn.Module) -> bool:
    """True for a lazy module that has seen no batch yet: its hooks hold handles on themselves, so it has no copy."""
    return isinstance(module, LazyModuleMixin) and bool(module.has_uninitialized_params())


def is_class_own(module: nn.Module) -> bool:
    """True if the class of ``module`` was made for this one object, as parametrize does."""
    return parametrize.is_parametrized(module) and "parametrizations" in module._modules


def layer_type(module: nn.Module) -> type[nn.Module]:
    """The class of ``module``, seen through parametrizations."""
    found = type(module)
    return found.__bases__[0] if is_class_own(module) else found


def set_layer_type(module: nn.Module, new: type[nn.Module]) -> None:
    """Makes ``module`` a ``new``, keeping its parametrizations."""
    if is_class_own(module):
        own = type(module)
        contents = {name: value for name, value in vars(own).items() if name not in ("__dict__", "__weakref__")}
        new = type(f"Parametrized{new.__name__}", (new,), contents)
    module.__class__ = new


def copy_structure(model: nn.Module) -> dict[int, nn.Module]:
    """New modules in place of those of ``model``, which keeps its own; parameters and buffers are the same objects.

    A module that is used at several places is copied once. Attributes, hooks and bound methods that refer to modules of
    ``model`` refer to their copies; what a closure holds is not seen. Compiled modules are shared, and lazy ones that
    have seen no batch.

    Returns:
        The copy of each module, by the ``id`` of the original.
    """
    copies: dict[int, nn.Module] = {}
    _copy(model, copies)
    for original, twin in copies.items():
        if id(twin) != original:
            for name, value in twin.__dict__.items():
                if name not in _TENSORS_AND_CHILDREN:
                    twin.__dict__[name] = _redirect(value, copies)
    return copies


def _copy(module: nn.Module, copies: dict[int, nn.Module]) -> nn.Module:
    known = copies.get(id(module))
    if known is not None:
        return known
    if opaque_reason(module) is not None or is_uninitialised(module):
        copies[id(module)] = module
        return module
    twin: nn.Module
    if isinstance(module, fx.GraphModule):
        own = type(module).__bases__[0]  # torch makes a class for each GraphModule
        twin = own(module, copy.deepcopy(module.graph), type(module).__name__)
    else:
        twin = object.__new__(type(module))
    copies[id(module)] = twin
    for name, value in module.__dict__.items():
        if name not in ("_graph", "_code", "_compiled_call_impl", "_networks"):
            twin.__dict__[name] = copy.copy(value) if name in _INTERNALS else value
    if is_class_own(module):
        set_layer_type(twin, layer_type(module))
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else _copy(child, copies)
    return twin


def own_tensors(model: nn.Module) -> None:
    """Gives ``model``, a copy, parameters and buffers of its own on the same memory: to cast or freeze it leaves the
    original as it was. A tensor that is used at several places stays one. Special kinds of parameters are shared, those
    made in inference mode are copied."""
    owned: dict[int, Any] = {}
    for module in model.modules():
        if opaque_reason(module) is not None or is_uninitialised(module):
            continue
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if type(tensor) is nn.Parameter and id(tensor) not in owned:
                    owned[id(tensor)] = nn.Parameter(_detached(tensor), tensor.requires_grad)
                elif type(tensor) is torch.Tensor and id(tensor) not in owned:
                    owned[id(tensor)] = _detached(tensor)
                if tensor is not None:
                    tensors[name] = owned.get(id(tensor), tensor)


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    result = tensor.detach()
    # Outside of inference mode nothing that was made in it can be trained, or shared with what can.
    return result.clone() if result.is_inference() and not torch.is_inference_mode_enabled() else result


def _redirect(value: Any, copies: dict[int, nn.Module], outer: frozenset[int] = frozenset()) -> Any:
    """``value`` with the copies in place of the modules it refers to; the same object if it refers to none.

    ``outer`` are the containers that ``value`` is in: one that contains itself ends there.
    """
    if isinstance(value, nn.Module):
        return copies.get(id(value), value)
    if isinstance(value, MethodType):
        owner = copies.get(id(value.__self__))
        return value if owner is None else MethodType(value.__func__, owner)
    if type(value) is functools.partial:
        parts = (value.func, value.args, value.keywords)
        function, arguments, keywords = (_redirect(part, copies, outer) for part in parts)
        unchanged = function is value.func and arguments is value.args and keywords is value.keywords
        return value if unchanged else functools.partial(function, *arguments, **keywords)
    if id(value) in outer:
        return value
    outer = outer | {id(value)}
    if type(value) in (list, tuple):
        items = [_redirect(item, copies, outer) for item in value]
        same = all(new is old for new, old in zip(items, value, strict=True))
        return value if same else type(value)(items)
    if isinstance(value, dict) and type(value).__module__ in ("builtins", "collections"):
        changed = {key: _redirect(item, copies, outer) for key, item in value.items()}
        if any(changed[key] is not item for key, item in value.items()):
            twin = copy.copy(value)
            twin.update(changed)
            return twin
    return value
