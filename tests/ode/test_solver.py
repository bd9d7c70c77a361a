"""The solvers by themselves: orders, steps, evaluations, and what they do when there is no way on."""

from __future__ import annotations

import math

import pytest
import torch
from odefuncs import Counting, oscillator

from fusedres.ode import METHODS, odeint

FIXED = [name for name, tableau in METHODS.items() if not tableau.adaptive]
START = torch.tensor([[1.0, 0.5], [-0.3, 2.0]], dtype=torch.float64)


def rotated(x, t: float):
    c, s = math.cos(t), math.sin(t)
    return torch.stack([c * x[..., 0] + s * x[..., 1], c * x[..., 1] - s * x[..., 0]], -1)


def error_of(t, **options) -> float:
    return float((odeint(oscillator, START, t, **options)[-1] - rotated(START, t[-1] - t[0])).abs().max())


@pytest.mark.parametrize("t", [(0.0, 2.0), (0.5, -1.0)], ids=["forward", "backward in time"])
@pytest.mark.parametrize("method", FIXED)
def test_the_error_falls_with_the_order(method, t):
    coarse, fine = (error_of(t, method=method, step_size=step) for step in (0.02, 0.01))
    assert math.log2(coarse / fine) == pytest.approx(METHODS[method].order, abs=0.15)


@pytest.mark.parametrize("t", [(0.0, 2.0), (0.5, -1.0)], ids=["forward", "backward in time"])
def test_the_error_follows_the_tolerance(t):
    errors = [error_of(t, rtol=tolerance, atol=tolerance) for tolerance in (1e-3, 1e-5, 1e-7, 1e-9)]
    for tolerance, error in zip((1e-3, 1e-5, 1e-7, 1e-9), errors):
        assert error < 10 * tolerance
    assert errors == sorted(errors, reverse=True)


def test_fixed_steps_go_from_time_to_time_or_by_their_size():
    function = Counting(oscillator)
    odeint(function, START, (0.0, 0.25, 1.0), method="euler")
    assert function.times == [0.0, 0.25]
    function.times.clear()
    odeint(function, START, (1.0, 0.0), method="midpoint", step_size=0.4)
    assert function.times == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.1])


@pytest.mark.parametrize("method", FIXED)
def test_fixed_steps_evaluate_each_stage_once(method):
    function = Counting(oscillator)
    odeint(function, START, (0.0, 1.0), method=method, step_size=0.125)
    assert len(function.times) == 8 * len(METHODS[method].c)


def test_a_step_of_dopri5_costs_six_evaluations():
    function = Counting(oscillator)
    odeint(function, START, (0.0, 1.0), first_step=0.5, rtol=1e-2, atol=1e-2)
    assert (len(function.times) - 1) % 6 == 0


def test_bounds_of_the_step():
    function = Counting(oscillator)
    odeint(function, START, (0.0, 1.0), first_step=1.0, max_step=0.0625, rtol=1.0, atol=1.0)
    assert len(function.times) == 1 + 16 * 6
    function.times.clear()
    odeint(function, START, (0.0, 1.0), first_step=1e-6, min_step=0.25, rtol=1e-9, atol=1e-12)  # accepted all the same
    assert len(function.times) == 1 + 4 * 6


def test_states_between_the_steps():
    times = tuple(0.1 * i for i in range(21))
    states = odeint(oscillator, START, times, rtol=1e-8, atol=1e-8)
    assert states.shape == (21, 2, 2)
    for t, state in zip(times, states):
        torch.testing.assert_close(state, rotated(START, t), rtol=1e-6, atol=1e-6)
    linear = odeint(lambda t, x: torch.ones_like(x), START, (0.0, 0.3, 1.0), method="rk4", step_size=0.5)
    torch.testing.assert_close(linear[1], START + 0.3)


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_and_an_empty_state(method):
    torch.testing.assert_close(odeint(lambda t, x: torch.zeros_like(x), START, method=method)[-1], START)
    empty = odeint(oscillator, START[:0], method=method)
    assert empty.shape == (2, 0, 2)


def test_a_state_that_explodes_ends_with_the_time_and_the_step():
    with pytest.raises(RuntimeError, match=r"dopri5: the step size .* at t = (0\.9|1\.0)\d* is too small to make"):
        odeint(lambda t, x: x * x, torch.ones(1, dtype=torch.float64), (0.0, 2.0))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_derivative_that_is_not_finite(value):
    with pytest.raises(RuntimeError, match=r"dopri5: the step size .* at t = 0\.0"):
        odeint(lambda t, x: torch.full_like(x, value), START)
    with pytest.raises(RuntimeError, match=r"dopri5: the step size .* at t = 0\.(2|3|4|5)"):
        odeint(lambda t, x: x if t < 0.5 else x * value, START, max_step=0.25)


def test_too_many_steps():
    with pytest.raises(RuntimeError, match=r"dopri5: max_num_steps=3 end at t = 0\.\d+, the next step size being 0"):
        odeint(oscillator, START, first_step=0.01, ifactor=1.0, max_num_steps=3)


def test_low_precision_is_updated_in_float32():
    """In bfloat16 arithmetic each of the four terms would be lost against one."""
    x, slope = torch.ones(64, dtype=torch.bfloat16), torch.tensor(0.01).bfloat16()
    y = odeint(lambda t, x: slope.expand_as(x), x, method="rk4")[-1]
    assert torch.equal(y, (x.float() + slope.float()).bfloat16())
    assert torch.equal(x + slope / 8 + 3 * slope / 8 + 3 * slope / 8 + slope / 8, x)
