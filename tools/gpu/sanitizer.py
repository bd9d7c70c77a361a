"""The stage ``sanitizer``: compute-sanitizer's memcheck and racecheck over every kernel, on small shapes."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .context import Context
from .probe import which
from .process import Finished
from .record import CUT_OFF, FAILED, OK, UNAVAILABLE, Outcome

__all__ = ["Findings", "sanitizer"]

_TOOLS = ("memcheck", "racecheck")
_BACKENDS = ("cuda", "triton")
_STAND_IN = Path(__file__).with_name("stand_in.py")

_ENVIRONMENT = {
    # One allocation for each tensor: in PyTorch's pool, what lies behind a tensor is another's memory and no error.
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    # Only the kernels that are used are loaded, and so instrumented.
    "CUDA_MODULE_LOADING": "LAZY",
}


@dataclass
class Findings:
    """What compute-sanitizer printed in one run.

    Attributes:
        errors: what it counted at its end; ``None`` where it did not get there.
        reports: the heads of its reports, in their order.
        refusal: why it could not watch at all, or nothing.
    """

    errors: int | None = None
    reports: list[str] = field(default_factory=list)
    refusal: str = ""

    _SUMMARY = re.compile(r"=+ (?:ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: (\d+) hazards? displayed)")
    _REPORT = re.compile(
        r"=+ ((?:Invalid|Misaligned|Uninitialized|Program hit|Out-of-bounds|Error:|.*[Rr]ace reported|.*hazard).*)"
    )
    _REFUSAL = re.compile(r"=+ (?:Error: )?(.*(?:not supported|Unable to|Failed to|No attachable process).*)", re.I)
    _IN_KERNEL = re.compile(r"=+\s+at (.*)")

    def read(self, line: str) -> None:
        """Takes in a line of its output."""
        if match := self._SUMMARY.match(line):
            self.errors = int(match[1] or match[2])
        elif match := self._REFUSAL.match(line):
            self.refusal = self.refusal or match[1]
        elif match := self._REPORT.match(line):
            self.reports.append(match[1].strip())
        elif (match := self._IN_KERNEL.match(line)) and self.reports and " at " not in self.reports[-1]:
            self.reports[-1] += f" at {match[1].strip()}"

    def problems(self, name: str, finished: Finished) -> list[str]:
        if self.refusal and not self.reports:
            return []
        told = [f"{name}: {report}" for report in self.reports]
        if self.errors and not told:
            told.append(f"{name}: {self.errors} errors, see the log")
        if finished.status not in (0, None) and not told:
            told.append(f"{name}: {finished.ending}: {finished.last_line()}")
        return told

    def told(self, finished: Finished) -> str:
        """The run in a few words."""
        if finished.status is None:
            return CUT_OFF
        if self.refusal and not self.reports:
            return f"{UNAVAILABLE}: {self.refusal}"
        if self.errors is None:
            return f"no summary ({finished.ending})"
        return f"{self.errors} errors"


def sanitizer(context: Context, deadline: float) -> Outcome:
    """Each backend under each tool, one after another."""
    path = which("compute-sanitizer")
    if path is None and not context.dry:
        return Outcome(UNAVAILABLE, "compute-sanitizer is not on this machine")
    outcome = Outcome()
    backends = ("cpu",) if context.dry else _BACKENDS
    filters = {} if context.dry else {backend: _filters(context, outcome, backend, deadline) for backend in backends}
    runs = [(tool, backend) for tool in _TOOLS for backend in backends if filters.get(backend) != []]
    for i, (tool, backend) in enumerate(runs):
        now = time.monotonic()
        until = now + (deadline - now) / (len(runs) - i)  # else the first would leave nothing to the last
        prefix = [sys.executable, str(_STAND_IN), tool] if context.dry else _prefix(path, tool, filters[backend])
        _run(context, outcome, prefix, f"{tool} {backend}", until)
        context.note(outcome)
    told = list(outcome.details.values())
    outcome.summary = "; ".join(f"{name}: {found}" for name, found in outcome.details.items())
    if outcome.problems:
        outcome.status = FAILED
    elif CUT_OFF in told:
        outcome.status = CUT_OFF
    elif any(found.startswith(UNAVAILABLE) for found in told):
        outcome.status = UNAVAILABLE
    else:
        outcome.status = OK
    return outcome


def _filters(context: Context, outcome: Outcome, backend: str, deadline: float) -> list[str]:
    """The options for a backend's own kernels; none where they cannot be asked for, which is a problem.

    The vendor's kernels are not ours to judge, and watching them takes longest.
    """
    finished = context.python("kernels", ["-m", "tools.gpu.exercise", "--kernels", backend], deadline)
    if finished.status is None:
        outcome.details[backend] = CUT_OFF
        return []
    if not finished.ok:
        outcome.details[backend] = "not watched: its kernels have no names"
        outcome.problems.append(f"the names of {backend}'s kernels: {finished.ending}: {finished.last_line()}")
        return []
    return [part for name in finished.last_line().split() for part in ("--kernel-name", f"kernel_substring={name}")]


def _prefix(path: str, tool: str, filters: Sequence[str]) -> list[str]:
    # Calls of the API that fail are no errors: PyTorch makes some to find out what there is.
    return [path, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", "--report-api-errors", "no", *filters]


def _run(context: Context, outcome: Outcome, prefix: Sequence[str], name: str, deadline: float) -> None:
    if time.monotonic() > deadline:
        outcome.details[name] = CUT_OFF
        return
    findings = Findings()
    backend = name.split()[1]
    command = [*prefix, sys.executable, "-m", "tools.gpu.exercise", context.device, backend]
    finished = context.run(name, command, deadline, environment=_ENVIRONMENT, on_line=findings.read)
    outcome.details[name] = findings.told(finished)
    outcome.problems += findings.problems(name, finished)
