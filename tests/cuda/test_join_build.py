"""The join's CUDA source compiles without warnings and without spilling registers; no GPU is needed."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")
@pytest.mark.parametrize("arch", ["90a"])
def test_join_does_not_spill(arch, tmp_path):
    torch = Path(importlib.util.find_spec("torch").origin).parent
    command = ["nvcc", "-std=c++17", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020A000000000000"]
    command += ["--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}", "-isystem", str(torch / "include")]
    command += ["-Xcompiler=-Wall,-Wextra,-Werror", f"-gencode=arch=compute_{arch},code=sm_{arch}", "--resource-usage"]
    command += ["-c", str(ROOT / "csrc/cuda/join.cu"), "-o", str(tmp_path / "join.o")]
    result = subprocess.run(command, capture_output=True, text=True)
    log = result.stdout + result.stderr
    assert result.returncode == 0, log
    assert "warning" not in log
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    kernels = len(re.findall(r"Compiling entry function", log))
    assert len(spills) == kernels == 12  # 3 dtypes, vectorised or not, 2 layouts
    assert set(spills) == {("0", "0")}
