"""The Runge-Kutta updates and the norm of their error, in the emulator."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from cuda_ops import DENSE, DTYPES, TOLERANCES, check_rk, check_rounded_tolerances, rk_operands
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusedres.ops.rk_combine import RK_COMBINE, RK_COMBINE_BACKWARD, RK_ERROR
from fusedres.testing import channels_last, contiguous

relaxed = settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", DENSE)
def test_against_float64(layout, dtype):
    for stages in range(8):
        check_rk(DENSE[layout], (2, 13, 7, 5), stages, dtype, "cpu")


@relaxed
@given(
    shape=st.one_of(
        st.tuples(st.integers(0, 3), st.integers(1, 33), st.integers(0, 7), st.integers(1, 7)),
        st.tuples(st.integers(0, 9), st.integers(1, 99)),
        st.just(()),
    ),
    layout=st.sampled_from(sorted(DENSE)),
    stages=st.integers(0, 7),
    processors=st.integers(1, 3),
)
def test_any_shape(emulated, shape, layout, stages, processors):
    emulated.emu_processors(processors)
    check_rk(DENSE[layout] if len(shape) == 4 else contiguous, shape, stages, torch.float32, "cpu")


def test_walks_its_grid(emulated):
    """More packs than threads: each takes several, the last of them partial."""
    emulated.emu_processors(1)
    check_rk(contiguous, (9001,), 2, torch.float32, "cpu")


@pytest.mark.parametrize("at", [1, 3])
def test_addresses_that_allow_no_wide_access(at):
    y, _, stages, weights = rk_operands(contiguous, (70,), 2, torch.bfloat16, "cpu")
    expected = RK_COMBINE.overload("cuda")(y[at:].clone(), [k[at:].clone() for k in stages], weights)
    assert torch.equal(RK_COMBINE.overload("cuda")(y[at:], [k[at:] for k in stages], weights), expected)


def test_no_tolerance_for_what_is_not_there():
    """Beyond a tensor's end there are no elements whose tolerance could be zero."""
    y, stage = torch.full((5,), 2.0), torch.full((5,), 0.5)
    assert float(RK_ERROR.overload("cuda")(y, y, [stage], [1.0], 0.5, 0.0)) == pytest.approx(0.5)


def test_tolerances_that_float32_rounds():
    check_rounded_tolerances("cpu")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_values_travel_as_in_stock(value):
    for where in range(4):
        y0, y1, stages, weights = rk_operands(contiguous, (70,), 2, torch.float32, "cpu")
        (y0, y1, *stages)[where][40] = value
        for op, args in ((RK_COMBINE, (y0, stages, weights)), (RK_ERROR, (y0, y1, stages, weights, *TOLERANCES))):
            ours, expected = (op.overload(name)(*args) for name in ("cuda", "reference"))
            assert torch.equal(ours.isnan(), expected.isnan()) and torch.equal(ours.isinf(), expected.isinf())


def test_bitwise_the_same_for_any_schedule(emulated):
    y0, y1, stages, weights = rk_operands(channels_last, (3, 16, 9, 9), 4, torch.bfloat16, "cpu")
    results = []
    for seed in range(1, 4):
        emulated.emu_seed(ctypes.c_uint64(seed))
        results.append(RK_ERROR.overload("cuda")(y0, y1, stages, weights, *TOLERANCES))
    assert all(torch.equal(result, results[0]) for result in results)


def test_wrong_input():
    y = torch.zeros(2, 3, 4, 5)
    with pytest.raises(RuntimeError, match="2 stages and 1 weights"):
        RK_COMBINE.overload("cuda")(y, [y, y], [1.0])
    with pytest.raises(RuntimeError, match="a stage differs"):
        RK_COMBINE.overload("cuda")(y, [y[:1]], [1.0])
    with pytest.raises(RuntimeError, match="contiguous"):
        RK_ERROR.overload("cuda")(y, y, [y.contiguous(memory_format=torch.channels_last)], [1.0], 1e-3, 1e-3)
    with pytest.raises(RuntimeError, match="at most 128 stages, got 129"):
        RK_COMBINE_BACKWARD.overload("cuda")(y, [1.0] * 129)
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        RK_COMBINE.overload("cuda")(y.double(), [], [])
