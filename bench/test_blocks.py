"""Whole blocks, training and inference: eager, fused, and the fused formulas in plain PyTorch (reference)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fusedres.benchmarking import grid
from fusedres.benchmarking.shapes import name_of

SMOKE_SHAPE = (6, 64, 28, 28)
"""Large enough not to run as stock."""

CASES = list(grid.cases((None, torch.bfloat16)))


@pytest.mark.parametrize("contestant", ["eager", "fusedres", "reference"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_block(race, smoke, case, contestant):
    if smoke and case.shape != grid.SHAPES[0]:
        pytest.skip("one shape is enough for a smoke test")
    if smoke:
        case = replace(case, shape=SMOKE_SHAPE)
    backend = "reference" if contestant == "reference" else "auto"
    if contestant != "eager":
        grid.compared(case, backend).check()
    call = grid.contestants(case, backend)["eager" if contestant == "eager" else "fusedres"]
    race(f"{case.group} {name_of(case.shape)}", call, dtype=case.autocast or torch.float32, images=case.shape[0])
