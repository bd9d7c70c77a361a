"""Residual stacks and the differential equation that they approach."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fusedres.analysis import residual_as_ode
from fusedres.analysis.residual_as_ode import ConvolutionalODE
from fusedres.cli import main


def test_decay_by_hand():
    """``dx/dt = -x``: a stack of K blocks gives ``(1 - 1/K)^K``, the solution is ``1/e``."""
    found = residual_as_ode(lambda t, x: -x, torch.ones(3, dtype=torch.float64), (1, 2, 8, 32))
    expected = [abs((1 - 1 / k) ** k - math.exp(-1)) / math.exp(-1) for k in found.steps]
    assert found.errors == pytest.approx(expected, rel=1e-6)
    assert found.reference_error < 1e-8


def test_time_is_passed_on():
    """``dx/dt = t`` from 1 to 3: ``x + 4``; Euler's method is short by ``h``."""
    x = torch.zeros(1, dtype=torch.float64)
    found = residual_as_ode(lambda t, x: torch.ones_like(x) * t, x, (2, 4), (1.0, 3.0))
    assert found.errors == pytest.approx([1.0 / 4, 0.5 / 4])


def test_first_order_as_the_stack_deepens():
    f, x = ConvolutionalODE(2, 4).double(), torch.randn(2, 2, 5, 5, dtype=torch.float64)
    found = residual_as_ode(f, x, (16, 32, 64, 128))
    assert all(0.9 < order < 1.1 for order in found.orders)
    assert list(found.errors) == sorted(found.errors, reverse=True)


@pytest.mark.parametrize("steps", [(), (0, 1), (2, 2), (4, 2)])
def test_steps_must_increase(steps):
    with pytest.raises(ValueError, match="steps must increase from at least 1"):
        residual_as_ode(lambda t, x: x, torch.ones(1), steps)


def test_a_function_of_another_shape():
    with pytest.raises(ValueError, match=r"\(2,\), got \(1,\)"):
        residual_as_ode(lambda t, x: x[:1], torch.ones(2))


def test_the_command(tmp_path, capsys):
    figure, results = tmp_path / "figure.png", tmp_path / "results.json"
    assert main(["residual-as-ode", "--steps", "1", "2", "4", "--out", str(figure), "--json", str(results)]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    content = json.loads(results.read_text())
    assert len(content["errors"]) == 3
    assert len(content["orders"]) == 2
    assert "order" in capsys.readouterr().out
    assert main(["residual-as-ode", "--steps", "4", "2"]) == 2
