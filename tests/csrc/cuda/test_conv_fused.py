"""Grouped convolutions with what surrounds them, in the emulator, against float64."""

from __future__ import annotations

import ctypes
import json

import pytest
import torch
from cuda_convs import ACTS, DTYPES, GEOMETRIES, GROUPS, GroupedCase
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slices import empty_slice, far, far_apart
from torch import Tensor

from fusedres.ops.conv import ConvGeometry
from fusedres.ops.conv_fused import CONV_FUSED_FPROP, CONV_FUSED_JOIN, conv_fused_refuses
from fusedres.ops.conv_fused_backward import CONV_FUSED_DGRAD, CONV_FUSED_WGRAD
from fusedres.testing import channels_last, transposed

relaxed = settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", GROUPS, ids=str)
def test_against_float64(channels, dtype):
    c, filters, groups = channels
    for stride, prologue in (((1, 1), True), ((2, 2), False)):
        case = GroupedCase((2, c, 7, 6), filters, groups, dtype, stride=stride, prologue=prologue)
        case.check_fprop(bias=prologue)
        case.check_join("affine" if prologue else "none")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_geometries(geometry, dtype):
    for c, groups in ((16, 4), (16, 2), (24, 24)):
        GroupedCase((2, c, 9, 11), c, groups, dtype, **geometry).check_fprop()


@pytest.mark.parametrize("act", ACTS, ids=str)
def test_activations(act):
    case = GroupedCase((1, 16, 5, 4), 16, 4, act=act)
    case.check_fprop()
    case.check_join("plain")


@relaxed
@given(
    n=st.integers(1, 5),
    h=st.integers(1, 20),
    w=st.integers(1, 20),
    channels=st.sampled_from([(16, 4), (40, 10), (72, 9), (48, 2), (32, 1), (24, 24), (104, 104)]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dtype=st.sampled_from(DTYPES),
    pitch=st.sampled_from([0, 8]),
    processors=st.integers(1, 9),
)
def test_any_shape(emulated, n, h, w, channels, kernel, stride, padding, dtype, pitch, processors):
    emulated.emu_processors(processors)
    c, groups = channels
    h, w = max(h, kernel - 2 * padding), max(w, kernel - 2 * padding)
    geometry = {"kernel": (kernel, kernel), "stride": (stride, stride), "padding": (padding, padding)}
    GroupedCase((n, c, h, w), c, groups, dtype, pitch=pitch, **geometry).check_fprop()


def test_tiles_and_images():
    """A result of several tiles per image, and several small images per tile."""
    GroupedCase((1, 64, 40, 37), 64, 16).check_fprop()
    GroupedCase((9, 64, 7, 7), 64, 8).check_fprop()


@pytest.mark.parametrize("dtype", DTYPES)
def test_into_a_slice(dtype):
    case = GroupedCase((2, 16, 5, 6), 16, 4, dtype, pitch=16)
    args = (*case.pending, case.weight, None, *case.geometry)
    into, untouched = empty_slice(case.out_shape, dtype, before=8, behind=8)
    expected, stats = CONV_FUSED_FPROP.overload("cuda")(*args, True)
    y, same = CONV_FUSED_FPROP.overload("cuda")(*args, True, into)
    assert y.numel() == 0 and torch.equal(into, expected) and torch.equal(stats, same)
    untouched()
    into, untouched = empty_slice(case.out_shape, dtype, before=8, behind=8)
    out = CONV_FUSED_JOIN.overload("cuda")(*args, None, None, None, 0, 0.0, into)
    assert out.numel() == 0 and torch.equal(into, expected)
    untouched()


@pytest.mark.parametrize("groups", [2, 8], ids=["groups", "depthwise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offsets_beyond_32_bits(dtype, groups):
    """Of the input, the residual and the result."""
    case = GroupedCase((1, 8, 1, 5), 8, groups, dtype, kernel=(1, 3), padding=(0, 1))
    side = case.tensor(case.out_shape, 5)
    found = []
    for move, room in ((Tensor.clone, torch.empty_like(case.x)), (far, far_apart(dtype))):
        x, *rest = case.pending
        args = (move(x), *rest, case.weight, case.bias, *case.geometry)
        _, stats = CONV_FUSED_FPROP.overload("cuda")(*args, True, room)
        y = room.clone()
        CONV_FUSED_JOIN.overload("cuda")(*args, None, move(side), None, 1, 0.0, room)
        found.append((y, stats, room))
    assert all(torch.equal(ours, expected) for ours, expected in zip(*found))


@pytest.mark.parametrize("groups", [4, 2, 16])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_reach_what_they_reach_in_stock(groups, value):
    case = GroupedCase((1, 16, 6, 6), 16, groups, prologue=False)
    case.x[0, 5, 2, 3] = value
    ours = CONV_FUSED_FPROP.overload("cuda")(*case.pending, case.weight, None, *case.geometry, False)[0]
    exact = CONV_FUSED_FPROP.reference(*case.pending, case.weight, None, *case.geometry, False)[0]
    assert not ours.isfinite().all() and torch.equal(ours.isfinite(), exact.isfinite())


@pytest.mark.parametrize("mean", [30.0, -3e3])
def test_a_large_mean_does_not_cancel_a_small_variance(mean):
    case = GroupedCase((3, 16, 12, 12), 16, 4, torch.float32, prologue=False)
    case.bias += mean
    case.check_fprop()


def test_bitwise_the_same_for_any_schedule(emulated):
    case = GroupedCase((3, 64, 9, 9), 64, 8)
    args = (*case.pending, case.weight, case.bias, *case.geometry, True)
    results = []
    for seed in range(1, 5):
        emulated.emu_seed(ctypes.c_uint64(seed))
        emulated.emu_copies(seed % 3)
        results.append(CONV_FUSED_FPROP.overload("cuda")(*args))
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0]))


