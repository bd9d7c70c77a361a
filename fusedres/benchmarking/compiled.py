"""``torch.compile`` as a contestant: it may fail, and it may not fit in the time that is left."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

__all__ = ["CompileBudget", "Compiled", "compile_contestant"]

_COLD_SECONDS = {True: 75.0, False: 30.0}
"""About what ResNet-50 takes on two cores with cold caches, by whether it is the training step."""


@dataclass(frozen=True)
class Compiled:
    """A compiled contestant, or why there is none.

    Attributes:
        step: one step; ``None`` where it is missing.
        first_step: seconds that the first step took, compilation included.
        cached: whether the compiler found its work on disk.
        missing: why there is no step, in words.
    """

    step: Callable[[], Any] | None = None
    first_step: float | None = None
    cached: bool = False
    missing: str = ""


class CompileBudget:
    """Decides whether another compilation fits in the time that is left.

    Args:
        deadline: on the clock of ``perf_counter``; infinity for no limit, minus infinity to compile nothing.
        reserve: seconds that everything else still needs.
    """

    def __init__(self, deadline: float, reserve: float = 0.0) -> None:
        self._deadline = deadline
        self._reserve = reserve
        self._scale = 1.0

    def refuses(self, training: bool) -> str | None:
        """``None`` where a compilation fits, else why not, in words."""
        if self._deadline == float("-inf"):
            return "not asked for"
        left = self._deadline - self._reserve - perf_counter()
        expected = self._scale * _COLD_SECONDS[training]
        if expected <= left:
            return None
        return f"no time: needs about {expected:.0f} s of {max(left, 0):.0f} s left"

    def spent(self, training: bool, seconds: float) -> None:
        """Learns from a compilation how long the next one will take."""
        self._scale = seconds / _COLD_SECONDS[training]


def compile_contestant(
    model: nn.Module, make_step: Callable[[nn.Module], Callable[[], Any]], training: bool, budget: CompileBudget
) -> Compiled:
    """Compiles a copy of ``model`` and takes its first step.

    Inference is compiled with the weights frozen, which is torch.compile's fastest form.
    """
    if reason := budget.refuses(training):
        return Compiled(missing=reason)
    options = None if training else {"freezing": True}
    hits = _cache_hits()
    start = perf_counter()
    try:
        step = make_step(torch.compile(copy.deepcopy(model), options=options))
        step()
    except Exception as error:  # whatever a compiler may raise
        first_line = str(error).strip().partition("\n")[0]
        return Compiled(missing=f"it failed: {type(error).__name__}: {first_line}".rstrip(" :"))
    seconds = perf_counter() - start
    budget.spent(training, seconds)
    return Compiled(step, seconds, _cache_hits() > hits)


def _cache_hits() -> int:
    return counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
