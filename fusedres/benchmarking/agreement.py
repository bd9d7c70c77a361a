"""Whether a contestant computes what stock PyTorch does, for tables: :func:`fusedres.testing.compare`, summed up, and
what can be said where that is not for it to judge, or where a check itself fails."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..testing import Comparison, Entry, rms

__all__ = ["Summary", "agrees", "attempted", "in_a_line", "summaries", "verdict"]

_APART = 4.0
"""How far from eager's an output may be, in units of eager's own error: its own, as large, and what chance adds."""


@dataclass(frozen=True)
class Summary:
    """The tensors of one kind: how many, and the median of their errors against float64, relative to their size.

    Attributes:
        budget_used: the largest share of its budget that one of our tensors uses; above 1 is over.
    """

    kind: str
    count: int
    stock: float
    ours: float
    budget_used: float


def verdict(comparison: Comparison) -> str:
    """``"ok"``, or which tensors are over their budget."""
    over = [entry for entry in comparison.entries if not entry.ok]
    return f"RED: {len(over)} of {len(comparison.entries)} tensors over budget, first {over[0]}" if over else "ok"


def agrees(first: Tensor, eager: Tensor, exact: Tensor) -> str:
    """``"ok"`` where one output is eager's but for rounding, which eager's error against ``exact``, in float32, tells.

    For those whom the error budget does not bind, and for sizes at which float64 takes too long.
    """
    size = rms(exact)
    apart, error = rms(first.double() - eager.double()), rms(eager.double() - exact.double())
    if apart <= _APART * error + torch.finfo(eager.dtype).eps * size:  # false for NaN
        return "ok"
    return f"RED: its output is {apart / size:.2g} of its size away from eager's, whose error is {error / size:.2g}"


def attempted(check: Callable[[], str], device: torch.device) -> str:
    """What a check says; red where it raises, unless the device is lost to this process: then it raises again."""
    try:
        return check()
    except Exception as error:  # whatever a kernel or its compiler may raise
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return f"RED: {in_a_line(error)}"


def in_a_line(error: Exception) -> str:
    """The error's type and the first line of its message."""
    first = next((line for line in str(error).splitlines() if line.strip()), "").strip()
    return f"{type(error).__name__}: {first}".rstrip(": ")


def summaries(comparison: Comparison) -> list[Summary]:
    """Outputs, gradients and buffers, those of them that there are."""
    groups: dict[str, list[Entry]] = {"output": [], "gradients": [], "running statistics": []}
    for entry in comparison.entries:
        if entry.scale > 0:
            groups[_kind(entry.name)].append(entry)
    return [_summary(kind, entries) for kind, entries in groups.items() if entries]


def _kind(name: str) -> str:
    if name == "output":
        return name
    return "gradients" if name.startswith("grad of ") else "running statistics"


def _summary(kind: str, entries: list[Entry]) -> Summary:
    stock = statistics.median(entry.stock / entry.scale for entry in entries)
    ours = statistics.median(entry.ours / entry.scale for entry in entries)
    return Summary(kind, len(entries), stock, ours, max(entry.ours / entry.budget for entry in entries))
