"""What every suite in ``bench/`` shares.

A suite is ordinary pytest-benchmark: one group per op (or block, or network) and shape, the contestants in it beside
each other. A contestant's result is checked before it is timed. With ``--benchmark-disable`` everything runs once, on
small shapes: a smoke test.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from fusedres.env import env_report

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="session")
def smoke(request) -> bool:
    """Whether nothing is timed, so that small shapes will do."""
    return request.config.getoption("--benchmark-disable")


@pytest.fixture
def shape(request, smoke) -> tuple[int, ...]:
    """The parametrised shape; a small one of the same kind in a smoke test."""
    n, c, h, w = request.param
    return (min(n, 2), min(c, 64), min(h, 7), min(w, 7)) if smoke else request.param


@pytest.fixture(params=DTYPES)
def dtype(request) -> torch.dtype:
    return DTYPES[request.param]


@pytest.fixture
def race(benchmark) -> Callable[..., None]:
    """``race(group, call, dtype=..., ...)`` times ``call`` and notes what its time means."""

    def run(
        group: str,
        call: Callable[[], object],
        *,
        dtype: torch.dtype,
        touched: int = 0,
        images: int = 0,
        flops: int = 0,
    ) -> None:
        benchmark.group = group
        benchmark.extra_info.update(dtype=str(dtype), **_machine())
        benchmark.pedantic(call, rounds=9, iterations=_iterations(benchmark, call), warmup_rounds=2)
        if benchmark.stats is None:
            return
        seconds = benchmark.stats.stats.median
        if touched:
            benchmark.extra_info["GB/s"] = round(touched / seconds / 1e9, 2)
        if flops:
            benchmark.extra_info["TFLOP/s"] = round(flops / seconds / 1e12, 2)
        if images:
            benchmark.extra_info["images/s"] = round(images / seconds, 2)

    return run


def _iterations(benchmark, call: Callable[[], object]) -> int:
    """Enough calls for a round of about two milliseconds."""
    if not benchmark.enabled:
        return 1
    from fusedres.benchmarking import interleave

    return max(1, round(2e-3 / interleave({"": call}, turns=3).popitem()[1].median))


def _machine() -> dict[str, object]:
    report = env_report()
    return {"device": report.cpu, "gpus": report.gpus, "threads": report.threads, "torch": report.versions["torch"]}
