"""Memory over many steps: that it does not grow, and that growth would be seen."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fusedres.benchmarking.soak import LIMIT, Workload, growth
from fusedres.cli import main


def test_steps_leave_nothing_behind():
    assert growth(Workload(), 200) < LIMIT


def test_a_leak_is_seen():
    """In a process of its own: this one may have free memory for it from the tests before."""
    leak = "kept = []; print(growth(lambda: kept.append(torch.ones(8192)), 400))"  # 32 KiB each
    code = f"import torch; from fusedres.benchmarking.soak import growth; {leak}"
    assert int(subprocess.check_output([sys.executable, "-c", code])) > LIMIT


def test_command(capsys):
    assert main(["soak", "--steps", "20"]) == 0
    assert "no growth" in capsys.readouterr().out
    with pytest.raises(ValueError, match="at least 10, got 5"):
        growth(lambda: None, 5)
