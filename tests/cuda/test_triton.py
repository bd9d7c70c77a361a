"""Every Triton kernel on a GPU: the cases that ``tests/triton/test_interpreter.py`` runs without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedres import triton as backend

ROOT = Path(__file__).parents[2]
CASES = sorted((ROOT / "tests" / "triton" / "cases").glob("case_*.py"))

pytestmark = [
    pytest.mark.skipif(backend.missing() is not None, reason=str(backend.missing())),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_on_the_gpu(path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", str(path)]
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment | {"PYTHONPATH": str(ROOT)}, cwd=ROOT
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and " failed" not in result.stdout, result.stdout
