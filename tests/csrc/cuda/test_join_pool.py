"""Max pooling of a join and its gradient in the emulator: every layout, dtype, activation and kind of window."""

from __future__ import annotations

import ctypes
import itertools
import math

import pytest
import torch
from cuda_ops import DTYPES, LAYOUTS, POOLINGS, PoolCase
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from slices import empty_slice, far, far_apart

from fusedres.ops.activations import ACTIVATIONS, Activation
from fusedres.ops.join_pool import JOIN_POOL, JOIN_POOL_BACKWARD, PoolWindow, pool_window, pooled_size
from fusedres.testing import channels_last, contiguous, transposed

ACTS = [Activation(name, 0.125) for name in ACTIVATIONS]
IDENTITY = Activation("identity")
STEM = POOLINGS["3, stride 2, padded"]
relaxed = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", POOLINGS)
def test_forward(window, layout, dtype):
    for channels, normed in itertools.product((16, 5), (True, False)):
        case = PoolCase((2, channels, 8, 7), POOLINGS[window], layout, dtype, normed=normed)
        case.check_forward()
        case.check_against_float64()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", POOLINGS)
def test_backward(window, layout, dtype):
    for channels in (16, 5):
        PoolCase((2, channels, 8, 7), POOLINGS[window], layout, dtype).check_backward()


@pytest.mark.parametrize("act", ACTS, ids=str)
def test_activations(act):
    for layout, dtype, normed in itertools.product(LAYOUTS, DTYPES, (True, False)):
        case = PoolCase((2, 8, 5, 4), STEM, layout, dtype, act, normed)
        case.check_forward()
        case.check_against_float64()


def sides(largest: int) -> st.SearchStrategy:
    return st.tuples(st.integers(1, largest), st.integers(1, largest))


@relaxed
@given(
    n=st.integers(0, 3),
    c=st.integers(1, 40),
    image=sides(9),
    kernel=sides(5),
    stride=sides(6),
    halves=st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)),
    ceil=st.booleans(),
    layout=st.sampled_from(sorted(LAYOUTS)),
    dtype=st.sampled_from(DTYPES),
    processors=st.integers(1, 3),
)
def test_any_shape(emulated, n, c, image, kernel, stride, halves, ceil, layout, dtype, processors):
    window = PoolWindow(kernel, stride, tuple(int(k * half) for k, half in zip(kernel, halves)), ceil)
    assume(min(pooled_size(image, window)) > 0)
    emulated.emu_processors(processors)
    case = PoolCase((n, c, *image), window, layout, dtype)
    case.check_forward()
    case.check_backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", POOLINGS)
def test_of_equals_the_first_is_taken(window, layout, dtype):
    """Also of those that are equal only in the dtype of the result, as these are with a norm."""
    for act, normed in itertools.product((IDENTITY, ACTS[1]), (True, False)):
        case = PoolCase((2, 8, 8, 7), POOLINGS[window], layout, dtype, act, normed)
        case.y.copy_((case.y * 2).round() / 256 + 1)
        case.check_forward()
    case.y.fill_(-1.0)
    assert not case.check_forward()[:, :, 1, 1].any() or min(case.window.padding) > 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", POOLINGS)
def test_not_a_number_and_infinities_are_those_of_stock(window, layout):
    for normed, act in itertools.product((True, False), (IDENTITY, ACTS[1])):
        case = PoolCase((3, 8, 8, 7), POOLINGS[window], layout, act=act, normed=normed)
        flat = torch.rand(case.y.shape, generator=torch.Generator().manual_seed(1))
        case.y[flat < 0.3] = math.nan
        case.y[flat > 0.5] = -math.inf
        case.y[flat > 0.95] = math.inf
        case.y[2].fill_(-math.inf)
        case.check_forward()


def test_the_last_of_several_nan_is_taken():
    case = PoolCase((1, 8, 2, 2), pool_window(2), act=IDENTITY, normed=False)
    case.y[:, :, 0, 1] = case.y[:, :, 1, 0] = math.nan
    assert (case.check_forward() == 2).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_outside_the_image_is_taken(layout):
    """Not where all that is inside is smaller than what stock PyTorch begins with."""
    case = PoolCase((2, 8, 5, 4), STEM, layout, act=IDENTITY, normed=False)
    case.y.fill_(-math.inf)
    taken = case.check_forward()
    assert (taken[:, :, 0, 0] == 4).all() and (taken[:, :, 1, 1] == 0).all()


def test_the_gradient_of_overlapping_windows_is_their_sum():
    """One large value that every window takes."""
    case = PoolCase((1, 8, 3, 3), pool_window(3, 1, 1), normed=False)
    case.y[:, :, 1, 1] = 100.0
    _, taken = case.pooled()
    ones = torch.ones_like(case.y)
    grad = JOIN_POOL_BACKWARD.overload("cuda")(ones, taken, case.y, *case.window[:3])
    expected = torch.zeros_like(case.y)
    expected[:, :, 1, 1] = 9.0
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_the_same_for_any_schedule(emulated, layout):
    case = PoolCase((2, 24, 9, 7), POOLINGS["3, stride 1, padded"], layout, torch.bfloat16)
    results = []
    for seed in range(1, 4):
        emulated.emu_seed(ctypes.c_uint64(seed))
        results.append((*case.pooled(), case.check_backward()))
    assert all(torch.equal(ours, first) for result in results for ours, first in zip(result, results[0]))


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (2, 8, 1, 1), (2, 1, 4, 4), (1, 1, 1, 5), (2, 9, 2, 1)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_that_are_dense_in_both_layouts(layout, shape):
    for window in (pool_window(2, 1, 1), pool_window(1)):
        case = PoolCase(shape, window, layout)
        case.check_forward()
        case.check_backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("behind", [8, 1], ids=["any access", "an odd pitch"])
