"""What the solvers are told, and what they refuse to be told."""

from __future__ import annotations

import math

import pytest
import torch

from fusedres.ode.settings import settings, times_of


def test_defaults_are_torchdiffeqs():
    chosen = settings("dopri5")
    assert (chosen.rtol, chosen.atol) == (1e-7, 1e-9)
    assert (chosen.safety, chosen.ifactor, chosen.dfactor) == (0.9, 10.0, 0.2)
    assert (chosen.first_step, chosen.min_step, chosen.max_step) == (None, 0.0, math.inf)


@pytest.mark.parametrize(
    "method, options, error, message",
    [
        ("rk5", {}, ValueError, "method must be one of 'euler', 'midpoint', 'rk4', 'dopri5', got 'rk5'"),
        ("rk4", {"stepsize": 0.1}, TypeError, "unknown option 'stepsize'; there are rtol, atol, step_size"),
        ("rk4", {"step_size": "0.1"}, TypeError, "step_size must be a number, got str"),
        ("rk4", {"step_size": 0.0}, ValueError, "step_size must be positive, got 0.0"),
        ("rk4", {"first_step": 0.1}, ValueError, "first_step means nothing to method='rk4'"),
        ("dopri5", {"step_size": 0.1}, ValueError, "step_size means nothing to method='dopri5'"),
        ("dopri5", {"rtol": -1.0}, ValueError, "rtol must be positive, got -1.0"),
        ("dopri5", {"rtol": math.nan}, ValueError, "rtol must be positive, got nan"),
        ("dopri5", {"min_step": 0.2, "max_step": 0.1}, ValueError, "min_step must be at most max_step"),
    ],
)
def test_refused_options(method, options, error, message):
    with pytest.raises(error, match=message):
        settings(method, **options)


def test_fixed_steps_take_tolerances_without_reading_them():
    assert settings("euler", rtol=1e-3, atol=1e-3).step_size is None


@pytest.mark.parametrize("t", [(0, 1), [0.0, 1.0], torch.tensor([0, 1]), torch.tensor([0.0, 1.0], dtype=torch.float64)])
def test_times(t):
    assert times_of(t) == (0.0, 1.0)


@pytest.mark.parametrize(
    "t, error, message",
    [
        (1.0, TypeError, "t must be a tensor or a tuple of numbers, got 1.0"),
        (("0", "1"), TypeError, "t must be a tensor or a tuple of numbers"),
        ((0.0,), ValueError, "two or more finite times"),
        ((0.0, math.inf), ValueError, "two or more finite times"),
        ((0.0, math.nan), ValueError, "two or more finite times"),
        ((0.0, 1.0, 1.0), ValueError, "strictly increasing or strictly decreasing"),
        ((0.0, 1.0, 0.5), ValueError, "strictly increasing or strictly decreasing"),
        (torch.zeros(2, 1), ValueError, r"one dimension, got shape \(2, 1\)"),
        (torch.tensor([0.0, 1.0], requires_grad=True), ValueError, "t must not require a gradient"),
    ],
)
def test_refused_times(t, error, message):
    with pytest.raises(error, match=message):
        times_of(t)
