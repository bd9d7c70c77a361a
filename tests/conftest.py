"""What every test runs under."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from gang import Gang
from torch.utils import deterministic

from fusedres import env, select

if find_spec("hypothesis") is None:
    sys.path.append(str(Path(__file__).parent / "without_hypothesis"))
else:
    from hypothesis import settings

    # The same cases in every run; ``--hypothesis-profile=default`` looks for new ones.
    settings.register_profile("suite", derandomize=True)
    settings.register_profile("fuzz", max_examples=500, print_blob=True)  # of each fuzz test: a slice of ``make fuzz``
    settings.load_profile("suite")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Uninitialised tensors hold NaN, those that C++ kernels allocate too, so that a read of one is seen.

    With ``warn_only``, because deterministic algorithms bring this along and nothing else of them is wanted.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    deterministic.fill_uninitialized_memory = fills


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Modules that a test builds start from the same numbers in every run and order."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_too_small(monkeypatch) -> None:
    """Fused kernels run at the sizes of tests, where a user's call would run as stock."""
    for mode in select.FEWEST_ELEMENTS:
        monkeypatch.setitem(select.FEWEST_ELEMENTS, mode, 0)


INSTRUCTION_SETS = list(torch.ops.fusedres.cpu_isas()) if env.library_missing() is None else []


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request) -> Iterator[str]:
    """Runs a test once per instruction set of this machine; skips it without the compiled library."""
    before = torch.ops.fusedres.cpu_isa()
    torch.ops.fusedres.set_cpu_isa(request.param)
    yield request.param
    torch.ops.fusedres.set_cpu_isa(before)


@pytest.fixture
def threads() -> Iterator[Callable[..., Any]]:
    """``threads(count, function, *args)``: calls the function with that many threads."""
    before = torch.get_num_threads()

    def call(count: int, function: Callable[..., Any], *args: Any) -> Any:
        torch.set_num_threads(count)
        return function(*args)

    yield call
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def gang() -> Iterator[Gang]:
    """Processes for jobs that several run together; started where a test first runs one."""
    gang = Gang()
    yield gang
    gang.close()
