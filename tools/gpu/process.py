"""Running a command with a time limit: its output goes to the log line by line, and nothing of it outlives us."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Finished", "Log", "end_all", "run"]

_KEPT_LINES = 400
_GRACE = 5.0
"""Seconds between asking a process to end and ending it."""

# A group, so that a time limit ends what the command has started too; not a session, which outlives a killed terminal.
_GROUP = {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}

_running: set[subprocess.Popen] = set()


class Log:
    """The file that holds everything that was printed; each line names its job."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", errors="replace")
        self._lock = threading.Lock()

    def write(self, job: str, line: str) -> None:
        with self._lock:
            self._file.write(f"[{job}] {line.rstrip()}\n")
            self._file.flush()


@dataclass(frozen=True)
class Finished:
    """How a command ended.

    Attributes:
        status: its exit status, negative for a signal; ``None`` where it was ended for want of time.
        lines: the last lines of its output.
    """

    status: int | None
    seconds: float
    lines: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return self.status == 0

    @property
    def ending(self) -> str:
        """In words, for a table."""
        if self.status is None:
            return f"ended after {self.seconds:.0f} s: no time left"
        if self.status < 0:
            return f"ended by {signal.Signals(-self.status).name}"
        return f"exit status {self.status}"

    def last_line(self, default: str = "no output") -> str:
        return next((line for line in reversed(self.lines) if line.strip()), default).strip()


def run(
    job: str,
    command: Sequence[str],
    log: Log,
    deadline: float,
    *,
    cwd: Path,
    environment: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] = lambda line: None,
) -> Finished:
    """Runs ``command`` until it ends or ``deadline``, a time of ``time.monotonic()``, has come.

    Args:
        job: its name in the log.
        environment: variables beside those of this process.
        on_line: is told every line as it comes.
    """
    start = time.monotonic()
    log.write(job, "$ " + " ".join(command))
    kept: deque[str] = deque(maxlen=_KEPT_LINES)
    try:
        process = subprocess.Popen(
            list(command),
            cwd=cwd,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            **_GROUP,
        )
    except OSError as error:
        log.write(job, str(error))
        return Finished(127, 0.0, (str(error),))

    def read() -> None:
        for line in process.stdout:
            kept.append(line.rstrip("\n"))
            log.write(job, line)
            on_line(line.rstrip("\n"))

    _running.add(process)
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    status: int | None
    try:
        status = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        status = None
    finally:
        _end(process)
        _running.discard(process)
    reader.join(_GRACE)
    finished = Finished(status, time.monotonic() - start, tuple(kept))
    log.write(job, f"({finished.ending}, {finished.seconds:.1f} s)")
    return finished


def end_all() -> None:
    """Ends whatever still runs."""
    for process in list(_running):
        _end(process)


def _end(process: subprocess.Popen) -> None:
    """Ends a process and what it has started; what it has left behind too, where it has ended by itself."""
    for sign, grace in ((signal.SIGTERM, _GRACE), (signal.SIGKILL, _GRACE)):
        try:
            os.killpg(process.pid, sign)
        except (ProcessLookupError, PermissionError):
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
