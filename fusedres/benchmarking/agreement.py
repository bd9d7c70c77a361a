"""Whether a fused network computes what the stock one does, for tables: :func:`fusedres.testing.compare`, summed up."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from ..testing import Comparison, Entry

__all__ = ["Summary", "summaries", "verdict"]


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
