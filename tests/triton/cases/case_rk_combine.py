"""The updates of a Runge-Kutta step and the norm of its error, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fusedres
from fusedres.ops.rk_combine import RK_COMBINE, RK_COMBINE_BACKWARD, RK_ERROR
from fusedres.testing import assert_within_budget, channels_last, contiguous

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WEIGHTS = [0.125, -0.3, 1.0, 0.7, -1.4, 0.02, 2.0, 0.5, -0.25, 0.06, 0.9, -0.75, 0.11, 1.5, -2.0, 0.3, 0.8, 0.4]
TOLERANCES = (1e-3, 1e-4)
relaxed = settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])


def operands(device, make, shape, count, dtype=torch.float32):
    y, *stages = (make(shape, dtype, seed).to(device) for seed in range(count + 1))
    return y, stages, WEIGHTS[:count]


def wide(stages):
    return [t.double() for t in stages]


@pytest.mark.parametrize("make", [channels_last, contiguous])
@pytest.mark.parametrize("count", [0, 1, 6, 8, 9, 17])
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(device, dtype, count, make):
    y, stages, weights = operands(device, make, (2, 19, 9, 7), count, dtype)
    ours = RK_COMBINE.overload("triton")(y, stages, weights)
    assert ours.stride() == y.stride() and ours.dtype == dtype
    exact = RK_COMBINE.reference(y.double(), wide(stages), weights)
    assert_within_budget(ours, RK_COMBINE.reference(y, stages, weights), exact)

    found = RK_COMBINE_BACKWARD.overload("triton")(y, weights)
    plain, exact = (RK_COMBINE_BACKWARD.reference(t, weights) for t in (y, y.double()))
    assert len(found) == count
    for tensors in zip(found, plain, exact):
        assert tensors[0].stride() == y.stride()
        assert_within_budget(*tensors)

    if count:
        y1 = make(tuple(y.shape), dtype, 30).to(device)
        ours = RK_ERROR.overload("triton")(y, y1, stages, weights, *TOLERANCES)
        exact = RK_ERROR.reference(y.double(), y1.double(), wide(stages), weights, *TOLERANCES)
        assert ours.shape == () and ours.dtype == torch.float32
        assert_within_budget(ours, RK_ERROR.reference(y, y1, stages, weights, *TOLERANCES), exact)


@relaxed
@given(shape=st.lists(st.integers(0, 40), max_size=3), count=st.integers(1, 8))
def test_any_shape(device, shape, count):
    y, stages, weights = operands(device, contiguous, shape, count)
    for op, args in ((RK_COMBINE, (y, stages, weights)), (RK_ERROR, (y, stages[0], stages, weights, *TOLERANCES))):
        torch.testing.assert_close(op.overload("triton")(*args), op.reference(*args), rtol=1e-5, atol=1e-5)
    assert all(g.shape == y.shape for g in RK_COMBINE_BACKWARD.overload("triton")(y, weights))


def test_no_tolerance_for_what_is_not_there(device):
    """Beyond a tensor's end there are no elements whose tolerance could be zero."""
    y, stage = torch.full((5,), 2.0, device=device), torch.full((5,), 0.5, device=device)
    assert float(RK_ERROR.overload("triton")(y, y, [stage], [1.0], 0.5, 0.0)) == pytest.approx(0.5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", range(3))
def test_non_finite_values_travel_as_in_the_reference(device, where, value):
    y, stages, weights = operands(device, contiguous, (3, 50), 2)
    (y, *stages)[where][1, 7] = value
    for op, args in ((RK_COMBINE, (y, stages, weights)), (RK_ERROR, (y, stages[0] + 1, stages, weights, *TOLERANCES))):
        ours, expected = op.overload("triton")(*args), op.reference(*args)
        assert torch.equal(ours.isnan(), expected.isnan()) and torch.equal(ours.isinf(), expected.isinf())


def test_the_same_from_run_to_run(device):
    y, stages, weights = operands(device, contiguous, (9000,), 3)
    first, second = (RK_ERROR.overload("triton")(y, y, stages, weights, *TOLERANCES) for _ in range(2))
    assert torch.equal(first, second)


def test_the_public_function_runs_them(device):
    y, stages, weights = operands(device, channels_last, (2, 16, 8, 8), 3)
    leaves = [t.requires_grad_() for t in (y, *stages)]
    with fusedres.use_backend("triton"):
        grads = torch.autograd.grad(fusedres.ops.rk_combine(y, stages, weights).square().sum(), leaves)
    with fusedres.use_backend("stock"):
        expected = torch.autograd.grad(fusedres.ops.rk_combine(y, stages, weights).square().sum(), leaves)
    torch.testing.assert_close(grads, expected)


def test_wrong_operands_are_named(device):
    y = torch.zeros(2, 3, device=device)
    with pytest.raises(ValueError, match=r"stages\[1\] of shape \(3, 2\)"):
        RK_COMBINE.overload("triton")(y, [y, torch.zeros(3, 2, device=device)], [1.0, 1.0])
    with pytest.raises(ValueError, match="1 stages and 2 weights"):
        RK_COMBINE.overload("triton")(y, [y], [1.0, 1.0])
    with pytest.raises(ValueError, match="y1 of shape"):
        RK_ERROR.overload("triton")(y, y[:1], [y], [1.0], *TOLERANCES)