def test_reads_of_the_patch_share_no_bank(emulated):
    """Neighbouring pixels lie an odd number of 16-byte chunks apart."""
    emulated.emu_traffic.restype = ctypes.c_char_p
    emulated.emu_clear_traffic()
    emulated.emu_count_traffic(1)
    case = GroupedCase((1, 64, 16, 16), 64, 8, prologue=False)
    CONV_FUSED_FPROP.overload("cuda")(*case.pending, case.weight, None, *case.geometry, False)
    emulated.emu_count_traffic(0)
    entries = [json.loads(line) for line in emulated.emu_traffic().splitlines()]
    shared = [e for e in entries if e["at"].startswith("conv_grouped.h") and e["space"] == "shared"]
    assert shared and sum(e["passes"] for e in shared) <= 1.1 * sum(e["ideal"] for e in shared)


def test_wrong_input():
    case = GroupedCase((2, 16, 5, 5), 16, 4)
    fprop = CONV_FUSED_FPROP.overload("cuda")
    rest = (case.weight, None, *case.geometry, False)
    with pytest.raises(RuntimeError, match="channels_last"):
        fprop(transposed((2, 16, 5, 5), torch.bfloat16), None, 0, 0.0, *rest)
    with pytest.raises(RuntimeError, match="16 bytes"):
        fprop(channels_last((2, 20, 5, 5), torch.bfloat16)[:, 3:19], None, 0, 0.0, *rest)
    with pytest.raises(RuntimeError, match="norm"):
        fprop(case.x, torch.ones(4, 8), 0, 0.0, *rest)
    with pytest.raises(RuntimeError, match="activation"):
        fprop(case.x, None, 99, 0.0, *rest)
    with pytest.raises(RuntimeError, match="dtype"):
        fprop(case.x, None, 0, 0.0, case.weight.float(), None, *case.geometry, False)
    with pytest.raises(RuntimeError, match="does not fit x"):
        fprop(case.x, None, 0, 0.0, case.weight[:, :3], None, *case.geometry, False)
    with pytest.raises(RuntimeError, match="groups of 2 to 2"):
        fprop(case.x, None, 0, 0.0, case.weight[:, :2], None, *case.geometry, False)
    with pytest.raises(RuntimeError, match="multiples of 8"):
        odd = GroupedCase((2, 12, 5, 5), 12, 3)
        fprop(odd.x, None, 0, 0.0, odd.weight, None, *odd.geometry, False)
    with pytest.raises(RuntimeError, match="into"):
        fprop(case.x, None, 0, 0.0, *rest, channels_last((2, 16, 5, 4), torch.bfloat16))
    with pytest.raises(RuntimeError, match="residual"):
        join = (case.x, None, 0, 0.0, *rest[:-1], None, channels_last((2, 16, 4, 5), torch.bfloat16), None, 0, 0.0)
        CONV_FUSED_JOIN.overload("cuda")(*join)


def test_a_kernel_that_does_not_fit_is_refused():
    case = GroupedCase((1, 64, 40, 40), 64, 1, torch.float32, dilation=(18, 18), padding=(18, 18))
    with pytest.raises(RuntimeError, match="37 x 37 pixels"):
        case.check_fprop()


