"""Every kernel in Triton's interpreter: the cases beside this file, each in a process of its own.

A kernel is interpreted or compiled from its definition on, so that this process, which may compile, cannot do both.
``tests/cuda/test_triton.py`` runs the same cases on a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fusedres import triton as backend
from fusedres.triton.interpreter import _mend_integers

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


@pytest.mark.parametrize(
    "index",
    [lambda self: int(self.handle.data), lambda self: int(self.handle.data.squeeze())],
    ids=["Triton 3.6", "Triton 3.7"],
)
def test_a_tensor_of_one_element_is_an_integer(index):
    """Of 3.6 not by itself, from NumPy 2.4 on."""

    def patch(tensor, scope):
        scope.set_attr(tensor, "__index__", index)

    class Tensor:
        handle = SimpleNamespace(data=np.array([3], np.int32))

    interpreter, scope = SimpleNamespace(_patch_lang_tensor=patch), SimpleNamespace(set_attr=setattr)
    patch(Tensor, scope)
    try:
        works = int(Tensor()) == 3
    except TypeError:
        works = False
    _mend_integers(interpreter)
    assert (interpreter._patch_lang_tensor is patch) == works
    interpreter._patch_lang_tensor(Tensor, scope)
    assert list(range(Tensor())) == [0, 1, 2]
