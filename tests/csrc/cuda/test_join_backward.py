"""The join's backward passes in the emulator."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from cuda_ops import DTYPES, LAYOUTS, RESIDUALS, JoinCase
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slices import empty_slice, far_apart

from fusedres.ops.activations import ACTIVATIONS, Activation
from fusedres.ops.join_backward import JOIN_BACKWARD, JOIN_BACKWARD_APPLY, JOIN_BACKWARD_REDUCE
from fusedres.testing import channels_last, contiguous

ACTS = [Activation(name, 0.125) for name in ACTIVATIONS]
relaxed = settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_against_float64(layout, dtype, residual):
    for shape, (gained, dropout) in itertools.product([(2, 37, 6, 5), (2, 64, 3, 3)], [(False, 0.0), (True, 0.3)]):
        case = JoinCase(shape, layout, dtype, residual, Activation("silu"), gained=gained, dropout=dropout)
        case.check_reduce()
        case.check_apply(True, addend=True)
        case.check_apply(False, offset=True)


@pytest.mark.parametrize("act", ACTS, ids=str)
def test_activations(act):
    for layout in LAYOUTS:
        case = JoinCase((2, 16, 4, 3), layout, torch.float32, "affine", act)
        case.check_reduce()
        case.check_apply(True)


@relaxed
@given(
    n=st.integers(1, 3),
    c=st.integers(1, 70),
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    layout=st.sampled_from(sorted(LAYOUTS)),
    residual=st.sampled_from(RESIDUALS),
    gained=st.booleans(),
    dropout=st.sampled_from([0.0, 0.5, 1.0]),
    normed=st.booleans(),
    processors=st.integers(1, 5),
)
def test_any_shape(emulated, n, c, h, w, layout, residual, gained, dropout, normed, processors):
    emulated.emu_processors(processors)
    act = Activation("gelu")
    case = JoinCase((n, c, h, w), layout, torch.float32, residual, act, normed, gained, dropout)
    case.check_reduce()
    case.check_apply(True, offset=gained)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("before", [3, 8])
def test_into_a_slice(dtype, before):
    case = JoinCase((2, 16, 5, 3), "channels_last", dtype, "plain", Activation("silu"))
    case.check_apply(True, addend=True, into=empty_slice(case.shape, dtype, before=before, behind=8))


@pytest.mark.parametrize("both", [False, True])
def test_offsets_beyond_32_bits(both):
    """Of every operand and of what is written, in the passes on their own and in one launch."""
    operands = [far_apart() for _ in range(5)]
    for seed, t in enumerate(operands[:4]):
        t.copy_(contiguous(t.shape, seed=seed))
    near = [t.contiguous(memory_format=torch.channels_last) for t in operands[:4]]
    found = []
    for (grad, y, residual, addend), into in ((operands[:4], operands[4]), (near, torch.empty_like(near[0]))):
        args = (grad, y, None, residual, None, 4, 0.0)
        if both:
            _, value, _, dresidual = JOIN_BACKWARD.overload("cuda")(
                *args, True, 5.0, False, False, True, 0.0, None, addend, into
            )
        else:
            _, value = JOIN_BACKWARD_REDUCE.overload("cuda")(*args, True)
            _, dresidual = JOIN_BACKWARD_APPLY.overload("cuda")(
                *args, None, 5.0, False, False, True, None, 0.0, None, None, addend, into
            )
        found.append((value, dresidual, into))
    assert all(torch.equal(ours, expected) for ours, expected in zip(*found))


def test_addend_in_place():
    case = JoinCase((2, 16, 5, 3), act=Activation("silu"))
    sums = case.sums()[:3].contiguous()
    rest = (case.grad, *case.operands, sums, case.count, True, False, False, None, 0.0, None, None)
    onto = channels_last(case.shape, seed=11)
    expected, _ = JOIN_BACKWARD_APPLY.overload("cuda")(*rest, onto.clone())
    JOIN_BACKWARD_APPLY.overload("cuda")(*rest, onto, onto)
    assert torch.equal(onto, expected)


def test_dropped_and_flat_elements_pass_no_nan():
    y = channels_last((1, 8, 2, 2)) - 10
    grad = torch.full_like(y, float("nan"))
    for modifiers in ((None, 0.0, None), (None, 1.0, torch.tensor([3]))):
        act = 1 if modifiers[1] == 0 else 0
        sums, _ = JOIN_BACKWARD_REDUCE.overload("cuda")(grad, y, None, None, None, act, 0.0, False, *modifiers)
        assert torch.equal(sums, torch.zeros(3, 8))


@pytest.mark.parametrize("make", [channels_last, contiguous])
def test_bitwise_the_same_for_any_schedule(emulated, make):
    case = JoinCase((3, 48, 9, 9), make.__name__, torch.bfloat16, "affine", Activation("silu"))
    results = []
    for seed in range(1, 4):
        emulated.emu_seed(ctypes.c_uint64(seed))
        results.append(JOIN_BACKWARD_REDUCE.overload("cuda")(case.grad, *case.operands, True))
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0]))


def test_wrong_input():
    case = JoinCase((2, 5, 4, 3), residual="affine", gained=True)
    args = (case.grad, *case.operands)
    with pytest.raises(RuntimeError, match="grad"):
        JOIN_BACKWARD_REDUCE.overload("cuda")(case.grad[:1], *case.operands, False)
    with pytest.raises(RuntimeError, match="need the sums"):
        JOIN_BACKWARD_APPLY.overload("cuda")(*args, None, 1.0, True, False, True)
    with pytest.raises(RuntimeError, match="R from 4 to 4"):
        JOIN_BACKWARD_APPLY.overload("cuda")(*args, torch.ones(3, 5), 1.0, True, True, True, case.gain)
    with pytest.raises(RuntimeError, match="join_backward_cuda: into"):
        flags = (False, case.count, True, True, True, 0.0, None, None)
        JOIN_BACKWARD.overload("cuda")(*args, *flags, torch.empty(2, 5, 4, 4))
    with pytest.raises(RuntimeError, match="offset"):
        JOIN_BACKWARD_APPLY.overload("cuda")(*args, None, 1.0, False, False, True, None, 0.0, None, torch.ones(2, 4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_both_against_float64(layout, dtype, residual):
    for shape, dropout in itertools.product([(2, 37, 6, 5), (2, 64, 3, 3)], [0.0, 0.3]):
        case = JoinCase(shape, layout, dtype, residual, Activation("silu"), dropout=dropout)
        case.check_both(True, addend=True)
        case.check_both(False, emit=False)


@relaxed
@given(
    n=st.integers(1, 3),
    c=st.integers(1, 70),
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    residual=st.sampled_from(RESIDUALS),
    normed=st.booleans(),
    processors=st.integers(1, 5),
    emit=st.booleans(),
)
def test_both_of_any_shape(emulated, n, c, h, w, residual, normed, processors, emit):
    emulated.emu_processors(processors)
    # Exact terms: of one channel's two sums, gelu's own roundings may leave stock by luck without an error.
    case = JoinCase((n, c, h, w), "channels_last", torch.float32, residual, Activation("relu"), normed)
    case.check_both(True, emit=emit)


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_into_a_slice(dtype):
    case = JoinCase((2, 16, 5, 3), "channels_last", dtype, "plain", Activation("silu"))
    case.check_both(True, addend=True, into=empty_slice(case.shape, dtype, before=8, behind=8))


@pytest.mark.parametrize("l2_bytes", [0, 50 << 20])
def test_one_launch_where_the_tensors_stay_in_the_cache(emulated, l2_bytes):
    emulated.emu_l2_bytes(l2_bytes)
    before = emulated.emu_launches()
    JoinCase((2, 16, 5, 3), residual="affine", dropout=0.3).check_both(True)
    launches = emulated.emu_launches() - before
    assert launches == (1 if l2_bytes else 3)


def test_both_are_bitwise_the_same_for_any_schedule(emulated):
    case = JoinCase((3, 48, 9, 9), "channels_last", torch.bfloat16, "affine", Activation("silu"))
    results = []
    for seed in range(1, 4):
        emulated.emu_seed(ctypes.c_uint64(seed))
        flags = (True, case.count, True, True, True)
        results.append(JOIN_BACKWARD.overload("cuda")(case.grad, *case.operands, *flags))
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0]))


def test_empty():
    case = JoinCase((0, 5, 4, 3), residual="plain")
    sums, emitted = JOIN_BACKWARD_REDUCE.overload("cuda")(case.grad, *case.operands, True)
    assert torch.equal(sums, torch.zeros(3, 5)) and emitted.shape == case.shape
    flags = (True, 1.0, True, False, True)
    sums, *tensors = JOIN_BACKWARD.overload("cuda")(case.grad, *case.operands, *flags)
    assert torch.equal(sums, torch.zeros(3, 5)) and all(t.shape == case.shape for t in tensors)
