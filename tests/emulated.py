"""The CUDA emulator as the tests use it: programs and, in :func:`library`, the library's own kernels."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
EMULATOR = ROOT / "csrc" / "emulator"
CACHE = ROOT / "build" / "emulated"


@cache
def emulator() -> ModuleType:
    """``csrc/emulator/emulate.py``, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("emulate", EMULATOR / "emulate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


needs_emulator = pytest.mark.skipif(
    sys.platform != "linux" or emulator().compiler() is None, reason="the emulator needs Linux and g++"
)


@cache
def program(source: Path, mode: str) -> Path:
    """A program built from one source, once."""
    CACHE.mkdir(parents=True, exist_ok=True)
    return emulator().build([source], CACHE / f"{source.stem}_{mode}", mode=mode, program=True, cache=CACHE)


def run(executable: Path, *arguments: str, **environment: object) -> subprocess.CompletedProcess[str]:
    """Runs a program; ThreadSanitizer needs an address space that is not randomised."""
    command = [str(executable), *arguments]
    if executable.name.endswith("_tsan"):
        command = ["setarch", "-R", *command]
    variables = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=120)
