"""What a benchmark found, as data: rows with their goals, the machine, and a JSON file that holds both."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import fusedres

from ..env import env_report

__all__ = ["HEAD", "Goal", "Machine", "Results", "Row", "quantity", "this_machine", "times"]

HEAD = (
    "ResNet-50, batch 8, 224 x 224",
    "eager",
    "torch.compile",
    "fusedres",
    "images/s",
    "over eager",
    "over compile",
    "at least / aim",
    "reached",
    "check",
)
"""The columns of :meth:`Row.cells`."""


@dataclass(frozen=True)
class Goal:
    """What a row should reach; for ratios of bytes and for seconds, less is better."""

    at_least: float
    aim: float | None = None
    less_is_better: bool = False
    unit: str = "x"

    def reached(self, value: float) -> str:
        """``"aim"``, ``"yes"`` or ``"no"``."""
        if self.aim is not None and self._meets(value, self.aim):
            return "aim"
        return "yes" if self._meets(value, self.at_least) else "no"

    def _meets(self, value: float, bound: float) -> bool:
        return value <= bound if self.less_is_better else value >= bound

    def __str__(self) -> str:
        bounds = [self.at_least] if self.aim is None else [self.at_least, self.aim]
        return " / ".join(f"{bound:.2f}{self.unit}" for bound in bounds)


@dataclass(frozen=True)
class Row:
    """One line of the table. The contestants are in ``unit``; what was not measured is ``None``.

    Attributes:
        ratio: over eager, the median over turns; ``None`` where the check is red.
        compile_note: why ``torch.compile`` is missing, or how long its first step took.
        check: ``"ok"``, or what disagrees; empty where there is nothing to check.
        spread: quartiles of each contestant.
        goal_of: whether the goal is for the ``ratio`` or for what ``fusedres`` itself took.
        shares: of our time, by kind of work.
    """

    name: str
    unit: str
    goal: Goal
    eager: float | None = None
    compiled: float | None = None
    ours: float | None = None
    ratio: float | None = None
    compile_ratio: float | None = None
    images_per_second: float | None = None
    compile_note: str = ""
    check: str = ""
    spread: dict[str, Any] = field(default_factory=dict)
    goal_of: str = "ratio"
    shares: dict[str, float] = field(default_factory=dict)

    @property
    def reached(self) -> str:
        value = self.ratio if self.goal_of == "ratio" else self.ours
        return "" if value is None else self.goal.reached(value)

    def cells(self) -> tuple[str, ...]:
        """The row as text, one string for each of :data:`HEAD`."""
        compiled = " ".join(part for part in (quantity(self.compiled, self.unit), self.compile_note) if part)
        return (
            self.name,
            quantity(self.eager, self.unit),
            compiled,
            quantity(self.ours, self.unit),
            "" if self.images_per_second is None else f"{self.images_per_second:.1f}",
            times(self.ratio),
            times(self.compile_ratio),
            str(self.goal),
            self.reached,
            self.check,
        )


def quantity(value: float | None, unit: str) -> str:
    """A number with its unit, three digits of it; empty for ``None``."""
    if value is None:
        return ""
    return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"


def times(value: float | None) -> str:
    """A ratio; empty for ``None``."""
    return "" if value is None else f"{value:.2f}x"


@dataclass(frozen=True)
class Machine:
    """What the numbers depend on besides the code."""

    cpu: str
    threads: int
    instruction_set: str
    torch: str
    python: str
    fusedres: str
    commit: str
    date: str

    @property
    def slug(self) -> str:
        """A name for a folder."""
        return re.sub(r"[^a-z0-9]+", "-", f"{self.cpu} {self.threads} threads".lower()).strip("-")

    def __str__(self) -> str:
        return (
            f"{self.cpu}, {self.threads} threads ({self.instruction_set}), torch {self.torch}, Python {self.python}, "
            f"fusedres {self.fusedres} at {self.commit}, {self.date}"
        )


def this_machine() -> Machine:
    """The machine, the versions and the commit of this process."""
    report = env_report()
    return Machine(
        report.cpu,
        report.threads,
        report.instruction_set,
        report.versions["torch"],
        report.versions["python"],
        fusedres.__version__,
        _commit(),
        date.today().isoformat(),
    )


def _commit() -> str:
    """The commit of the working tree that the package lies in, with ``+`` where files have changed since."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "an unknown commit"
    return described.stdout.strip() or "an unknown commit"


@dataclass(frozen=True)
class Results:
    """The rows, the cells of the grid (as plain data), and where and how they were measured."""

    machine: Machine
    settings: dict[str, Any]
    rows: tuple[Row, ...]
    grid: Sequence[dict[str, Any]]

    def save(self, path: Path) -> None:
        """Writes JSON, and the folder that it lies in."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        content = json.loads(path.read_text())
        rows = tuple(Row(**{**row, "goal": Goal(**row["goal"])}) for row in content["rows"])
        return cls(Machine(**content["machine"]), content["settings"], rows, content["grid"])
