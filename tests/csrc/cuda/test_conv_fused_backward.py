"""The gradients of grouped convolutions between two norms, in the emulator, against float64."""

from __future__ import annotations

import ctypes

import pytest
import torch
from cuda_convs import ACTS, DTYPES, GEOMETRIES, GROUPS, GroupedCase
from cuda_ops import compare, generator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slices import empty_slice, far, far_apart
from torch import Tensor

from fusedres.ops.conv_fused_backward import BN_GRAD_ROWS, CONV_FUSED_DGRAD, CONV_FUSED_WGRAD

relaxed = settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", GROUPS, ids=str)
def test_against_float64(channels, dtype):
    c, filters, groups = channels
    for stride, prologue in (((1, 1), True), ((2, 2), False), ((2, 2), True)):
        case = GroupedCase((2, c, 7, 6), filters, groups, dtype, stride=stride, prologue=prologue)
        case.check_dgrad(addend=prologue)
        if c // groups * filters <= 1024:  # larger ones take the emulator long, and add nothing
            case.check_wgrad()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_geometries(geometry, dtype):
    for c, groups in ((16, 4), (16, 2), (24, 24)):
        case = GroupedCase((2, c, 9, 11), c, groups, dtype, **geometry)
        case.check_dgrad()
        case.check_wgrad()


@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_groups(dtype):
    """Their taps are more than one block keeps the sums of."""
    GroupedCase((1, 64, 5, 4), 64, 2, dtype).check_wgrad()


@pytest.mark.parametrize("act", ACTS, ids=str)
def test_activations(act):
    GroupedCase((1, 16, 5, 4), 16, 4, act=act).check_dgrad(addend=True)


@relaxed
@given(
    n=st.integers(1, 5),
    h=st.integers(1, 20),
    w=st.integers(1, 20),
    channels=st.sampled_from([(16, 4), (40, 10), (72, 9), (16, 1), (24, 24), (104, 104)]),
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
    case = GroupedCase((n, c, h, w), c, groups, dtype, pitch=pitch, **geometry)
    case.check_dgrad()
    case.check_wgrad()


def test_tiles_and_images():
    for shape in ((1, 64, 40, 37), (9, 64, 7, 7)):
        case = GroupedCase(shape, 64, 16)
        case.check_dgrad()
        case.check_wgrad()


@pytest.mark.parametrize("out", [torch.float32, torch.float64, torch.bfloat16])
def test_the_weight_gradient_has_any_dtype_and_layout(out):
    case = GroupedCase((2, 16, 5, 6), 16, 4)
    expected = case.check_wgrad(out)
    weight = torch.full_like(expected, float("nan")).contiguous(memory_format=torch.channels_last)
    CONV_FUSED_WGRAD.overload("cuda")(*case.gradient, *case.pending, *case.geometry, weight)
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_into_a_slice_and_onto_the_addend(dtype):
    case = GroupedCase((2, 16, 5, 6), 16, 4, dtype, pitch=8)
    addend = case.tensor(case.shape, 11)
    args = (*case.gradient, case.weight, *case.pending, *case.geometry)
    expected, sums = CONV_FUSED_DGRAD.overload("cuda")(*args, addend)
    into, untouched = empty_slice(case.shape, dtype, before=8, behind=8)
    dx, same = CONV_FUSED_DGRAD.overload("cuda")(*args, addend, into)
    assert dx.numel() == 0 and torch.equal(into, expected) and torch.equal(sums, same)
    untouched()
    CONV_FUSED_DGRAD.overload("cuda")(*args, addend, addend)
    assert torch.equal(addend, expected)


@pytest.mark.parametrize("groups", [2, 8], ids=["groups", "depthwise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offsets_beyond_32_bits(dtype, groups):
    """Of every operand, and of the input's gradient."""
    case = GroupedCase((1, 8, 1, 5), 8, groups, dtype, kernel=(1, 3), padding=(0, 1))
    addend = case.tensor(case.shape, 11)
    found = []
    for move, room in ((Tensor.clone, torch.empty_like(case.x)), (far, far_apart(dtype))):
        (g, y, rows), (x, *pending) = case.gradient, case.pending
        gradient, operands = (move(g), move(y), rows), (move(x), *pending, *case.geometry)
        _, sums = CONV_FUSED_DGRAD.overload("cuda")(*gradient, case.weight, *operands, move(addend), room)
        weight = torch.empty_like(case.weight)
        CONV_FUSED_WGRAD.overload("cuda")(*gradient, *operands, weight)
        found.append((room, sums, weight))
    assert all(torch.equal(ours, expected) for ours, expected in zip(*found))


@pytest.mark.parametrize("groups", [4, 2, 16])
def test_non_finite_values_stay_in_their_group(groups):
    case = GroupedCase((1, 16, 6, 6), 16, groups, prologue=False)
    g, y, rows = case.gradient
    g[0, 5, 2, 3] = float("inf")
    dx, _ = CONV_FUSED_DGRAD.overload("cuda")(g, y, rows, case.weight, *case.pending, *case.geometry)
    exact, _ = CONV_FUSED_DGRAD.reference(g, y, rows, case.weight, *case.pending, *case.geometry)
    assert not dx.isfinite().all() and torch.equal(dx.isfinite(), exact.isfinite())
    dw, exact = torch.empty_like(case.weight), torch.empty_like(case.weight)
    CONV_FUSED_WGRAD.overload("cuda")(g, y, rows, *case.pending, *case.geometry, dw)
    CONV_FUSED_WGRAD.reference(g, y, rows, *case.pending, *case.geometry, exact)
    assert not dw.isfinite().all() and torch.equal(dw.isfinite(), exact.isfinite())


def test_bitwise_the_same_for_any_schedule(emulated):
    case = GroupedCase((3, 32, 9, 9), 32, 4)
    results = []
    for seed in range(1, 5):
        emulated.emu_seed(ctypes.c_uint64(seed))
        emulated.emu_copies(seed % 3)
        weight = torch.empty_like(case.weight)
        CONV_FUSED_WGRAD.overload("cuda")(*case.gradient, *case.pending, *case.geometry, weight)
        args = (*case.gradient, case.weight, *case.pending, *case.geometry)
        results.append((weight, *CONV_FUSED_DGRAD.overload("cuda")(*args)))
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0]))


