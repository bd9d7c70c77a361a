"""``python -m fusedres zoo``: what :func:`fusedres.patch` finds in the convolutional networks of torchvision and timm.

Every network is built as its package builds it, untrained, and nothing in it is run. The result is ``docs/zoo.md``.
"""

from __future__ import annotations

import re
import sys
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ..patch import PatchReport, explain
from .networks import ZOO, build

__all__ = ["add_arguments", "document", "run"]


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "networks", nargs="*", help="package:name, with torchvision or timm; by default, all of the list"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the tables there, not to the screen")


def run(args: Namespace) -> int:
    families = {"Networks": tuple(args.networks)} if args.networks else ZOO
    try:
        text = document({family: dict(_reports(names)) for family, names in families.items()})
    except ValueError as error:
        print(f"fusedres zoo: {error}", file=sys.stderr)
        return 2
    if args.output is None:
        print(text, end="")
    else:
        args.output.write_text(text)
    return 0


def _reports(names: tuple[str, ...]) -> Iterator[tuple[str, PatchReport]]:
    for name in names:
        print(name, file=sys.stderr)
        yield name, explain(build(name))


# ---------------------------------------------------------------------------------------------------------------------
# The document
# ---------------------------------------------------------------------------------------------------------------------

_HEAD = """# Networks of torchvision and timm

What `fusedres.patch` finds in them: how many convolutions there are, and how many of them lie inside fused sites. What
is left as it is is named with the reason. Written by `python -m fusedres zoo --output docs/zoo.md`.
"""

_COLUMNS = ("network", "convolutions", "fused", "coverage", "sites", "left as it is")


def document(families: dict[str, dict[str, PatchReport]]) -> str:
    """The tables, one for each family, as Markdown."""
    return _HEAD + "".join(_table(family, reports) for family, reports in families.items())


def _table(family: str, reports: dict[str, PatchReport]) -> str:
    rows = [_COLUMNS, ("---", *["---:"] * 4, "---"), *(_row(name, report) for name, report in reports.items())]
    return f"\n## {family}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(name: str, report: PatchReport) -> tuple[str, ...]:
    counts = report.total, report.covered, f"{report.coverage:.0%}", len(report.fused)
    return (name.replace(":", " "), *map(str, counts), _reasons(report))


def _reasons(report: PatchReport) -> str:
    """The reasons by how many convolutions they concern."""
    fused = {path for site in report.fused for path in site.convolutions}
    counts = Counter(_general(d.reason) for d in report.declined if d.path not in fused)
    return "; ".join(f"{reason} ({n})" for reason, n in counts.most_common()).replace("|", "\\|")


# What in a reason is of one layer alone, and what is said of all such layers instead.
_NAMES = (
    (r" \(\S+\.py:\d+: .*\)$", ""),  # the line of the model's code
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
