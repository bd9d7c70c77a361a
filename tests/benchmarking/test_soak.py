"""Memory over many steps: that it does not grow, and that growth would be seen."""

from __future__ import annotations

import pytest
import torch

from fusedres.benchmarking.soak import LIMIT, Workload, growth
from fusedres.cli import main


def test_steps_leave_nothing_behind():
    assert growth(Workload(), 200) < LIMIT


def test_a_leak_is_seen():
    kept = []
    assert growth(lambda: kept.append(torch.ones(8192)), 400) > LIMIT  # 32 KiB each


def test_command(capsys):
    assert main(["soak", "--steps", "20"]) == 0
    assert "no growth" in capsys.readouterr().out
    with pytest.raises(ValueError, match="at least 10, got 5"):
        growth(lambda: None, 5)
