"""Memory over many steps: that it does not grow, and that growth would be seen."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch

from fusedres.analysis.peak import in_child
from fusedres.benchmarking.soak import LIMIT, Workload, growth
from fusedres.cli import main


def test_steps_leave_nothing_behind():
    assert growth(Workload(), 200) < LIMIT


def test_a_leak_is_seen():
    """In a process of its own: this one may have free memory for it from the tests before."""
    leak = "kept = []; print(growth(lambda: kept.append(torch.ones(8192)), 400))"  # 32 KiB each
    code = f"import torch; from fusedres.benchmarking.soak import growth; {leak}"
    assert int(subprocess.check_output([sys.executable, "-c", code])) > LIMIT


class _Heap(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", *"abcdef", "in_use", "free", "top")]


def in_use() -> int:
    """Bytes that were allocated with malloc and not freed: what a leak of a few bytes adds to at once."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Heap
    return libc.mallinfo2().in_use


def heap_growth(planted: int) -> int:
    """Of 100 steps, on one thread, that keep as many bytes each; after as many that fill what is filled once."""
    torch.set_num_threads(1)
    work, kept = Workload(), []
    for _ in range(100):
        work()
    return growth(lambda: (work(), kept.append(b"x" * planted if planted else None)), 100, size=in_use)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_steps_free_what_they_allocate():
    """To the byte, in a process of its own, in which nothing else allocates."""
    assert in_child(heap_growth, 0).result < 20_000
    assert in_child(heap_growth, 1000).result > 50_000


def test_command(capsys):
    assert main(["soak", "--steps", "20"]) == 0
    assert "no growth" in capsys.readouterr().out
    with pytest.raises(ValueError, match="at least 10, got 5"):
        growth(lambda: None, 5)
