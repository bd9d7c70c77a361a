"""The join in the emulator: every layout, dtype, residual, activation, gain and dropout."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from cuda_ops import DTYPES, LAYOUTS, RESIDUALS, JoinCase
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slices import far

from fusedres.ops.activations import ACTIVATIONS, Activation
from fusedres.ops.join import JOIN, JOIN_STATS
from fusedres.testing import channels_last, contiguous, transposed

ACTS = [Activation(name, 0.125) for name in ACTIVATIONS]
relaxed = settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_float64(layout, dtype):
    for shape, residual in itertools.product([(2, 37, 6, 5), (2, 64, 3, 3)], RESIDUALS):
        for gained, dropout in itertools.product((False, True), (0.0, 0.3)):
            JoinCase(shape, layout, dtype, residual, gained=gained, dropout=dropout).check_forward()


@pytest.mark.parametrize("act", ACTS, ids=str)
def test_activations(act):
    for layout, dtype in itertools.product(LAYOUTS, DTYPES):
        JoinCase((2, 16, 4, 3), layout, dtype, "affine", act).check_forward()


@relaxed
@given(
    n=st.integers(0, 3),
    c=st.integers(1, 70),
    h=st.integers(0, 9),
    w=st.integers(1, 9),
    layout=st.sampled_from(sorted(LAYOUTS)),
    residual=st.sampled_from(RESIDUALS),
    gained=st.booleans(),
    dropout=st.sampled_from([0.0, 0.5, 1.0]),
    normed=st.booleans(),
)
def test_any_shape(n, c, h, w, layout, residual, gained, dropout, normed):
    case = JoinCase((n, c, h, w), layout, residual=residual, gained=gained, dropout=dropout, normed=normed)
    out = JOIN.overload("cuda")(*case.operands, *case.modifiers)
    torch.testing.assert_close(out, JOIN.overload("reference")(*case.operands, *case.modifiers), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_against_float64(layout, dtype):
    for shape, residual in itertools.product([(2, 37, 6, 5), (3, 64, 3, 3), (1, 8, 1, 1)], RESIDUALS):
        for gained, dropout in itertools.product((False, True), (0.0, 0.3)):
            JoinCase(shape, layout, dtype, residual, ACTS[4], gained=gained, dropout=dropout).check_stats()


@relaxed
@given(
    n=st.integers(1, 4),
    c=st.integers(1, 70),
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    layout=st.sampled_from(sorted(LAYOUTS)),
    gained=st.booleans(),
    processors=st.integers(1, 5),
)
def test_statistics_of_any_shape(emulated, n, c, h, w, layout, gained, processors):
    emulated.emu_processors(processors)
    JoinCase((n, c, h, w), layout, residual="plain", gained=gained).check_stats()


def test_statistics_are_the_same_for_any_schedule(emulated):
    case = JoinCase((3, 48, 9, 9), "channels_last", torch.bfloat16, "affine", gained=True)
    results = []
    for seed in range(1, 4):
        emulated.emu_seed(ctypes.c_uint64(seed))
        results.append(case.check_stats())
    assert all(torch.equal(result, results[0]) for result in results)


def test_statistics_of_a_result_with_a_large_mean():
    """Relative to their first value: a large mean costs a small variance nothing."""
    case = JoinCase((2, 19, 9, 8), act=ACTS[0], normed=False)
    case.y.mul_(0.5).add_(3e4)
    case.check_stats()


@pytest.mark.parametrize("op", [JOIN, JOIN_STATS], ids=lambda op: op.name)
def test_offsets_beyond_32_bits(op):
    """Of both operands."""
    y, side = (contiguous((1, 8, 1, 5), torch.bfloat16, seed) for seed in (1, 2))
    near = [t.contiguous(memory_format=torch.channels_last) for t in (y, side)]
    found = [op.overload("cuda")(a, None, b, None, 1, 0.0) for a, b in (near, (far(y), far(side)))]
    found = [result if isinstance(result, tuple) else (result,) for result in found]
    assert all(torch.equal(ours, expected) for ours, expected in zip(*found))


def test_a_pixel_per_sample_of_a_slice():
    """Each sample is a group of one row here, and the rows lie an odd distance apart: no 16-byte accesses."""
    case = JoinCase((2, 4, 1, 1), "sliced", gained=True)
    case.check_forward()


def test_dropout_is_that_of_every_backend():
    y = channels_last((2, 12, 5, 3)).abs() + 1
    seed = torch.tensor([-5])
    out = JOIN.overload("cuda")(y, None, None, None, 0, 0.0, None, 0.4, seed)
    assert torch.equal(out == 0, JOIN.overload("reference")(y, None, None, None, 0, 0.0, None, 0.4, seed) == 0)
    same = JOIN.overload("cuda")(y.contiguous(), None, None, None, 0, 0.0, None, 0.4, seed)
    assert torch.equal(out, same)


def test_wrong_input():
    y = channels_last((2, 8, 4, 4))
    with pytest.raises(RuntimeError, match="layout"):
        JOIN.overload("cuda")(y, None, contiguous((2, 8, 4, 4)), None, 1, 0.0)
    with pytest.raises(RuntimeError, match="layout"):
        JOIN.overload("cuda")(transposed((2, 8, 4, 4)), None, None, None, 1, 0.0)
    with pytest.raises(RuntimeError, match="norm"):
        JOIN.overload("cuda")(y, torch.ones(4, 7), None, None, 1, 0.0)
    with pytest.raises(RuntimeError, match="activation"):
        JOIN.overload("cuda")(y, None, None, None, 99, 0.0)
    with pytest.raises(RuntimeError, match="join_stats_cuda: y holds no element"):
        JOIN_STATS.overload("cuda")(y[:0], None, None, None, 1, 0.0)
    with pytest.raises(RuntimeError, match="seed"):
        JOIN.overload("cuda")(y, None, None, None, 1, 0.0, None, 0.5, None)
    with pytest.raises(RuntimeError, match="gain"):
        JOIN.overload("cuda")(y, None, None, None, 1, 0.0, torch.ones(2, 7))
