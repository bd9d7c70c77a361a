"""Every kernel in Triton's interpreter: the cases beside this file, each in a process of its own.

A kernel is interpreted or compiled from its definition on, so that this process, which may compile, cannot do both.
``tests/cuda/test_triton.py`` runs the same cases on a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusedres import triton as backend

CASES = Path(__file__).parent / "cases"
ROOT = CASES.parents[2]


@pytest.mark.skipif(backend.missing() is not None, reason=str(backend.missing()))
@pytest.mark.parametrize("path", sorted(CASES.glob("case_*.py")), ids=lambda path: path.stem)
def test_interpreted(path):
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and " failed" not in result.stdout, result.stdout
