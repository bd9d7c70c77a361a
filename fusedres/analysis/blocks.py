"""Which modules of a network are its blocks: what the analyses report by."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["blocks_of"]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def blocks_of(model: nn.Module, kinds: tuple[type[nn.Module], ...] | None = None) -> dict[str, nn.Module]:
    """The blocks of a network by path, in the order of ``named_modules``.

    Without ``kinds``, a block is a smallest module of a class of its own (not a ``Sequential`` or a list) with at
    least two convolutions and a batch norm below it, the network itself aside. That is the residual block of every
    network here, patched or not, and also the pair of convolutions of a plain one. A model that has no such module is
    one block itself, at the path ``""``.

    Args:
        kinds: classes whose instances are the blocks instead, the outermost where they are nested.

    Raises:
        ValueError: where ``kinds`` are given and the model has none of them.
    """
    if kinds is not None:
        found = _outermost({path: m for path, m in model.named_modules() if isinstance(m, kinds)})
        if not found:
            raise ValueError(f"the model has no {' or '.join(kind.__name__ for kind in kinds)}")
        return found
    candidates = {path: m for path, m in model.named_modules() if path and _is_candidate(m)}
    smallest = {
        path: m for path, m in candidates.items() if not any(other.startswith(f"{path}.") for other in candidates)
    }
    return smallest or {"": model}


def _is_candidate(module: nn.Module) -> bool:
    if isinstance(module, _CONTAINERS):
        return False
    below = list(module.modules())
    convolutions = sum(isinstance(m, nn.Conv2d) for m in below)
    return convolutions >= 2 and any(isinstance(m, _BatchNorm) for m in below)


def _outermost(found: dict[str, nn.Module]) -> dict[str, nn.Module]:
    def inside(path: str) -> bool:
        return any(other != path and (not other or path.startswith(f"{other}.")) for other in found)

    return {path: m for path, m in found.items() if not inside(path)}
