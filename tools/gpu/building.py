"""The stage ``build``: what is on this machine, the library for its GPU alone, and which backends then run."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

from .context import ROOT, Context
from .probe import capability
from .process import Finished
from .record import CUT_OFF, FAILED, OK, Outcome

__all__ = ["arch_of", "build", "unpacked"]

_PROBE_SECONDS = 90.0
_REPORT_SECONDS = 60.0
"""How long a process may take that imports torch and asks one thing; a first import reads gigabytes."""

_BUILT = ("_C.so", "_build.json")


def build(context: Context, deadline: float) -> Outcome:
    """Looks around, builds in place or unpacks a wheel, and asks the library what runs here."""
    outcome = Outcome()
    _probe(context, outcome, deadline)
    root = _small_project(context.scratch / "project") if context.dry else ROOT
    began = time.monotonic()
    problem = _library(context, root, deadline)
    outcome.details["build_seconds"] = round(time.monotonic() - began, 1)
    record = root / "fusedres" / "_build.json"
    outcome.details["build"] = json.loads(record.read_text()) if record.exists() else {}
    if problem:
        outcome.problems.append(problem)
    backends = _backends(context, deadline)
    outcome.details["backends"] = backends
    wanted = ("cpu",) if context.dry else ("cpu", "triton", "cuda")
    outcome.problems += [f"{name}: {backends[name]['detail']}" for name in wanted if not _available(backends, name)]
    running = [name for name in ("cpu", "triton", "cuda") if _available(backends, name)]
    arch = outcome.details["build"].get("archs") or "no GPU"
    outcome.summary = f"{outcome.details['build_seconds']:.0f} s for {arch}; running: {', '.join(running) or 'none'}"
    outcome.status = FAILED if outcome.problems else OK
    if time.monotonic() > deadline:
        outcome.status = CUT_OFF
    return outcome


def _probe(context: Context, outcome: Outcome, deadline: float) -> None:
    until = min(deadline, time.monotonic() + _PROBE_SECONDS)
    finished = context.python("probe", ["-m", "tools.gpu.probe"], until)
    try:
        context.probed.update(json.loads(finished.last_line()))
    except ValueError:
        outcome.problems.append(f"this Python ({sys.executable}) cannot be looked at: {finished.ending}")
    outcome.details["machine"] = context.probed
    if not context.dry and (error := context.probed.get("torch", {}).get("error")):
        outcome.problems.append(f"torch: {error}")
    context.note(outcome)


# ---------------------------------------------------------------------------------------------------------------------
# The library
# ---------------------------------------------------------------------------------------------------------------------


def arch_of(found: str | None) -> str | None:
    """What ``FUSEDRES_CUDA_ARCHS`` should be for a compute capability: with the features that this chip alone has,
    where the kernels know them."""
    if found is None:
        return None
    number = found.replace(".", "")
    return "90a" if number == "90" else number


def _library(context: Context, root: Path, deadline: float) -> str | None:
    """Builds the library, or unpacks the wheel where one was brought or the build fails; what is wrong, if anything."""
    if context.wheel is not None:
        return unpacked(context.wheel, root)
    # A user's compiler may warn; and where nvcc does not work, the rest is built and the record says why.
    environment = {"FUSEDRES_WERROR": "0", "FUSEDRES_CUDA": "0" if context.dry else "auto", "FUSEDRES_SKIP_BUILD": "0"}
    if arch := arch_of(capability(context.probed)):
        environment["FUSEDRES_CUDA_ARCHS"] = arch
    command = ["-m", "tools.gpu.build_in_place", str(root)]
    finished = context.python("build", command, deadline, environment=environment)
    problem = _what_went_wrong(finished, root, with_cuda=not context.dry)
    wheels = sorted(root.glob("dist/fusedres-*.whl"))
    if problem and wheels:
        other = unpacked(wheels[-1], root)
        return f"{problem}; dist/{wheels[-1].name} was taken instead{f', but {other}' if other else ''}"
    return problem


def _what_went_wrong(finished: Finished, root: Path, with_cuda: bool) -> str | None:
    if not finished.ok:
        telling = [line for line in finished.lines if re.search(r"\berror\b|^fusedres:", line, re.I)]
        return f"the build: {finished.ending}: {telling[0].strip() if telling else finished.last_line()}"
    record = json.loads((root / "fusedres" / "_build.json").read_text())
    if not record["built"]:
        return f"the library was not built: {record['reason']}"
    if with_cuda and not record["cuda"]:
        return f"the library was built without CUDA: {record['cuda_reason']}"
    return None


def unpacked(wheel: Path, root: Path) -> str | None:
    """Puts a wheel's library into the tree; what is wrong with it, if anything."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in _BUILT:
                fresh = root / "fusedres" / f"{name}.new"
                fresh.write_bytes(archive.read(f"fusedres/{name}"))
                fresh.replace(root / "fusedres" / name)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        return f"{wheel}: {error}"
    return None


_SMALL = ("setup.py", "csrc/library.cpp", "csrc/common/isa.h", "csrc/common/isa.cpp")


def _small_project(folder: Path) -> Path:
    """The build with hardly any source, for a dry run: it must not touch a library that tests are using."""
    for name in _SMALL:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_bytes() != (ROOT / name).read_bytes():
            shutil.copy(ROOT / name, target)
    (folder / "fusedres").mkdir(exist_ok=True)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# What runs
# ---------------------------------------------------------------------------------------------------------------------


def _backends(context: Context, deadline: float) -> dict[str, Any]:
    """Backends by name, as ``python -m fusedres env`` tells them."""
    until = max(deadline, time.monotonic() + _REPORT_SECONDS)  # everything later rests on it
    finished = context.python("env", ["-m", "fusedres", "env", "--json"], until)
    text = "\n".join(finished.lines)
    try:
        report = json.loads(text[text.index("{") :])
    except ValueError:
        reason = f"`python -m fusedres env`: {finished.ending}: {finished.last_line()}"
        return {name: {"available": False, "detail": reason} for name in ("cpu", "triton", "cuda")}
    return {backend["name"]: backend for backend in report["backends"]}


def _available(backends: dict[str, Any], name: str) -> bool:
    return backends[name]["available"]
