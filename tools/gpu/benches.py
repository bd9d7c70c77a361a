"""The stage ``bench``: whole networks and single kernels, in the order of their importance, by a process that is begun
again where it dies."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from .context import Context
from .record import CUT_OFF, FAILED, OK, Outcome

__all__ = ["bench"]

_ATTEMPTS = 12
_RESERVE = 3.0
"""Seconds between the end that the process is told and the end that it is given."""


def bench(context: Context, deadline: float) -> Outcome:
    """Runs :mod:`fusedres.benchmarking.device` until it is done or the time is.

    It keeps in its file what it has measured and what it is about to; begun again, it notes what it died of and goes on
    without that. So does a second run on the same machine, which finds the first one's file.
    """
    path = context.out / "bench.json"
    outcome = Outcome()
    begun = False

    def on_line(line: str) -> None:
        nonlocal begun
        begun = begun or line.startswith("begin: ")
        if line.startswith("done: "):
            _read(path, outcome)
            context.note(outcome)

    for _ in range(_ATTEMPTS):
        begun = False
        seconds = deadline - time.monotonic() - _RESERVE
        if seconds <= 0:
            outcome.status = CUT_OFF
            break
        command = ["-m", "fusedres.benchmarking.device", "--out", str(path), "--seconds", f"{seconds:.0f}"]
        command += ["--device", context.device, *(["--smoke"] if context.dry else [])]
        finished = context.python("bench", command, deadline, on_line=on_line)
        if finished.ok or finished.status is None:
            outcome.status = OK if finished.ok else CUT_OFF
            break
        outcome.problems.append(f"{finished.ending}: {finished.last_line()}")
        if not begun:  # it did not get as far as measuring
            break
    grave = _read(path, outcome) + outcome.problems
    outcome.problems = list(dict.fromkeys([*grave, *outcome.details.get("red", [])]))  # another's too, but no failure
    if grave:
        outcome.status = FAILED
    return outcome


def _read(path: Path, outcome: Outcome) -> list[str]:
    """The summary of what is in the file so far; what of ours is red, and what went wrong altogether."""
    if not path.exists():
        outcome.summary = "nothing measured"
        return []
    content = json.loads(path.read_text())
    settings = content["settings"]
    measured = [m for m in content["measurements"] if m["seconds"]]
    red = [m for m in content["measurements"] if m["check"].startswith("RED")]
    outcome.details |= {"results": path.name, "measurements": len(measured), "left_out": settings.get("left_out", [])}
    outcome.details |= {"red": [_red(m) for m in red], "failed": settings.get("failed", [])}
    outcome.summary = "; ".join(filter(None, (_headline(measured), f"{len(measured)} measurements in {path.name}")))
    return [_red(m) for m in red if m["suite"] == "op" or _is_ours(m)] + outcome.details["failed"]


def _is_ours(m: dict[str, Any]) -> bool:
    return "fusedres" in m["contestant"]


def _red(m: dict[str, Any]) -> str:
    return f"{m['subject']} {m['workload']}, {m['contestant']}: {m['check']}"


def _headline(measured: list[dict[str, Any]]) -> str:
    """The best of ours over eager in the first group of networks, which is the most important one."""
    ours = [m for m in measured if m["suite"] == "model" and "eager" in m["speedup"] and _is_ours(m)]
    if not ours:
        return ""
    first = [m for m in ours if all(m[key] == ours[0][key] for key in ("subject", "workload", "shape"))]
    best = max(first, key=lambda m: m["speedup"]["eager"])
    return f"{best['subject']} {best['workload']}: {best['contestant']} {best['speedup']['eager']:.2f}x eager"
