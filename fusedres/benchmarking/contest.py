"""One workload, its contestants: eager, ``torch.compile`` where there is time for it, and fusedres."""

from __future__ import annotations

import gc
from dataclasses import dataclass

from torch import nn

from ..patch import patch
from .compiled import CompileBudget, Compiled, compile_contestant
from .timing import Timing, interleave, speedup
from .workloads import Batch, Workload

__all__ = ["Contest", "contest"]


@dataclass(frozen=True)
class Contest:
    """The times of ``eager``, ``fusedres`` and perhaps ``torch.compile``, and what became of the last."""

    times: dict[str, Timing]
    compiled: Compiled

    def speedup_over(self, other: str) -> float | None:
        """How many times faster fusedres is than ``other``; ``None`` where that was not timed."""
        return speedup(self.times[other], self.times["fusedres"]) if other in self.times else None

    @property
    def compile_note(self) -> str:
        """How long the first compiled step took, or why there is none."""
        compiled = self.compiled
        if compiled.first_step is None:
            return compiled.missing
        return f"({compiled.first_step:.0f} s{', cached' if compiled.cached else ''})"


def contest(workload: Workload, model: nn.Module, batch: Batch, turns: int, budget: CompileBudget) -> Contest:
    """Times copies of ``model`` in turn. Correctness is the caller's to check first."""
    make_step = workload.stepper(batch)
    stock, ours = workload.prepared(model), workload.prepared(model)
    patch(ours)
    compiled = compile_contestant(stock, make_step, workload.training, budget)
    calls = {"eager": make_step(stock), "torch.compile": compiled.step, "fusedres": make_step(ours)}
    times = interleave({name: call for name, call in calls.items() if call}, turns=turns)
    gc.collect()
    return Contest(times, compiled)
