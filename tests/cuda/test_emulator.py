"""The emulator's idea of CUDA is a GPU's: its program of instructions gives the same answers there."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from tools.gpu.probe import which

NVCC = which("nvcc")
SOURCE = Path(__file__).resolve().parents[1] / "csrc" / "emulator" / "semantics.cu"


@pytest.mark.skipif(NVCC is None, reason="nvcc was not found")
def test_instructions(tmp_path):
    major, minor = torch.cuda.get_device_capability()
    command = [NVCC, "-std=c++17", f"-arch=sm_{major}{minor}", "--expt-relaxed-constexpr", str(SOURCE)]
    subprocess.run([*command, "-o", str(tmp_path / "semantics")], check=True)
    result = subprocess.run([str(tmp_path / "semantics")], capture_output=True, text=True)
    assert result.stdout == "OK\n", result.stdout
