"""``torch.compile``: in inference with the weights frozen, which is its fastest form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from ...patch import patch
from .base import Peer

__all__ = ["Compiled"]

_FROZEN = {"freezing": True}


class Compiled(Peer):
    """The compiler's default, or another of its modes; on the stock network, or on the patched one."""

    def __init__(self, mode: str | None = None, *, patched: bool = False) -> None:
        self._mode = mode
        self._patched = patched
        self._hits = 0
        self.foreign = not patched
        self.name = ", ".join((*["fusedres"] * patched, "torch.compile", *[mode] * (mode is not None)))
        self.seconds = (75.0, 30.0) if mode is None else (180.0, 90.0)
        self.schedule = "inductor" if mode is None and not patched else None

    def prepare(self, model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
        self._hits = _cache_hits()
        if self._patched:
            patch(model)
        return torch.compile(model, options=self._settings(model.training, example))

    def _settings(self, training: bool, example: Tensor) -> dict[str, Any] | None:
        # A mode and options exclude each other, so a mode is given as what it stands for.
        mode = {} if self._mode is None else torch._inductor.list_mode_options(self._mode)
        frozen = {} if training else _FROZEN
        return {**mode, **frozen} or None

    def cached(self) -> bool:
        return _cache_hits() > self._hits


def _cache_hits() -> int:
    return counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
