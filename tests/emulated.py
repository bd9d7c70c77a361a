"""The CUDA emulator as the tests use it: programs and, in :func:`library`, the library's own kernels."""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

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


@contextmanager
def building() -> Iterator[None]:
    """One of several test processes builds, and the others find it built."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@cache
def program(source: Path, mode: str) -> Path:
    """A program built from one source, once."""
    with building():
        return emulator().build([source], CACHE / f"{source.stem}_{mode}", mode=mode, program=True, cache=CACHE)


def run(executable: Path, *arguments: str, **environment: object) -> subprocess.CompletedProcess[str]:
    """Runs a program; ThreadSanitizer needs an address space that is not randomised."""
    command = [str(executable), *arguments]
    if executable.name.endswith("_tsan"):
        command = ["setarch", "-R", *command]
    variables = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=120)


@cache
def library(mode: str = "check") -> ctypes.CDLL:
    """The library's own CUDA kernels, loaded into torch as kernels for tensors on the CPU, once per process.

    The result sets the emulator's controls: ``library().emu_seed(2)``.
    """
    torch_folder = Path(torch.__file__).parent
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    with building():
        path = emulator().build(
            sources,
            CACHE / f"fusedres_cuda_{mode}.so",
            mode=mode,
            includes=[ROOT / "csrc"],
            system_includes=[torch_folder / "include"],
            defines=["TORCH_TARGET_VERSION=0x020A000000000000"],
            libraries=[f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu"],
            cache=CACHE,
        )
    torch.ops.load_library(str(path))
    return ctypes.CDLL(str(path))
