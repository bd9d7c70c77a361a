"""A batch norm and the join behind it in the emulator: in one launch, and where that cannot be."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from cuda_ops import DTYPES, LAYOUTS, RESIDUALS, JoinCase, check_bn_join
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slices import far_apart

from fusedres.ops.activations import Activation
from fusedres.ops.bn_join import BN_JOIN
from fusedres.testing import assert_within_budget, channels_last, contiguous

relaxed = settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_against_float64(layout, dtype, residual):
    for shape, dropout in itertools.product([(2, 37, 6, 5), (2, 64, 3, 3)], (0.0, 0.3)):
        check_bn_join(JoinCase(shape, layout, dtype, residual, Activation("silu"), dropout=dropout))


@relaxed
@given(
    n=st.integers(1, 3),
    c=st.integers(1, 70),
    h=st.integers(2, 9),
    w=st.integers(1, 9),
    layout=st.sampled_from(sorted(LAYOUTS)),
    residual=st.sampled_from(RESIDUALS),
    affine=st.booleans(),
    running=st.sampled_from([None, torch.float32, torch.bfloat16, torch.float64]),
    processors=st.integers(1, 5),
)
def test_any_shape(emulated, n, c, h, w, layout, residual, affine, running, processors):
    emulated.emu_processors(processors)
    case = JoinCase((n, c, h, w), layout, residual=residual, act=Activation("gelu"))
    vectors = torch.rand(4, c) + 0.5
    found = []
    for overload in ("cuda", "reference"):
        gamma, beta, *buffers = vectors.clone().unbind(0)
        gamma, beta = (gamma, beta) if affine else (None, None)
        buffers = [None, None] if running is None else [t.to(running) for t in buffers]
        ending = (0.3, 1e-5, case.side, case.res_norm, case.act.code, case.act.param)
        found.append([*BN_JOIN.overload(overload)(case.y, gamma, beta, *buffers, *ending), *buffers])
    tolerance = 1e-2 if running == torch.bfloat16 else 1e-4
    torch.testing.assert_close(*(results[:2] for results in found), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*(results[2:] for results in found), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("l2_bytes", [0, 50 << 20])
def test_one_launch_where_the_tensor_stays_in_the_cache(emulated, l2_bytes):
    emulated.emu_l2_bytes(l2_bytes)
    before = emulated.emu_launches()
    check_bn_join(JoinCase((2, 16, 5, 3), residual="affine"))
    assert emulated.emu_launches() - before == (1 if l2_bytes else 4)


def test_a_large_mean_does_not_cancel_a_small_variance():
    y = channels_last((2, 19, 9, 8)) * 0.5 + 3e4
    rest = (None, None, None, None, 0.1, 1e-5, None, None, 0, 0.0)
    _, ours = BN_JOIN.overload("cuda")(y, *rest)
    _, exact = BN_JOIN.overload("reference")(y.double(), *rest)
    var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
    for row, stock in ((0, mean), (1, (var + 1e-5).rsqrt())):
        assert_within_budget(ours[row], stock, exact[row], f"row {row}")


def test_offsets_beyond_32_bits():
    y = far_apart()
    y.copy_(contiguous(y.shape))
    rest = (None, None, None, None, 0.1, 1e-5, None, None, 1, 0.0)
    for ours, expected in zip(BN_JOIN.overload("cuda")(y, *rest), BN_JOIN.overload("cuda")(y.clone(), *rest)):
        assert torch.equal(ours, expected)


def test_bitwise_the_same_for_any_schedule(emulated):
    case = JoinCase((3, 48, 9, 9), "channels_last", torch.bfloat16, "affine", Activation("silu"))
    results = []
    for seed in range(1, 4):
        emulated.emu_seed(ctypes.c_uint64(seed))
        results.append(check_bn_join(case))
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0]))


def test_wrong_input():
    y = channels_last((2, 8, 4, 4))
    rest = (0.1, 1e-5, None, None, 1, 0.0)
    with pytest.raises(RuntimeError, match="bn_join_cuda: y holds no element"):
        BN_JOIN.overload("cuda")(y[:0], None, None, None, None, *rest)
    with pytest.raises(RuntimeError, match="bn_join_cuda: gamma"):
        BN_JOIN.overload("cuda")(y, torch.ones(7), None, None, None, *rest)
    with pytest.raises(RuntimeError, match="bn_join_cuda: residual"):
        BN_JOIN.overload("cuda")(y, None, None, None, None, 0.1, 1e-5, y[:1], None, 1, 0.0)
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        BN_JOIN.overload("cuda")(y.double(), None, None, None, None, *rest)