@pytest.mark.parametrize("sums", [None, 2, 3])
def test_bn_grad_rows(sums):
    norm = torch.randn(4, 300, generator=generator(1))
    compare(
        "rows", BN_GRAD_ROWS, (norm, None if sums is None else torch.randn(sums, 300, generator=generator(2)), 77.0)
    )


def test_wrong_input():
    case = GroupedCase((2, 16, 5, 5), 16, 4)
    g, y, rows = case.gradient
    rest = (case.weight, *case.pending, *case.geometry)
    with pytest.raises(RuntimeError, match="y must be given"):
        CONV_FUSED_DGRAD.overload("cuda")(g, None, rows, *rest)
    with pytest.raises(RuntimeError, match=r"g must have shape \[2, 16, 5, 5\]"):
        CONV_FUSED_DGRAD.overload("cuda")(g[:, :, :4], None, None, *rest)
    with pytest.raises(RuntimeError, match="grad_rows"):
        CONV_FUSED_DGRAD.overload("cuda")(g, y, torch.ones(4, 8), *rest)
    with pytest.raises(RuntimeError, match="addend"):
        CONV_FUSED_DGRAD.overload("cuda")(g, y, rows, *rest, case.x[:1])
    with pytest.raises(RuntimeError, match="floating"):
        CONV_FUSED_WGRAD.overload("cuda")(g, y, rows, *case.pending, *case.geometry, case.weight.int())
    with pytest.raises(RuntimeError, match="sums"):
        BN_GRAD_ROWS.overload("cuda")(torch.ones(4, 8), torch.ones(2, 7), 1.0)


def test_empty():
    case = GroupedCase((0, 16, 5, 5), 16, 4)
    dx, sums = CONV_FUSED_DGRAD.overload("cuda")(*case.gradient, case.weight, *case.pending, *case.geometry)
    assert dx.shape == case.shape and torch.equal(sums, torch.zeros(2, 16))
    weight = torch.full_like(case.weight, float("nan"))
    CONV_FUSED_WGRAD.overload("cuda")(*case.gradient, *case.pending, *case.geometry, weight)
    assert torch.equal(weight, torch.zeros_like(weight))


def test_opcheck():
    case = GroupedCase((1, 16, 5, 4), 16, 4)
    args = (*case.gradient, case.weight, *case.pending, *case.geometry)
    torch.library.opcheck(CONV_FUSED_DGRAD.overload("cuda"), args)
    weight = torch.zeros_like(case.weight)
    torch.library.opcheck(CONV_FUSED_WGRAD.overload("cuda"), (*case.gradient, *case.pending, *case.geometry, weight))
    torch.library.opcheck(BN_GRAD_ROWS.overload("cuda"), (torch.randn(4, 16), torch.randn(2, 16), 4.0))


def test_triton_hands_grouped_convolutions_over():
    triton = pytest.importorskip("fusedres.triton.conv_fused_backward")
    case = GroupedCase((1, 16, 5, 4), 16, 4)
    args = (*case.gradient, case.weight, *case.pending, *case.geometry)
    for ours, theirs in zip(triton.conv_fused_dgrad(*args), CONV_FUSED_DGRAD.overload("cuda")(*args)):
        assert torch.equal(ours, theirs)
    ours, theirs = torch.empty_like(case.weight), torch.empty_like(case.weight)
    triton.conv_fused_wgrad(*case.gradient, *case.pending, *case.geometry, ours)
    CONV_FUSED_WGRAD.overload("cuda")(*case.gradient, *case.pending, *case.geometry, theirs)
    assert torch.equal(ours, theirs)
