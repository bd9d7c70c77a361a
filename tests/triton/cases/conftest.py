"""The cases run on a GPU, or in Triton's interpreter, which needs a process of its own: see test_interpreter.py."""

from __future__ import annotations

import os
from collections.abc import Iterator

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


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """Products of float32 in float32, by every implementation."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
