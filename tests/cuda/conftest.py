"""Tests in this folder need a GPU: ``pytest tests/cuda`` is the command for a machine that has one."""

from __future__ import annotations

import pytest

from fusedres import env


@pytest.fixture(autouse=True)
def gpu() -> None:
    reason = env.cuda_missing()
    if reason is not None:
        pytest.skip(f"needs a GPU: {reason}")
