"""What the compiled library needs of the torch that loads it: nothing but the stable ABI of torch 2.10."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fusedres import env

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "fusedres" / "_C.so"

pytestmark = pytest.mark.skipif(
    not LIBRARY.exists() or shutil.which("nm") is None, reason="needs the built library and nm"
)


def undefined() -> list[str]:
    command = ["nm", "-D", "--undefined-only", str(LIBRARY)]
    return [line.split()[-1] for line in subprocess.run(command, capture_output=True, text=True).stdout.splitlines()]


def test_only_the_stable_abi_is_needed():
    """The list holds functions of the stable ABI that torch 2.10 has; a new one must be looked up before it goes in."""
    # A CUDA build of torch exports parts of the standard library without versions; any libstdc++ has them too.
    unversioned = {name for name in undefined() if "@" not in name and not re.match(r"_ZN?K?St", name)}
    assert unversioned <= set((ROOT / "tests" / "stable_symbols.txt").read_text().split())


def test_no_cxx_symbol_of_torch_or_cuda_is_needed():
    """C++ names change between versions of torch; CUDA's run time is linked in."""
    foreign = re.compile(r"_ZN?K?(2at|3c10|5torch|5caffe)|^cuda|^cu[A-Z]")
    assert [name for name in undefined() if foreign.search(name)] == []


@pytest.mark.skipif(env.library_missing() is not None, reason=str(env.library_missing()))
def test_the_stream_is_asked_for_weakly():
    """So that the library loads in CPU builds of torch too; a CUDA kernel says what is missing when it is called."""
    listing = subprocess.run(["nm", "-D", str(LIBRARY)], capture_output=True, text=True).stdout
    if "aoti_torch_get_current_cuda_stream" in listing:  # a build without nvcc has no CUDA kernels
        assert re.search(r"\bw aoti_torch_get_current_cuda_stream\b", listing)
