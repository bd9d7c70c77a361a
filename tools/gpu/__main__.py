"""The command line of :mod:`tools.gpu`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from . import process
from .benches import bench
from .building import build
from .context import ROOT, Context
from .layouts import layouts
from .process import Log
from .record import CUT_OFF, FAILED, Outcome, Record, table
from .sanitizer import sanitizer
from .suites import tests
from .tunes import tune


class Stage(NamedTuple):
    """A stage, and its share of the time: seconds, where all of them have the default budget.

    ``most`` is a share of what is left that it may take where that is more: what it does not need, the others have.
    """

    name: str
    seconds: float
    run: Callable[[Context, float], Outcome]
    most: float = 0.0


STAGES = (
    Stage("build", 70, build, most=0.5),
    Stage("tests", 150, tests),
    Stage("layouts", 20, layouts),
    Stage("sanitizer", 60, sanitizer),
    Stage("bench", 190, bench),
    Stage("tune", 50, tune),
)
_NAMES = [stage.name for stage in STAGES]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 where a stage failed, 130 where the run was ended from outside."""
    args = _arguments(argv)
    args.out = args.out.resolve()  # children work elsewhere
    args.out.mkdir(parents=True, exist_ok=True)
    about = {"budget": args.budget, "dry_run": args.dry_run, "commit": _commit(), "date": _now(), "python": sys.version}
    record = Record(args.out / "gpu.json", about)
    context = Context(args.out, ROOT / "build" / "gpu", Log(args.out / "log.txt"), args.dry_run, wheel=args.wheel)
    context.scratch.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + args.budget
    chosen = [stage for stage in STAGES if stage.name in ("build", *args.only)]  # the library comes first in any case
    for sign in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(sign, _ended_from_outside)
    try:
        for i, stage in enumerate(chosen):
            left = deadline - time.monotonic()
            share = _share(chosen[i:])
            print(f"{stage.name}: up to {max(0.0, share * left):.0f} s", flush=True)
            _run(stage, context, record, time.monotonic() + share * left)
            _show(args.out, record)
    finally:
        process.end_all()
    print(f"results: {args.out}", flush=True)
    return 1 if any(stage["status"] == FAILED for stage in record.stages) else 0


def _share(stages: Sequence[Stage]) -> float:
    """What the first of these stages may take of the time that is left for all."""
    return max(stages[0].most, stages[0].seconds / sum(stage.seconds for stage in stages))


def _run(stage: Stage, context: Context, record: Record, deadline: float) -> None:
    """One stage, whatever it does: what goes wrong in it is its outcome."""
    began = time.monotonic()
    latest = Outcome()

    def note(outcome: Outcome) -> None:
        nonlocal latest
        latest = outcome
        record.put(stage.name, outcome, time.monotonic() - began)

    context.note = note
    note(latest)
    try:
        outcome = stage.run(context, deadline)
    except SystemExit:
        context.note = lambda outcome: None  # of threads whose processes are ended only now
        latest.status = CUT_OFF
        note(latest)
        raise
    except Exception as error:
        context.log.write(stage.name, traceback.format_exc())
        problem = f"{type(error).__name__} in tools/gpu itself: {error}"
        outcome = Outcome(FAILED, latest.summary, [*latest.problems, problem], latest.details)
    note(outcome)


def _show(out: Path, record: Record) -> None:
    """Prints the table of all stages so far, and keeps it in a file."""
    text = table(record.stages)
    (out / "table.txt").write_text(text + "\n")
    print(text, flush=True)


def _ended_from_outside(sign: int, frame: object) -> None:
    raise SystemExit(130)


def _commit() -> str:
    try:
        command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10)
        said = result.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    return said or os.environ.get("FUSEDRES_COMMIT") or "unknown"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _arguments(argv: Sequence[str] | None) -> Namespace:
    parser = ArgumentParser(prog="python -m tools.gpu", description="Tests and benchmarks of fusedres on a GPU.")
    parser.add_argument("--budget", type=float, default=540.0, metavar="SECONDS", help="in all (default %(default).0f)")
    parser.add_argument(
        "--only", type=_stages, default=_NAMES, metavar="STAGES", help=f"of {','.join(_NAMES)}; build comes always"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), metavar="DIR", help="default %(default)s")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="take the library from it instead of building")
    parser.add_argument("--dry-run", action="store_true", help="every stage on the CPU, with small stand-ins")
    return parser.parse_args(argv)


def _stages(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in _NAMES]:
        raise ArgumentTypeError(f"stages are {','.join(_NAMES)}, got {unknown[0]!r}")
    return names


if __name__ == "__main__":
    sys.exit(main())
