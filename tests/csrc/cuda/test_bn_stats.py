"""Batch statistics in the emulator: layouts, dtypes, odd shapes, slices, large means, runs that must agree."""

from __future__ import annotations

import ctypes
import json

import pytest
import torch
from cuda_ops import DTYPES, LAYOUTS, check_bn_stats
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slices import empty_slice, far_apart

from fusedres.ops.bn_stats import BN_STATS
from fusedres.testing import assert_within_budget, channels_last, contiguous

relaxed = settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_sample", [False, True], ids=["batch", "samples"])
def test_against_float64(layout, dtype, per_sample):
    for shape in [(2, 37, 6, 5), (3, 64, 7, 7), (2, 8, 1, 1), (1, 1, 3, 3), (2, 300, 2, 2)]:
        check_bn_stats(LAYOUTS[layout](shape, dtype, 1), per_sample)


@relaxed
@given(
    n=st.integers(1, 4),
    c=st.integers(1, 70),
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    layout=st.sampled_from(sorted(LAYOUTS)),
    processors=st.integers(1, 5),
    per_sample=st.booleans(),
)
def test_any_shape(emulated, n, c, h, w, layout, processors, per_sample):
    emulated.emu_processors(processors)
    check_bn_stats(LAYOUTS[layout]((n, c, h, w)), per_sample)


@pytest.mark.parametrize("make", [channels_last, contiguous])
@pytest.mark.parametrize("mean", [1e3, -3e4, 1e6])
def test_a_large_mean_does_not_cancel_a_small_variance(make, mean):
    x = make((2, 19, 9, 8)) * 0.5 + mean
    ours = BN_STATS.overload("cuda")(x)
    exact = BN_STATS.overload("reference")(x.double())
    stock = torch.stack(torch.var_mean(x, (0, 2, 3), correction=0)[::-1])
    stock[1] *= x.numel() / x.shape[1]
    for row in (0, 1):
        assert_within_budget(ours[row], stock[row], exact[row], f"row {row}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("before", [3, 8])
def test_into_a_slice(dtype, before):
    x = channels_last((2, 16, 5, 3), dtype, 1)
    into, check = empty_slice(x.shape, dtype, before=before, behind=8)
    check_bn_stats(x, False, into)
    check()


def test_offsets_beyond_32_bits():
    x, into = far_apart(torch.bfloat16), far_apart(torch.bfloat16)
    x.copy_(contiguous(x.shape, torch.bfloat16))
    check_bn_stats(x, False, into)


def test_from_one_slice_of_a_buffer_into_another():
    buffer = channels_last((2, 24, 5, 3))
    check_bn_stats(buffer[:, :8], False, buffer[:, 16:])
    check_bn_stats(contiguous((2, 5, 4, 3)), True, torch.empty(2, 5, 4, 3))


@pytest.mark.parametrize("make", [channels_last, contiguous])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_spoil_their_channel_only(make, value):
    for at in [(0, 3, 0, 0), (1, 3, 2, 2)]:
        x = make((2, 9, 4, 3))
        x[at] = value
        ours, exact = BN_STATS.overload("cuda")(x), BN_STATS.overload("reference")(x.double())
        assert torch.equal(ours.isfinite(), exact.isfinite())
        assert not ours[1, 3].isfinite() and ours.isfinite().sum() == 16


@pytest.mark.parametrize("make", [channels_last, contiguous])
def test_bitwise_the_same_for_any_schedule(emulated, make):
    x = make((3, 48, 9, 9), torch.bfloat16)
    results = []
    for seed in range(1, 5):
        emulated.emu_seed(ctypes.c_uint64(seed))
        results.append(BN_STATS.overload("cuda")(x))
    assert all(torch.equal(result, results[0]) for result in results)


def test_empty_and_wrong_input():
    assert BN_STATS.overload("cuda")(channels_last((0, 3, 2, 2)), True).shape == (2, 0, 3)
    with pytest.raises(RuntimeError, match="holds no element"):
        BN_STATS.overload("cuda")(channels_last((0, 3, 2, 2)))
    with pytest.raises(RuntimeError, match="into"):
        BN_STATS.overload("cuda")(channels_last((2, 3, 2, 2)), False, channels_last((2, 4, 2, 2)))
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        BN_STATS.overload("cuda")(channels_last((2, 3, 2, 2)).double())


def test_accesses_are_coalesced(emulated):
    """What the tensor's loads move is what they need; so for 16 bytes a thread, and for one element."""
    emulated.emu_traffic.restype = ctypes.c_char_p
    emulated.emu_clear_traffic()
    emulated.emu_count_traffic(1)
    x = channels_last((2, 64, 8, 8), torch.bfloat16)
    BN_STATS.overload("cuda")(x)
    emulated.emu_count_traffic(0)
    entries = [json.loads(line) for line in emulated.emu_traffic().splitlines()]
    loads = [e for e in entries if e["at"].startswith("pack.h") and e["space"] == "global"]
    assert sum(e["sectors"] for e in loads) == x.numel() * x.element_size() // 32
    assert all(e["sectors"] == e["ideal"] for e in loads)