def test_slices_that_begin_where_wide_accesses_may(behind, dtype):
    """One result's pixel suits any access; those of the image that it is made of, and of a gradient, may not."""
    for shape, window in (((2, 16, 6, 5), STEM), ((1, 8, 2, 2), pool_window(2)), ((1, 8, 1, 1), pool_window(2, 1, 1))):
        case = PoolCase(shape, window, dtype=dtype)
        case.y = empty_slice(shape, dtype, 8, behind)[0].copy_(case.y)
        out, _ = case.pooled()
        case.check_forward()
        case.check_backward(empty_slice(tuple(out.shape), dtype, 8, behind)[0].copy_(out))


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 0, 4, 4), (2, 8, 0, 4)], ids=str)
@pytest.mark.parametrize("make", [channels_last, contiguous])
def test_nothing_to_pool(make, shape):
    y, window = make(shape), ([2, 2], [2, 2], [0, 0])
    args = (y, None, 1, 0.0, *window, False, True)
    for ours, expected in zip(*(JOIN_POOL.overload(name)(*args) for name in ("cuda", "reference"))):
        assert ours.shape == expected.shape and ours.dtype == expected.dtype
    grad = JOIN_POOL_BACKWARD.overload("cuda")(ours.float(), ours, y, *window)
    assert grad.shape == y.shape


def test_offsets_beyond_32_bits():
    """Of the input and of the gradient, which is as large where windows are single positions."""
    y = contiguous((1, 8, 1, 5), torch.bfloat16, 1)
    near = y.contiguous(memory_format=torch.channels_last)
    for window in (((1, 3), (1, 2), (0, 1)), ((1, 1), (1, 1), (0, 0))):
        found = [JOIN_POOL.overload("cuda")(t, None, 1, 0.0, *window, False, True) for t in (near, far(y))]
        assert all(torch.equal(ours, expected) for ours, expected in zip(*found))
    taken = found[0][1]
    grads = [JOIN_POOL_BACKWARD.overload("cuda")(t, taken, like, *window) for t, like in ((near, near), (far(y), near))]
    assert torch.equal(*grads)
    assert torch.equal(JOIN_POOL_BACKWARD.overload("cuda")(near, taken, far_apart(torch.bfloat16), *window), grads[0])


def test_wrong_input():
    y, call = channels_last((2, 8, 4, 4)), JOIN_POOL.overload("cuda")
    window = ([3, 3], [2, 2], [1, 1], False, True)
    for args, message in (
        ((y[0], None, 1, 0.0, *window), "join_pool_cuda: y must have 4 dimensions, got 3"),
        ((y, torch.ones(4, 7), 1, 0.0, *window), "join_pool_cuda: norm"),
        ((y, None, 99, 0.0, *window), "join_pool_cuda: unknown activation code 99"),
        ((transposed((2, 8, 4, 4)), None, 1, 0.0, *window), "join_pool_cuda: y must have the layout"),
        ((y.double(), None, 1, 0.0, *window), "join_pool_cuda: the dtype must be"),
        ((y, None, 1, 0.0, [16, 16], *window[1:]), "join_pool_cuda: kernel must have 1 to 255 positions, got 16 x 16"),
        ((y, None, 1, 0.0, [0, 2], *window[1:]), "join_pool_cuda: kernel must have 1 to 255 positions, got 0 x 2"),
        ((y, None, 1, 0.0, [3, 3], [2, 0], *window[2:]), "join_pool_cuda: stride must be positive, got 2 x 0"),
        ((y, None, 1, 0.0, [3, 3], [2, 2], [2, 1], False, True), "join_pool_cuda: padding .* got 2 x 1 of 3 x 3"),
        ((y, None, 1, 0.0, [5, 5], [1, 1], [0, 0], False, True), r"no window of 5 x 5 fits into y of shape \[2, 8"),
        ((y[:, :, :0], None, 1, 0.0, [2, 2], [2, 2], [1, 1], True, True), "no window of 2 x 2 fits into y of shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(*args)


def test_wrong_input_of_the_backward():
    y, call, window = channels_last((2, 8, 6, 6)), JOIN_POOL_BACKWARD.overload("cuda"), ([3, 3], [2, 2], [0, 0])
    grad, larger = channels_last((2, 8, 2, 2)), channels_last((2, 8, 3, 3))
    taken = grad.to(torch.uint8)
    for args, message in (
        ((grad.bfloat16(), taken, y), "join_pool_backward_cuda: grad must have the dtype of y"),
        ((grad, grad, y), "join_pool_backward_cuda: taken must have the dtype uint8"),
        ((y, taken, y), r"grad of shape \[2, 8, 6, 6\] is no result of pooling y of shape \[2, 8, 6, 6\]"),
        ((grad, taken[:1], y), "join_pool_backward_cuda: taken of shape .* is no result"),
        ((larger, taken, y), r"taken of shape \[2, 8, 2, 2\] must have the shape of grad, \[2, 8, 3, 3\]"),
        ((grad.contiguous(), taken, y), "join_pool_backward_cuda: grad must have the layout"),
        ((grad, taken.contiguous(), y), "join_pool_backward_cuda: taken must have the layout"),
        ((grad, taken, y[0]), "join_pool_backward_cuda: y must have 4 dimensions, got 3"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(*args, *window)
    call(larger, larger.to(torch.uint8), y, *window)  # what a pooling with ceil gives
    with pytest.raises(RuntimeError, match="join_pool_backward_cuda: kernel must have 1 to 255 positions"):
        call(grad, taken, y, [0, 1], *window[1:])
