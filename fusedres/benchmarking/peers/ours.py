"""This library."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ...patch import patch
from .base import Peer

__all__ = ["Fusedres"]


class Fusedres(Peer):
    """The network patched, with a setting of ``memory``, on a backend of its choice or a given one."""

    foreign = False
    schedule = "fused"

    def __init__(self, memory: str = "auto", backend: str = "auto") -> None:
        self._options = {"memory": memory, "backend": backend}
        set_by_hand = [f'{key}="{value}"' for key, value in self._options.items() if value != "auto"]
        self.name = ", ".join(["fusedres", *set_by_hand])
        self.infers = memory == "auto"  # the other setting is about what training keeps
        self.schedule = "fused" if not set_by_hand else None

    def prepare(self, model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
        patch(model, **self._options)
        return model
