"""``python -m fusedres zoo``: networks of other libraries, what :func:`fusedres.patch` finds in them, and its effect.

Every network is built as its library builds it, untrained. Nothing in it is run, unless ``--check`` asks whether a
patched network computes what the stock one does, or ``--timings`` for the times of both.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from ..patch import explain
from .agreement import judged
from .document import document, row
from .networks import LIBRARIES, ZOO, all_networks, build
from .timings import TIMED, Timings, measure

__all__ = ["add_arguments", "run"]


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "networks",
        nargs="*",
        help=f"library:name, with {', '.join(LIBRARIES)} for libraries; * and ? stand for any letters; default: a list",
    )
    parser.add_argument("--all", action="store_true", help="every network of every library that is installed")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="run each, stock and patched, in float64, and compare")
    what.add_argument("--timings", action="store_true", help="time each, stock and patched, in bfloat16")
    parser.add_argument("--largest", type=float, default=50, metavar="M", help="million parameters, for --check")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the tables there, not to the screen")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the times there")
    parser.add_argument("--results", type=Path, metavar="FILE", help="times for the tables, as --json wrote them")


def run(args: Namespace) -> int:
    try:
        if args.check:
            return _check([name for names in _families(args).values() for name in names], 1e6 * args.largest)
        if args.timings:
            return _time(list(_named(args.networks)) or TIMED, args.json)
        return _tables(_families(args), args.results, args.output)
    except (ValueError, OSError) as error:
        print(f"fusedres zoo: {error}", file=sys.stderr)
        return 2


def _families(args: Namespace) -> dict[str, Sequence[str]]:
    if args.all:
        return {library: tuple(_installed(library)) for library in LIBRARIES}
    return {"Networks": tuple(_named(args.networks))} if args.networks else ZOO


def _named(patterns: Sequence[str]) -> Iterator[str]:
    for pattern in patterns:
        if any(letter in pattern for letter in "*?"):
            names = [n for n in all_networks(pattern.partition(":")[0]) if fnmatchcase(n, pattern)]
            if not names:
                raise ValueError(f"no network is named {pattern}")
            yield from names
        else:
            yield pattern


def _installed(library: str) -> list[str]:
    try:
        return all_networks(library)
    except ValueError as error:
        print(error, file=sys.stderr)
        return []


# ---------------------------------------------------------------------------------------------------------------------
# What is done with them
# ---------------------------------------------------------------------------------------------------------------------


def _tables(families: dict[str, Sequence[str]], results: Path | None, output: Path | None) -> int:
    timings = None if results is None else Timings.load(results)
    text = document({family: list(_rows(names, timings)) for family, names in families.items()}, timings)
    if output is None:
        print(text, end="")
    else:
        output.write_text(text)
    return 0


def _rows(names: Sequence[str], timings: Timings | None) -> Iterator[tuple[str, ...]]:
    for name in names:
        print(name, file=sys.stderr)
        model = build(name)
        yield row(name, explain(model), timings)  # which still asks the model for its bytes


def _check(names: Sequence[str], largest: float) -> int:
    """Prints a line for each network; 1 where one of them does not compute what stock does, or cannot be patched."""
    counts = dict.fromkeys(("agrees", "differs", "not run"), 0)
    for name in names:
        verdict, said = judged(name, largest)
        counts[verdict] += 1
        print(f"{verdict:8} {name}: {said}", flush=True)
    print(", ".join(f"{n} {verdict}" for verdict, n in counts.items()))
    return 1 if counts["differs"] else 0


def _time(names: Sequence[str], path: Path | None) -> int:
    for timings in measure(names):
        name, found = list(timings.networks.items())[-1]
        if isinstance(found, str):
            print(f"{name}: {found}", flush=True)
        for workload, m in {} if isinstance(found, str) else found.items():
            ratio = m.check if m.ratio is None else f"{m.ratio:.2f}x"
            print(f"{name}, {workload}: stock {m.eager:.1f} ms, ours {m.fused:.1f} ms, {ratio}", flush=True)
        if path is not None:
            timings.save(path)
    return 0
