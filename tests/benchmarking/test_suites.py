"""The suites in ``bench/`` are complete."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusedres.ops.registry import OPS

SUITES = Path(__file__).parents[2] / "bench" / "ops"


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_every_op_has_a_benchmark(op):
    stem = op.reference.__module__.rsplit(".", 1)[1]
    path = SUITES / f"test_{stem}.py"
    assert path.exists(), f"{op.name} is declared in fusedres/ops/{stem}.py, so its benchmark is bench/ops/{path.name}"
    assert f'OPS["{op.name}"]' in path.read_text()
