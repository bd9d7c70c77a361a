"""What was found: one JSON file, written anew after every result, and a table that says what failed first."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["CUT_OFF", "FAILED", "OK", "RUNNING", "UNAVAILABLE", "Outcome", "Record", "table"]

OK, FAILED, CUT_OFF, UNAVAILABLE, RUNNING = "ok", "FAILED", "cut off", "unavailable", "running"


@dataclass
class Outcome:
    """How a stage ended.

    Attributes:
        status: :data:`OK`, :data:`FAILED`, :data:`CUT_OFF` for want of time, :data:`UNAVAILABLE` where the machine
            lacks something, or :data:`RUNNING`.
        summary: what was found, in a few words.
        problems: what went wrong, the first thing first, a line each.
        details: whatever else is worth keeping.
    """

    status: str = RUNNING
    summary: str = ""
    problems: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


class Record:
    """The file of results.

    Args:
        path: where it goes.
        about: what it begins with: budget, date, commit.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self._about = about
        self._started = time.monotonic()
        self._stages: dict[str, dict[str, Any]] = {}
        self.save()

    def put(self, name: str, outcome: Outcome, seconds: float) -> None:
        """Notes a stage's outcome so far, and writes the file."""
        self._stages[name] = {"name": name, "seconds": round(seconds, 1), **asdict(outcome)}
        self.save()

    def save(self) -> None:
        """Writes the file in one step: whoever reads it sees it whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {**self._about, "seconds": round(time.monotonic() - self._started, 1), "stages": self.stages}
        fresh = self.path.with_name(f".{self.path.name}.unfinished")
        fresh.write_text(json.dumps(content, indent=1) + "\n")
        fresh.replace(self.path)

    @property
    def stages(self) -> list[dict[str, Any]]:
        return list(self._stages.values())


def table(stages: Sequence[dict[str, Any]]) -> str:
    """The stages in lines of text, and under them the first problem of each that has one."""
    rows = [("stage", "status", "seconds", "found")]
    rows += [(s["name"], s["status"], f"{s['seconds']:.0f}", s["summary"]) for s in stages]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[3]]).rstrip() for row in rows]
    troubled = [s for s in stages if s["problems"]]
    for stage in troubled:
        more = len(stage["problems"]) - 1
        lines.append(f"{stage['name']}: {stage['problems'][0]}" + (f" (and {more} more)" if more else ""))
    return "\n".join(lines)