def test_empty():
    case = GroupedCase((0, 16, 5, 5), 16, 4)
    y, stats = CONV_FUSED_FPROP.overload("cuda")(*case.pending, case.weight, None, *case.geometry, False)
    assert y.shape == (0, 16, 5, 5) and stats.numel() == 0


def test_opcheck():
    case = GroupedCase((1, 16, 5, 4), 16, 4)
    args = (*case.pending, case.weight, case.bias, *case.geometry)
    for want_stats in (False, True):
        torch.library.opcheck(CONV_FUSED_FPROP.overload("cuda"), (*args, want_stats))
    torch.library.opcheck(CONV_FUSED_JOIN.overload("cuda"), (*args, None, None, None, 1, 0.0))


def test_triton_hands_grouped_convolutions_over():
    triton = pytest.importorskip("fusedres.triton.conv_fused")
    case = GroupedCase((1, 16, 5, 4), 16, 4)
    args = (*case.pending, case.weight, case.bias, *case.geometry)
    for ours, theirs in zip(triton.conv_fused_fprop(*args, True), CONV_FUSED_FPROP.overload("cuda")(*args, True)):
        assert torch.equal(ours, theirs)
    join = (None, None, None, 1, 0.0)
    assert torch.equal(triton.conv_fused_join(*args, *join), CONV_FUSED_JOIN.overload("cuda")(*args, *join))


REFUSED = {
    "dense": ((1, 16, 9, 9), 16, 1, {}, "this one is dense"),
    "odd": ((1, 12, 9, 9), 12, 3, {}, "loads of 16 bytes"),
    "pairs": ((1, 16, 9, 9), 16, 8, {}, "nor 4 to 4"),
    "wide": ((1, 256, 9, 9), 256, 2, {}, "wide enough"),
    "taps": ((1, 16, 9, 9), 16, 4, {"kernel": (9, 9)}, "too many taps"),
    "reach": ((1, 16, 99, 99), 16, 4, {"dilation": (32, 32)}, "reaches over 65x65"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_refused(why):
    shape, filters, groups, geometry, reason = REFUSED[why]
    case = GroupedCase(shape, filters, groups, **geometry)
    g = ConvGeometry(case.stride, case.padding, case.dilation, groups)
    for kind in ("fprop", "dgrad", "wgrad"):
        assert reason in conv_fused_refuses(kind, "cuda", case.x, case.weight, g, prologue=True)


def farthest(channels: int, groups: int, taps: int, dtype: torch.dtype) -> GroupedCase:
    """Of the kernels that are not refused, that of so many taps a side which reaches farthest."""
    for dilation in range(40, 0, -1):
        reach = dilation * (taps - 1) + 1
        padding = (max(0, (reach - 5) // 2),) * 2
        geometry = {"kernel": (taps, taps), "dilation": (dilation, dilation), "padding": padding}
        case = GroupedCase((1, channels, 6, 6), channels, groups, dtype, **geometry)
        g = ConvGeometry(case.stride, case.padding, case.dilation, groups)
        if conv_fused_refuses("fprop", "cuda", case.x, case.weight, g, prologue=True) is None:
            return case
    raise AssertionError("all are refused")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("channels", "groups", "taps"), [(128, 2, 3), (128, 2, 5), (16, 4, 8), (16, 4, 3), (16, 16, 7)]
)
def test_what_is_offered_fits_into_shared_memory(channels, groups, taps, dtype):
    case = farthest(channels, groups, taps, dtype)
    weight = torch.empty_like(case.weight)
    CONV_FUSED_FPROP.overload("cuda")(*case.pending, case.weight, None, *case.geometry, True)
    CONV_FUSED_DGRAD.overload("cuda")(*case.gradient, case.weight, *case.pending, *case.geometry)
    CONV_FUSED_WGRAD.overload("cuda")(*case.gradient, *case.pending, *case.geometry, weight)


def test_sliced_inputs_are_refused_where_they_are_not_aligned():
    case = GroupedCase((1, 16, 5, 5), 16, 4)
    g = ConvGeometry(case.stride, case.padding, case.dilation, 4)
    for x, expected in (
        (channels_last((1, 32, 5, 5), case.dtype)[:, 8:24], None),
        (channels_last((1, 32, 5, 5), case.dtype)[:, 4:20], "16 bytes"),
    ):
        reason = conv_fused_refuses("fprop", "cuda", x, case.weight, g, prologue=True)
        assert reason is expected if expected is None else expected in reason
