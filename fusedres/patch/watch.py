"""What a fused forward no longer calls, and how it notices that some of it has changed since.

The engine reads convolutions, norms, dropouts and excitations from the module at every call. But an activation, an
identity, a container whose code was inlined, and every setting that the traced code has seen are constants of the
generated forward. So it asks first whether they are still as they were: no hook has been added, to them or to all
modules (as ``torch.nn.modules.module.register_module_forward_hook`` does), nothing was replaced, no setting changed.
Where they are not, the stock forward runs.

Settings are public attributes that are plain values; and, of what the traced code names, private ones too, functions,
and the plain values in a list, a dictionary or an object of the user's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from ..binding import is_norm_act
from ..block import Block, Dense, Norm, Step
from .source import named_in
from .steps import paths
from .stores import attributes_of
from .view import Region

__all__ = ["Watched", "changed", "watch"]

_LITERALS = (bool, int, float, str, type(None))
_FUNCTIONS = (FunctionType, BuiltinFunctionType, type)  # a copy of a module holds the very same
_MOST_ITEMS = 64
_OF_ANY_MODULE = frozenset(nn.Module().__dict__)
_ABSENT = object()


class Held(NamedTuple):
    """What a list, a dictionary or an object held that is an attribute of a module.

    Attributes:
        name: the attribute.
        kind: its class.
        length: how many items it had; ``None`` for an object, which may have others.
        items: the plain ones, behind their keys or indices.
    """

    name: str
    kind: type
    length: int | None
    items: tuple[tuple[Any, Any], ...]


class Watched(NamedTuple):
    """A module as it was.

    Attributes:
        names: the way to it; empty for the fused module itself.
        kind: its class.
        children: how many it had.
        settings: its attributes that are plain values or functions.
        held: its attributes that hold plain values.
        inherited: the names of its class's attributes that it might get as its own.
    """

    names: tuple[str, ...]
    kind: type
    children: int
    settings: tuple[tuple[str, Any], ...]
    held: tuple[Held, ...]
    inherited: tuple[str, ...]


def watch(module: nn.Module, regions: Iterable[Region], inlined: Iterable[str]) -> tuple[Watched, ...]:
    """What the forward of ``module`` must watch.

    Args:
        inlined: the paths of the submodules whose code it holds.
    """
    found = {"", *inlined}
    for region in regions:
        steps = _steps(region)
        read = {path for step in steps for path in paths(step)}
        found |= {node.target for node in region.nodes if node.op == "call_module"} - read
        norms = [step.path for step in steps if isinstance(step, Norm)]
        found |= {
            f"{p}.{name}" for p in norms if is_norm_act(type(module.get_submodule(p))) for name in ("drop", "act")
        }
    named = frozenset().union(*(named_in(type(module.get_submodule(path))) for path in ("", *inlined)))
    return tuple(_watched(path, module.get_submodule(path), named) for path in sorted(found))


def _steps(region: Region) -> list[Step]:
    if isinstance(region.block, Block):
        return [*region.block.branch, *(region.block.shortcut or ())]
    return [step for layer in region.block.layers for step in layer] if isinstance(region.block, Dense) else []


def _watched(path: str, module: nn.Module, named: frozenset[str]) -> Watched:
    """
    Args:
        named: the names in the code that the generated forward holds.
    """
    own = {k: v for k, v in module.__dict__.items() if k not in _OF_ANY_MODULE}
    settings = tuple((k, v) for k, v in own.items() if _is_plain(v) and (k in named or not k.startswith("_")))
    functions = tuple((k, v) for k, v in own.items() if k in named and isinstance(v, _FUNCTIONS))
    held = tuple(h for k, v in own.items() if k in named and (h := _held(k, v, named)) is not None)
    names = tuple(path.split(".")) if path else ()
    return Watched(
        names, type(module), len(module._modules), settings + functions, held, _inherited(type(module), own, named)
    )


def _held(name: str, value: Any, named: frozenset[str]) -> Held | None:
    length: int | None = None
    if type(value) is list and len(value) <= _MOST_ITEMS:
        length, items = len(value), enumerate(value)
    elif type(value) in (dict, OrderedDict) and len(value) <= _MOST_ITEMS:
        length, items = len(value), value.items()
    elif (attributes := attributes_of(value)) is not None:
        items = ((k, v) for k, v in attributes.items() if k in named)
    else:
        return None
    return Held(name, type(value), length, tuple((k, v) for k, v in items if _is_plain(v) or isinstance(v, _FUNCTIONS)))


def _inherited(cls: type, own: Collection[str], named: frozenset[str]) -> tuple[str, ...]:
    absent = (n for n in named if n not in own and hasattr(cls, n) and not hasattr(nn.Module, n))
    return tuple(sorted(n for n in absent if not isinstance(getattr(cls, n), property)))  # which no instance can hide


def _is_plain(value: Any) -> bool:
    if type(value) is tuple:
        return all(type(v) in _LITERALS for v in value)
    return type(value) in _LITERALS


def changed(root: nn.Module, watched: tuple[Watched, ...]) -> bool:
    """Whether any of ``watched`` below ``root`` is not as it was.

    Compilers follow this and guard what it reads. Exporters, which see stock ops anyway, get the stock forward's.
    """
    compiling = torch.compiler.is_compiling()
    if (compiling and torch.compiler.is_exporting()) or _has_any_global_hook():
        return True
    # Without a call where there is a way: this runs before every block, and counts where inputs are small.
    for names, kind, children, settings, held, inherited in watched:
        module = root
        try:
            for name in names:
                module = module._modules[name]
            state = module.__dict__
            if names and (
                type(module) is not kind
                or "forward" in state
                or (compiling and not callable(module.forward))  # guarded where it is read by its name
                or state["_forward_hooks"]
                or state["_forward_pre_hooks"]
                or state["_backward_hooks"]
                or state["_backward_pre_hooks"]
            ):
                return True
            if len(state["_modules"]) != children:
                return True
            for name, value in settings:
                setting = state[name]
                if type(setting) is not type(value) or setting != value:  # of a tensor, != decides nothing
                    return True
            if held and _is_other(state, held):
                return True
            for name in inherited:
                if name in state or (compiling and getattr(module, name) is _ABSENT):  # a read is guarded, too
                    return True
        except (LookupError, AttributeError):  # a child or a setting that is gone, or a child that is now None
            return True
    return False


def _is_other(state: dict[str, Any], held: tuple[Held, ...]) -> bool:
    for name, kind, length, items in held:
        holder = state[name]
        if type(holder) is not kind:
            return True
        if length is None:
            holder = holder.__dict__
        elif len(holder) != length:
            return True
        for key, value in items:
            if holder[key] != value:
                return True
    return False
