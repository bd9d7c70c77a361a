"""The stage ``tests``: every correctness test on the device, a process for each file.

A file to itself, since a kernel that writes where it must not leaves its process unable to use the GPU at all. Several
run at a time: most of their time goes into compiling kernels, which is the CPU's.
"""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .context import ROOT, Context
from .process import Finished
from .record import CUT_OFF, FAILED, OK, UNAVAILABLE, Outcome

__all__ = ["File", "Tally", "files", "tests"]

_AT_ONCE = 6
_FAILURES = 25
"""After how many a file is left."""

_NO_TIME = "no time left"
"""What the ending of a file says that was cut off."""

_NOT_ASKED_FOR, _LACKING = "built without CUTLASS", ("nvcc was not found", "needs hypothesis")
"""Parts of the reasons for which a file of the device's may be skipped whole: no failure of the library's."""

_WIDE = {"COLUMNS": "1000"}
"""pytest cuts its summary to the width of the terminal, and with it the messages."""

_CORE = (
    "tests/test_block.py",
    "tests/test_select.py",
    "tests/ops/test_join.py",
    "tests/ops/test_join_backward.py",
    "tests/ops/test_bn_stats.py",
    "tests/engine/test_blocks.py",
    "tests/patch/test_swap.py",
    "tests/test_wheel.py",
)
"""On the CPU, last: whether the library does what it should with this machine's torch, which may be another version."""


@dataclass(frozen=True)
class File:
    """A file of tests, and variables that its process gets."""

    path: str
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.path.removeprefix("tests/")


def files(dry: bool) -> list[File]:
    """The files in the order in which they are begun: what takes longest first, the CPU's last."""
    if dry:  # one of each sort
        interpreted = File("tests/triton/cases/case_blocks.py", {"TRITON_INTERPRET": "1"})
        return [interpreted, File("tests/ops/test_fingerprint.py")]
    cases = [_relative(path) for path in sorted((ROOT / "tests" / "triton" / "cases").glob("case_*.py"))]
    # Not the one that would run these cases once more.
    device = [_relative(path) for path in sorted((ROOT / "tests" / "cuda").glob("test_*.py"))]
    device = [path for path in device if not path.endswith("/test_triton.py")]
    return [File(path) for path in (*sorted(cases, reverse=True), *device, *_CORE)]


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@dataclass
class Tally:
    """The tests of one file, counted as they end, so that nothing is lost where the process is ended."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: dict[str, str] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    ending: str = ""

    _TEST = re.compile(r"^(\S+?::.*?)\s+(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
    _SUMMARY = re.compile(r"^(FAILED|ERROR) (tests/.*?)(?: - (.*))?$")
    _SKIP = re.compile(r"^SKIPPED \[(\d+)\] \S+: (.*)$")

    def read(self, line: str) -> None:
        """Takes in a line of pytest's output."""
        if match := self._TEST.match(line):
            self.counts[match[2].lower()] += 1
            if match[2] in ("FAILED", "ERROR"):
                self.failures.setdefault(match[1], "")
        elif match := self._SUMMARY.match(line):
            self.failures[match[2]] = match[3] or ""
        elif match := self._SKIP.match(line):
            self.reasons[match[2]] += int(match[1])

    def finish(self, finished: Finished) -> None:
        """Takes in how the process ended."""
        # 5: nothing was collected, as where the whole file needs a package that is not there.
        self.ending = "" if finished.status in (0, 1, 5) else f"{finished.ending}: {finished.last_line()}"

    @property
    def status(self) -> str:
        if self.failures or self.ending:
            return FAILED
        return OK if self.counts["passed"] else UNAVAILABLE

    def problems(self, name: str) -> list[str]:
        told = [f"{test.removeprefix('tests/')}: {message}".rstrip(": ") for test, message in self.failures.items()]
        return told + ([f"{name}: {self.ending}"] if self.ending else [])

    def to_dict(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "counts": dict(self.counts),
            "failures": self.failures,
            "skipped because": dict(self.reasons),
            "ending": self.ending,
        }


def tests(context: Context, deadline: float) -> Outcome:
    """Runs the files side by side."""
    found: dict[str, Tally] = {}
    lock = threading.Lock()
    chosen = files(context.dry)

    def run(file: File) -> None:
        tally = Tally()
        with lock:
            found[file.name] = tally
        # -v: a line for each test, at once. Its plugins are the machine's; its cache would be of this run alone.
        options = ["-v", "--tb=short", "-rfEs", "--no-header", "-p", "no:cacheprovider", f"--maxfail={_FAILURES}"]
        command = ["-m", "pytest", *options, file.path]
        environment = {**_WIDE, **file.environment}
        finished = context.python(file.name, command, deadline, environment=environment, on_line=tally.read)
        tally.finish(finished)
        with lock:
            context.note(_outcome(found, [f.name for f in chosen]))

    at_once = 1 if context.dry else max(1, min(_AT_ONCE, (os.cpu_count() or 1) // 2))
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(run, chosen))
    return _outcome(found, [file.name for file in chosen])


def _outcome(found: Mapping[str, Tally], names: list[str]) -> Outcome:
    counts = sum((tally.counts for tally in found.values()), Counter())
    parts = [f"{counts[kind]} {kind}" for kind in ("passed", "failed", "error", "skipped") if counts[kind]]
    idle = {name: t.reasons.most_common(1) for name, t in found.items() if t.status == UNAVAILABLE}
    problems = [problem for name, tally in found.items() for problem in tally.problems(name)]
    # A file of the device's that runs none of its tests is no success.
    lacking = []
    for name, reasons in idle.items():
        if name.startswith(("cuda/", "triton/")):
            reason = reasons[0][0] if reasons else "no test"
            if _NOT_ASKED_FOR in reason:
                continue
            told = lacking if any(part in reason for part in _LACKING) else problems
            told.append(f"{name} ran nothing: {reason}")
    cut = [name for name in names if name not in found or _NO_TIME in found[name].ending]
    grave = [problem for problem in problems if _NO_TIME not in problem]
    status = FAILED if grave else CUT_OFF if cut else UNAVAILABLE if lacking else OK
    problems += lacking
    summary = ", ".join(parts) or "no test ended"
    if cut:
        summary += f"; without an end: {', '.join(cut)}"
    return Outcome(status, summary, problems, {"files": {name: tally.to_dict() for name, tally in found.items()}})
