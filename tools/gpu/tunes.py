"""The stage ``tune``: the tiles of ResNet-50's convolutions on this device, kept in a table that can be committed."""

from __future__ import annotations

import json
import time

from .context import Context
from .record import CUT_OFF, FAILED, OK, UNAVAILABLE, Outcome

__all__ = ["tune"]

_RESERVE = 10.0
"""Seconds for the import before, and for the problem that is being measured when the time is up."""


_DRY_SECONDS = 1.0
"""For a dry run, which then ends after its first problem."""


def tune(context: Context, deadline: float) -> Outcome:
    """Runs ``python -m fusedres tune`` for the time that there is: it measures the largest convolutions first, and
    keeps each as it is measured."""
    seconds = deadline - time.monotonic() - _RESERVE
    if seconds <= 0:
        return Outcome(CUT_OFF, "no time left")
    command, environment = ["-m", "fusedres", "tune", "resnet50"], {}
    if context.dry:  # in Triton's interpreter
        command = ["-m", "fusedres", "tune", "cifar_resnet", "--device", "cpu", "--batch", "1", "--size", "8"]
        command += ["--dtype", "fp32"]
        environment, seconds = {"TRITON_INTERPRET": "1"}, min(seconds, _DRY_SECONDS)
    command += ["--seconds", f"{seconds:.0f}"]
    finished = context.python("tune", command, deadline, environment=environment)
    if finished.status == 2:
        return Outcome(UNAVAILABLE, finished.last_line())
    tables = sorted(context.out.glob("tuned-*.json"))
    if not tables:
        status = CUT_OFF if finished.status is None else FAILED
        return Outcome(status, "no table", [f"{finished.ending}: {finished.last_line()}"])
    entries = json.loads(tables[0].read_text())["entries"]
    faster = sum(ours < vendor for _, ours, vendor in entries.values())
    summary = f"{len(entries)} problems, ours faster in {faster}: {tables[0].name}, goes to fusedres/triton/tables/"
    problems = [] if finished.ok or finished.status is None else [f"{finished.ending}: {finished.last_line()}"]
    status = FAILED if problems else OK if finished.ok else CUT_OFF
    return Outcome(status, summary, problems, {"table": tables[0].name, "entries": len(entries)})
