"""Peak resident memory, measured in a process of its own, so that nothing else is in it."""

from __future__ import annotations

import os
import pickle
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

__all__ = ["Measured", "in_child", "peak_resident", "resident"]

T = TypeVar("T")

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Measured(Generic[T]):
    """What a function returned in its child process, and that process's largest resident set in bytes."""

    result: T
    peak: int


def in_child(function: Callable[..., T], *args: Any, **kwargs: Any) -> Measured[T]:
    """Calls ``function`` in a fresh process, to and from which everything is pickled.

    Raises:
        RuntimeError: with the child's message, where the call raises or the process dies.
    """
    with tempfile.TemporaryDirectory() as folder:
        call, answer = Path(folder, "call"), Path(folder, "answer")
        call.write_bytes(pickle.dumps((function, args, kwargs)))
        # Not multiprocessing: that would run the caller's script again. What is printed is of no interest.
        code = "import sys; from fusedres.analysis.peak import _serve; _serve(*sys.argv[1:])"
        path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), *sys.path)))
        process = subprocess.run(
            [sys.executable, "-c", code, str(call), str(answer)],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if not answer.exists():
            last = process.stderr.strip().rpartition("\n")[2]
            raise RuntimeError(f"the process ended with status {process.returncode}" + (f": {last}" if last else ""))
        failure, result, peak = pickle.loads(answer.read_bytes())
    if failure:
        raise RuntimeError(failure)
    return Measured(result, peak)


def _serve(call: str, answer: str) -> None:
    """The child: makes the call that one file holds, and writes the other."""
    function, args, kwargs = pickle.loads(Path(call).read_bytes())
    try:
        content = (None, function(*args, **kwargs), peak_resident())
    except Exception as error:  # whatever the call may raise
        content = (f"{type(error).__name__}: {error}", None, 0)
    Path(answer).write_bytes(pickle.dumps(content))


def peak_resident() -> int:
    """The largest resident set of this process so far, in bytes."""
    # Not ru_maxrss where it can be helped: Linux lets a child begin with its parent's.
    if (peak := _status("VmHWM")) is not None:
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident() -> int:
    """The resident set of this process now, in bytes; its peak where the system does not tell."""
    now = _status("VmRSS")
    return peak_resident() if now is None else now


def _status(field: str) -> int | None:
    if not _STATUS.exists():
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None
