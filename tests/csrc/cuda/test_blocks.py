"""Whole blocks on the CUDA kernels, in the emulator: ``use_backend("cuda")`` with the CPU's convolutions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cuda_blocks import BLOCKS, check_block

from fusedres import select


@pytest.fixture(autouse=True)
def cuda_takes_cpu_tensors(monkeypatch) -> Iterator[None]:
    """The emulator's device is the CPU."""
    monkeypatch.setitem(select.BACKENDS, "cuda", lambda device_type, dtype: None)
    yield
    for cached in (select._resolve, select._kernels):
        cached.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_block(emulated, name, dtype, training):
    before = emulated.emu_launches()
    check_block(name, dtype, training, "cpu")
    assert emulated.emu_launches() > before
