"""The command: ``python -m fusedres report FILE...`` and ``python -m fusedres report --compare BEFORE AFTER``."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from ...console import console, lacks, make_table
from .compared import HEAD, TOLERATED, compared, dropped
from .page import page
from .source import load

__all__ = ["add_arguments", "run"]


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="results, as bench and growth write them")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"), help="only what both have timed")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/benchmarks.md"), metavar="FILE", help="default %(default)s"
    )


def run(args: Namespace) -> int:
    """Exit status 1 where a comparison finds a regression, 2 where a file cannot be read."""
    try:
        return _compare(*args.compare) if args.compare else _write(args.files, args.out)
    except (OSError, ValueError) as error:
        print(f"fusedres report: {error}", file=sys.stderr)
        return 2


def _compare(before: Path, after: Path) -> int:
    old, new = (load(path, Path.cwd()) for path in (before, after))
    changes = compared(old, new)
    console.print(f"before: {old.machine} ({old.name})\nafter: {new.machine} ({new.name})")
    caption = f"A regression: {TOLERATED - 1:.0%} slower or more, beyond the quartiles of both, or as much more memory"
    console.print(make_table("", HEAD, [change.cells() for change in changes], caption))
    for what in dropped(old, new):
        console.print(f"not in {new.name}: {what}")
    regressed = [change for change in changes if change.regressed]
    console.print(f"{len(regressed)} of {len(changes)} regressed")
    return 1 if regressed else 0


def _write(files: list[Path], out: Path) -> int:
    if lacks("report", "matplotlib"):
        return 2
    out = out.resolve()
    root = out.parent.parent  # the project, where the page is docs/benchmarks.md
    sources = [load(path, root) for path in files]
    made = page(sources, out.stem)
    folder = out.parent / out.stem
    made.draw(folder)
    out.write_text(made.markdown())
    single = out.with_suffix(".html")
    single.write_text(made.html(folder))
    console.print(
        f"{out}: {len(sources)} files, {len(made.figures())} figures in {folder.name}/; {single.name} has all"
    )
    return 0
