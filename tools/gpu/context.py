"""What every stage is given."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import process
from .process import Finished, Log
from .record import Outcome

__all__ = ["ROOT", "Context"]

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Context:
    """Where a stage works, and how it says what it has found.

    Attributes:
        out: the folder of results.
        scratch: for what is of no interest afterwards; it lasts from one run to the next.
        dry: on the CPU, with small stand-ins.
        note: keeps a stage's outcome so far, should everything end now.
        probed: what :mod:`tools.gpu.probe` found.
    """

    out: Path
    scratch: Path
    log: Log
    dry: bool
    note: Callable[[Outcome], None] = lambda outcome: None
    probed: dict[str, Any] = field(default_factory=dict)
    wheel: Path | None = None

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def run(
        self,
        job: str,
        command: Sequence[str],
        deadline: float,
        environment: Mapping[str, str] | None = None,
        on_line: Callable[[str], None] = lambda line: None,
        cwd: Path = ROOT,
    ) -> Finished:
        """Runs a command with the variables that every child gets."""
        variables = {
            "PYTHONPATH": str(ROOT),
            # Compiled kernels of this run, for the next one on this machine.
            "TRITON_CACHE_DIR": str(self.scratch / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.scratch / "inductor"),
            "FUSEDRES_CACHE": str(self.out),
            # Else PyTorch warns of cuBLAS in every test, whose fixture asks for deterministic algorithms.
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        }
        return process.run(
            job, command, self.log, deadline, cwd=cwd, environment={**variables, **(environment or {})}, on_line=on_line
        )

    def python(self, job: str, arguments: Sequence[str], deadline: float, **options: Any) -> Finished:
        """The same for this Python."""
        return self.run(job, [sys.executable, *arguments], deadline, **options)
