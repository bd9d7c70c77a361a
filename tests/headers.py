"""Compiles a piece of C++ around a header of the kernels, once for an instruction set, to call it from a test."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fusedres import env

__all__ = ["FLAGS", "compiled"]

ROOT = Path(__file__).resolve().parents[1]
CXX = shutil.which(os.environ.get("CXX", "g++"))
FLAGS = {
    "scalar": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}


def compiled(source: str, isa: str, folder: Path, *defines: str) -> ctypes.CDLL:
    """The library made of ``source``; skips where there is no compiler, or this machine could not run it."""
    if CXX is None or platform.machine() != "x86_64":
        pytest.skip("needs a C++ compiler for x86-64")
    if isa != "scalar" and (not env.load_library() or isa not in torch.ops.fusedres.cpu_isas()):
        pytest.skip(f"this machine cannot run {isa}")
    (folder / "run.cpp").write_text(source)
    command = [CXX, "-std=c++17", "-O2", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", *FLAGS[isa], *defines]
    command += [f"-DFUSEDRES_ISA={isa}", f"-DFUSEDRES_ISA_{isa.upper()}", "run.cpp", "-o", "run.so"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return ctypes.CDLL(str(folder / "run.so"))
