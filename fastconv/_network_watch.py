"""What a network's programs were made from, and whether it is still so."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

from torch import Tensor, fx, nn

from fastconv._packed import PackedWeight

_PLAIN = (bool, int, float, str, tuple, list, type(None))


class Watch:
    """Layers, where they are in the model, their hooks and settings, and their tensors.

    Not seen is what changes neither the identity, the address nor the version of a tensor (``weight.data.mul_``).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.places: dict[tuple[int, str], tuple[dict[str, Any], str, nn.Module]] = {}
        self.layers: list[tuple[nn.Module, dict[str, Any], int, Callable[[Any], Any], Any]] = []
        self.packed: list[tuple[PackedWeight, int]] = []
        self.tensors: list[tuple[dict[str, Any], str, Tensor, int, int, bool]] = []

    def add(self, node: fx.Node, layer: nn.Module, packed: PackedWeight) -> None:
        parent = self.model
        for name in str(node.target).split("."):
            child = parent._modules[name]
            assert child is not None
            self.places[id(parent), name] = (parent._modules, name, child)
            parent = child
        attributes = layer.__dict__
        names = [key for key, value in attributes.items() if key[0] != "_" and isinstance(value, _PLAIN)]
        settings = itemgetter(*names)  # training is one of them
        self.layers.append((layer, attributes, len(attributes), settings, settings(attributes)))
        self.packed.append((packed, packed.cleared))
        for kept in (layer._parameters, layer._buffers):
            for key, tensor in kept.items():
                if tensor is not None:
                    state = tensor._version, tensor.data_ptr(), tensor.requires_grad
                    self.tensors.append((kept, key, tensor, *state))

    def is_current(self) -> bool:
        for modules, name, module in self.places.values():
            if modules.get(name) is not module:
                return False
        try:
            for layer, attributes, count, settings, values in self.layers:
                # A forward of the object's own is one attribute more.
                if len(attributes) != count or settings(attributes) != values:
                    return False
                if layer._forward_hooks or layer._forward_pre_hooks:
                    return False
        except KeyError:  # a setting was deleted
            return False
        for packed, cleared in self.packed:
            if packed.cleared != cleared:
                return False
        for kept, key, tensor, version, address, trains in self.tensors:
            if kept.get(key) is not tensor or tensor._version != version or tensor.data_ptr() != address:
                return False
            if tensor.requires_grad != trains:
                return False
        return True
