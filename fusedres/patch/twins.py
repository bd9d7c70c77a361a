"""Modules that trace alike: a deep network repeats its blocks, and one trace does for all that are the same.

The same are modules that hold the same, down to every attribute of every submodule, but for the values of parameters,
and of what PyTorch's own layers and norms keep, which no trace depends on. What is not known to be equal by its value
is the same only where it is one object.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .modules import is_builtin, is_norm

if TYPE_CHECKING:
    from .trace import Traced

__all__ = ["Twins"]

_VALUES = (bool, int, str, bytes, type(None), torch.dtype, torch.device, torch.memory_format)
_CONTENTS = ("_parameters", "_buffers", "_modules")

Key = tuple[Hashable, ...]


class Twins:
    """The traces of one model's modules, which must stay as they are meanwhile; see :func:`fusedres.patch.patch`."""

    def __init__(self, model: nn.Module) -> None:
        self._classes = Counter(map(type, model.modules()))
        self._own: dict[nn.Module, Key] = {}
        self._whole: dict[nn.Module, Key] = {}
        self._traces: dict[Key, tuple[Traced, dict[nn.Module, str]]] = {}

    def key(self, module: nn.Module, inline: Callable[[nn.Module], bool], training: bool) -> Key | None:
        """What a trace of ``module`` depends on; ``None`` where there is no other of its class."""
        if self._classes[type(module)] < 2:
            return None
        if module not in self._whole:
            self._whole[module] = self._of(module)
        inlined = tuple(inline(child) for child in module.modules() if child is not module)
        return training, inlined, self._whole[module]

    def find(self, key: Key | None, module: nn.Module) -> Traced | None:
        """The trace of a module of this key as one of ``module``."""
        if key is None or key not in self._traces:
            return None
        traced, paths = self._traces[key]
        mine = {child: module.get_submodule(path) for child, path in paths.items()}
        return replace(
            traced,
            graph=copy.deepcopy(traced.graph),
            inlined=frozenset(mine[child] for child in traced.inlined),
            given={mine[child]: tensors for child, tensors in traced.given.items()},
        )

    def keep(self, key: Key | None, module: nn.Module, traced: Traced) -> None:
        """Keeps a trace, of which graphs are rewritten, for others of this key."""
        if key is not None:
            paths = {child: path for path, child in module.named_modules()}
            self._traces[key] = replace(traced, graph=copy.deepcopy(traced.graph)), paths

    def _of(self, module: nn.Module) -> Key:
        first: dict[nn.Module, str] = {}
        return tuple(
            (path, first.setdefault(child, path), self._own_of(child))
            for path, child in module.named_modules(remove_duplicate=False)
        )

    def _own_of(self, module: nn.Module) -> Key:
        if module not in self._own:
            attributes = ((name, _likeness(value)) for name, value in module.__dict__.items() if name not in _CONTENTS)
            parameters = ((name, _shape(p)) for name, p in module._parameters.items())
            opaque = is_builtin(module) or is_norm(module)
            buffers = ((name, _shape(b) if opaque else id(b)) for name, b in module._buffers.items())
            self._own[module] = (type(module), *attributes, *parameters, *buffers)
        return self._own[module]


def _shape(t: torch.Tensor | None) -> Key | None:
    return None if t is None else (type(t), tuple(t.shape), t.dtype, t.device, t.requires_grad)


def _likeness(value: Any) -> Hashable:
    """Equal for what is surely equal; the model keeps alive what it is that stands for itself."""
    kind = type(value)
    if kind in _VALUES:
        return kind, value
    if kind is float:
        return kind, value.hex()  # which tells 0.0 from -0.0
    if kind in (tuple, list, torch.Size):
        return kind, tuple(map(_likeness, value))
    if kind in (set, frozenset):
        return kind, frozenset(map(_likeness, value))
    if isinstance(value, dict):
        return kind, tuple((_likeness(k), _likeness(v)) for k, v in value.items())
    return kind, id(value)
