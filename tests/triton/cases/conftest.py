"""The cases run on a GPU, or else in Triton's interpreter, which needs a process of its own: see test_interpreter.py."""

from __future__ import annotations

import os

import pytest
import torch

from fusedres import triton as backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    from fusedres.triton import interpreter

    interpreter.enable()

backend.load()


@pytest.fixture
def device() -> str:
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    return "cpu" if INTERPRETED else "cuda"
