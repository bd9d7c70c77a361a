"""What every suite in ``bench/`` shares.

A suite is ordinary pytest-benchmark: one group per op (or block, or network) and shape, the contestants in it beside
each other. A contestant's result is checked before it is timed, and a group's contestants are timed in turns, for which
see ``racing.py``. With ``--benchmark-disable`` everything runs once, on small shapes: a smoke test. ``--results FILE``
writes what was measured in the form that every command here reads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.racing import CLOCK, Groups, replay
from bench.shapes import SMOKE_MOST, name_of
from fusedres.benchmarking.race import Entrant
from fusedres.benchmarking.results import Measurement

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--results",
        type=Path,
        metavar="FILE",
        help="write the measurements, as fusedres bench --json does; a GPU's to FILE with -cuda behind its stem",
    )


def pytest_collection_modifyitems(config, items) -> None:
    """Gives every test the clock; keeps of a smoke test those that differ in more than the sizes."""
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))
    if config.getoption("--benchmark-disable"):
        first = {_but_for_sizes(item): item for item in reversed(items)}
        kept = set(first.values())
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]


def _but_for_sizes(item) -> tuple[object, ...]:
    """The test and its parameters, with sizes replaced by what they are sizes of."""
    if not hasattr(item, "callspec"):
        return (item.nodeid,)
    params = {name: getattr(value, "group", value) for name, value in item.callspec.params.items()}
    sizes = {name: None for name in ("shape", "batch") if name in params}
    return (item.path, item.originalname, *map(str, {**params, **sizes}.items()))


@pytest.fixture(scope="session")
def smoke(request) -> bool:
    """Whether nothing is timed, so that small shapes will do."""
    return request.config.getoption("--benchmark-disable")


@pytest.fixture(scope="session")
def groups(request, smoke):
    """What every group has found, written at the end."""
    found = Groups(smoke)
    yield found
    if (path := request.config.getoption("--results")) is not None:
        for device, results in found.results().items():
            results.save(path if device == "cpu" else path.with_stem(f"{path.stem}-{device}"))


@pytest.fixture
def shape(request, smoke) -> tuple[int, ...]:
    """The parametrised shape; a small one of the same kind in a smoke test."""
    return tuple(map(min, request.param, SMOKE_MOST)) if smoke else request.param


@pytest.fixture(params=DTYPES)
def dtype(request) -> torch.dtype:
    return DTYPES[request.param]


@pytest.fixture
def enter(request, benchmark, groups) -> Callable[..., None]:
    """``enter(group, contestant, entrants)``: races the group if it has not been, and reports the contestant."""

    def run(
        group: Measurement,
        contestant: str,
        entrants: Callable[[], Sequence[Entrant]],
        turns: int = 9,
        seconds: float = 2e-3,
        device: str = "cpu",
    ) -> None:
        finish = groups.finish(group, contestant, entrants, turns, seconds, device)
        replay(benchmark, finish, group.group, device)

    return run


def pytest_make_parametrize_id(val) -> str | None:
    """Shapes by their sizes."""
    return name_of(val) if isinstance(val, tuple) and all(isinstance(size, int) for size in val) else None
