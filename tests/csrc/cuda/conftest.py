"""Tests in this folder run the CUDA kernels on the CPU, with every load and store checked."""

from __future__ import annotations

import ctypes

import pytest
from emulated import emulator, library

from fusedres import env


@pytest.fixture(autouse=True)
def emulated(request) -> ctypes.CDLL:
    """The emulator's controls; ``seed`` and ``processors`` may come from indirect parameters of the test."""
    if emulator().compiler() is None:
        pytest.skip("the emulator needs g++")
    if env.cuda_missing() is None:
        pytest.skip("this machine has a GPU: tests/cuda runs the kernels on it")
    controls = library()
    controls.emu_seed(ctypes.c_uint64(1))
    controls.emu_processors(2)
    controls.emu_l2_bytes(50 << 20)
    controls.emu_copies(0)
    controls.emu_fail(-1)
    return controls
