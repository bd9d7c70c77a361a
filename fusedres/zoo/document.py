"""``docs/zoo.md``: what :func:`fusedres.patch` finds in networks, and what it makes of their speed."""

from __future__ import annotations

import re
from collections import Counter

from ..patch import PatchReport
from .timings import Timings

__all__ = ["document", "reasons", "row"]

_HEAD = """# Networks of torchvision, timm and others

What `fusedres.patch` finds in them: how many convolutions there are, how many of them lie inside fused sites, and the
bytes that a patched training step is predicted to move, over stock's. What is left as it is is named with the reason.
Written by `python -m fusedres zoo --output docs/zoo.md`.
"""

_TIMED = """
Times are stock PyTorch's over ours, medians of {turns} turns in one process, on {batch} images of {resolution} x
{resolution} pixels. A network whose numbers are over the error budget has none. Measured by
`python -m fusedres zoo --timings --json FILE`:

{machine}
"""

_COLUMNS = ("network", "convolutions", "fused", "coverage", "sites", "bytes")
_TIMED_COLUMNS = ("train step, bf16", "inference, bf16")


def document(families: dict[str, list[tuple[str, ...]]], timings: Timings | None = None) -> str:
    """The tables, one for each family, as Markdown; with columns of times where there are ``timings``.

    Args:
        families: each with its networks, as :func:`row` tells of them.
    """
    head = _HEAD if timings is None else _HEAD + _TIMED.format(machine=timings.machine, **timings.settings)
    return head + "".join(_table(family, rows, timings is not None) for family, rows in families.items())


def _table(family: str, networks: list[tuple[str, ...]], timed: bool) -> str:
    columns = (*_COLUMNS, *(_TIMED_COLUMNS if timed else ()), "left as it is")
    rows = [columns, ("---", *["---:"] * (len(columns) - 2), "---"), *networks]
    return f"\n## {family}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def row(name: str, report: PatchReport, timings: Timings | None = None) -> tuple[str, ...]:
    """What the document says of a network, which must still be there."""
    counts = report.total, report.covered, f"{report.coverage:.0%}", len(report.fused)
    timed = () if timings is None else timings.cells(name)
    return (name.replace(":", " "), *map(str, counts), _bytes(report), *timed, reasons(report))


def _bytes(report: PatchReport) -> str:
    try:
        stock, fused = report.bytes_per_image()
    except ValueError:
        return ""
    return f"{fused / stock:.2f}" if stock else ""


def reasons(report: PatchReport) -> str:
    """Why convolutions were left, by how many of them each reason concerns."""
    counts = Counter(_general(d.reason) for d in report.declined if d.kind in ("convolution", "module"))
    return "; ".join(f"{reason} ({n})" for reason, n in counts.most_common()).replace("|", "\\|")


# What in a reason is of one layer alone, and what is said of all such layers instead.
_NAMES = (
    (r" \(\S+\.py:\d+: .*\)$", ""),  # the line of the model's code
    (r"^nothing to fuse \S+ with: (?=\S+ is no step)", "what follows, "),
    (r"^nothing to fuse \S+ with: \S+ is", "what follows is"),
    (r"^nothing to fuse \S+ with: \S+ has", "what follows has"),
    (r"^(the output of )\S+", r"\1it"),
    (r"^[\w.]+:? (?=is |has |stands |shares |its )", ""),
    (r"(the addition) \w+(?= is not fused)", r"\1"),
)


def _general(reason: str) -> str:
    """A reason without the names that tell one layer from another."""
    for pattern, text in _NAMES:
        reason = re.sub(pattern, text, reason)
    return reason
