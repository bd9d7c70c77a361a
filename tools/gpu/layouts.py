"""The stage ``layouts``: what the emulator assumes of the hardware, and what the library assumes of torch.

The program ``tests/csrc/emulator/semantics.cu`` loads and multiplies matrices with every instruction that the
emulator knows and compares each lane's fragment with the definition; the tests without a GPU run it in the emulator.
Here it runs on the GPU: the same answers mean that the fragments lie where the kernels, tested in the emulator, look.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from .building import arch_of
from .context import ROOT, Context
from .probe import capability, which
from .record import CUT_OFF, FAILED, OK, UNAVAILABLE, Outcome

__all__ = ["layouts"]

_PROGRAM = ROOT / "tests" / "csrc" / "emulator" / "semantics.cu"
_OLDEST = "80"
"""The architecture that the program needs at least, where nobody says what the GPU is."""

_EMULATE = ROOT / "csrc" / "emulator" / "emulate.py"


def layouts(context: Context, deadline: float) -> Outcome:
    """Builds and runs the program, then looks at the library's symbols and at the stream that its kernels run on."""
    outcome = Outcome()
    _fragments(context, outcome, deadline)
    context.note(outcome)
    _stream(context, outcome, deadline)
    found = [f"{name} {told}" for name, told in outcome.details.items()]
    outcome.summary = "; ".join(found)
    outcome.status = FAILED if outcome.problems else OK
    if time.monotonic() > deadline:
        outcome.status = CUT_OFF
    elif all(told.startswith(UNAVAILABLE) for told in outcome.details.values()):
        outcome.status = UNAVAILABLE
    return outcome


def _fragments(context: Context, outcome: Outcome, deadline: float) -> None:
    program = context.scratch / "semantics"
    command = _compile_command(context, program)
    if command is None:
        outcome.details["fragments"] = f"{UNAVAILABLE}: no nvcc"
        return
    built = context.run("semantics: build", command, deadline)
    if not built.ok:
        errors = [line for line in built.lines if "error:" in line]
        outcome.details["fragments"] = "no time left" if built.status is None else "not built"
        outcome.problems.append(f"semantics.cu: {built.ending}: {errors[0].strip() if errors else built.last_line()}")
        return
    ran = context.run("semantics", [str(program)], deadline)
    outcome.details["fragments"] = "as the emulator has them" if ran.ok else "WRONG"
    if not ran.ok:
        wrong = "; ".join(line for line in ran.lines if line != "FAILED")
        outcome.problems.append(f"semantics.cu: {ran.ending}: {wrong or 'no output'}")


def _compile_command(context: Context, program: Path) -> list[str] | None:
    if context.dry:
        return [sys.executable, str(_EMULATE), str(_PROGRAM), "--program", "-o", str(program)]
    nvcc, arch = which("nvcc"), arch_of(capability(context.probed)) or _OLDEST
    if nvcc is None:
        return None
    return [nvcc, "-std=c++17", f"-arch=sm_{arch}", "--expt-relaxed-constexpr", str(_PROGRAM), "-o", str(program)]


def _stream(context: Context, outcome: Outcome, deadline: float) -> None:
    finished = context.python("stream", ["-m", "tools.gpu.stream", context.device], deadline)
    try:
        told = json.loads(finished.last_line())
    except ValueError:
        outcome.details["stream"] = "not looked at"
        outcome.problems.append(f"stream: {finished.ending}: {finished.last_line()}")
        return
    outcome.details["stream"] = told["told"]
    outcome.problems += [f"stream: {problem}" for problem in told["problems"]]
