"""What a fused forward no longer calls, and how it notices that some of it has changed since.

The engine reads convolutions, norms, dropouts and excitations from the module at every call. But an activation, an
identity, a container whose code was inlined, and every plain setting that the traced code has seen are constants of
the generated forward. So it asks first whether they are still as they were: no hook has been added, to them or to all
modules (as ``torch.nn.modules.module.register_module_forward_hook`` does), nothing was replaced, no setting changed.
Where they are not, the stock forward runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from ..binding import is_norm_act
from ..block import Block, Dense, Norm, Step
from .steps import paths
from .view import Region

__all__ = ["Watched", "changed", "watch"]

_LITERALS = (bool, int, float, str, type(None))


class Watched(NamedTuple):
    """A module as it was.

    Attributes:
        names: the way to it; empty for the fused module itself.
        kind: its class.
        children: how many it had.
        settings: its public attributes that are plain values.
    """

    names: tuple[str, ...]
    kind: type
    children: int
    settings: tuple[tuple[str, Any], ...]


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
    return tuple(_watched(path, module.get_submodule(path)) for path in sorted(found))


def _steps(region: Region) -> list[Step]:
    if isinstance(region.block, Block):
        return [*region.block.branch, *(region.block.shortcut or ())]
    return [step for layer in region.block.layers for step in layer] if isinstance(region.block, Dense) else []


def _watched(path: str, module: nn.Module) -> Watched:
    settings = tuple((k, v) for k, v in module.__dict__.items() if not k.startswith("_") and _is_plain(v))
    names = tuple(path.split(".")) if path else ()
    return Watched(names, type(module), len(module._modules), tuple(s for s in settings if s[0] != "training"))


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
    for names, kind, children, settings in watched:
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
                if state[name] != value:
                    return True
        except (KeyError, AttributeError):  # a child or a setting that is gone, or a child that is now None
            return True
    return False
