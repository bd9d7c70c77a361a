"""Max pooling of a join and its gradient, bit by bit where no rounding differs from the reference's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from triton_operands import rows

from fusedres.ops.activations import ACTIVATIONS
from fusedres.ops.join import JOIN
from fusedres.ops.join_pool import JOIN_POOL, JOIN_POOL_BACKWARD, pool_window, pooled_size
from fusedres.testing import assert_within_budget, channels_last, contiguous, sliced, transposed

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {"channels_last": channels_last, "contiguous": contiguous, "sliced": sliced}
RELU = ACTIVATIONS["relu"].code
EXACT = ("identity", "relu", "relu6", "leaky_relu")
NAN, INFINITY = float("nan"), float("inf")
WINDOWS = {
    "3 stride 2": pool_window(3, 2, 1),
    "2 stride 2": pool_window(2),
    "3 stride 2 ceil": pool_window(3, 2, 0, ceil_mode=True),
    "3 stride 1": pool_window(3, 1, 1),
    "uneven": pool_window((2, 5), (3, 1), (1, 2)),
    "1": pool_window(1),
    "apart": pool_window((2, 1), (3, 4), ceil_mode=True),
    "a loop over pixels": pool_window(5, 2, 2),
    "a loop over positions": pool_window(7, 7, 3),
    "255 positions": pool_window((15, 17), (3, 2), (7, 8), ceil_mode=True),
}
relaxed = settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])


def eighths(make, shape, dtype, seed, device):
    """Multiples of 1/8, many of them equal; affine and sum of some of them need no rounding."""
    values = make(shape, dtype, seed)
    return values.copy_((values.float() * 8).round() / 8).to(device)


def eighth_rows(channels, device):
    """A norm of such numbers, with scales of both signs and zero."""
    return (rows(channels, 4, device) * 4).round() / 8 * torch.tensor([1, 1, -1, 1], device=device)[:, None]


def pooled(op, y, norm, act, window, record=True):
    return op(y, norm, act, 0.125, *window, record)


def check_equal(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)
    for layout in (torch.contiguous_format, torch.channels_last):
        assert ours.is_contiguous(memory_format=layout) == expected.is_contiguous(memory_format=layout)


def check(device, make, shape, dtype, window, normed=True, act=RELU):
    """Both directions without any difference."""
    y, norm = eighths(make, shape, dtype, 1, device), eighth_rows(shape[1], device) if normed else None
    out, taken = pooled(JOIN_POOL.overload("triton"), y, norm, act, window)
    expected, position = pooled(JOIN_POOL.reference, y, norm, act, window)
    check_equal(out, expected)
    check_equal(taken, position)
    alone, nothing = pooled(JOIN_POOL.overload("triton"), y, norm, act, window, record=False)
    check_equal(alone, expected)
    assert nothing.numel() == 0 and nothing.dtype == torch.uint8
    check_gradient(y, taken, window)


def check_gradient(y, taken, window):
    grad = torch.empty_like(taken, dtype=y.dtype).copy_(eighths(contiguous, taken.shape, y.dtype, 2, y.device))
    args = grad, taken, y, *window[:3]
    check_equal(JOIN_POOL_BACKWARD.overload("triton")(*args), JOIN_POOL_BACKWARD.reference(*args))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", WINDOWS)
def test_every_window(device, window, layout):
    check(device, LAYOUTS[layout], (1, 11, 11, 14), torch.float32, WINDOWS[window])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("act", EXACT)
def test_exact_activations(device, act, normed, dtype):
    check(device, channels_last, (2, 24, 9, 7), dtype, WINDOWS["3 stride 2"], normed, ACTIVATIONS[act].code)


@relaxed
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 70), st.integers(1, 13), st.integers(1, 13)),
    kernel=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    stride=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    halves=st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)),
    ceil=st.booleans(),
    layout=st.sampled_from(sorted(LAYOUTS)),
    dtype=st.sampled_from(DTYPES),
    normed=st.booleans(),
)
def test_any_shape(device, shape, kernel, stride, halves, ceil, layout, dtype, normed):
    window = pool_window(kernel, stride, tuple(int(k * half) for k, half in zip(kernel, halves)), ceil_mode=ceil)
    assume(min(pooled_size(shape[2:], window)) > 0)
    check(device, LAYOUTS[layout], shape, dtype, window, normed)


@pytest.mark.parametrize("layout, channels, width", [("contiguous", 9, 128), ("channels_last", 65, 16)])
def test_several_tiles(device, layout, channels, width):
    """Also of the padding's making: without it the last rows and columns would be of the tile before."""
    for shape in ((2, channels, 8, width), (1, channels, 11, width + 5)):
        check(device, LAYOUTS[layout], shape, torch.bfloat16, WINDOWS["3 stride 2"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_where_roundings_differ(device, act, dtype):
    """Close to the reference, and what was taken is a value that is as great."""
    code, window = ACTIVATIONS[act].code, WINDOWS["3 stride 2"]
    y, norm = channels_last((2, 21, 9, 13), dtype, 1).to(device), rows(21, 4, device)
    out, taken = pooled(JOIN_POOL.overload("triton"), y, norm, code, window)
    expected, _ = pooled(JOIN_POOL.reference, y, norm, code, window)
    exact, _ = pooled(JOIN_POOL.reference, y.double(), norm.double(), code, window)
    assert_within_budget(out, expected, exact)
    values = JOIN.reference(y, norm, None, None, code, 0.125).float()
    close = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(at_positions(values, taken, window), out.float(), rtol=close, atol=close)
    check_equal(pooled(JOIN_POOL.overload("triton"), y, norm, code, window, record=False)[0], out)


def at_positions(values, taken, window):
    """The values at these positions of the windows."""
    h, w = (
        torch.arange(size, device=taken.device) * stride - padding
        for size, stride, padding in zip(taken.shape[2:], window.stride, window.padding)
    )
    number = taken.long()
    h, w = h[:, None] + number // window.kernel[1], w + number % window.kernel[1]
    assert (h >= 0).all() and (h < values.shape[2]).all() and (w >= 0).all() and (w < values.shape[3]).all()
    n, c = torch.arange(values.shape[0])[:, None, None, None], torch.arange(values.shape[1])[:, None, None]
    return values[n.to(h.device), c.to(h.device), h, w]


@pytest.mark.parametrize("window", ["3 stride 2", "3 stride 1", "255 positions"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_gradients(device, dtype, window):
    """In float32, rounded once."""
    y = channels_last((2, 21, 11, 13), dtype, 1).to(device)
    _, taken = pooled(JOIN_POOL.reference, y, None, 0, WINDOWS[window])
    grad = channels_last(taken.shape, dtype, 2).to(device)
    args = taken, y, *WINDOWS[window][:3]
    ours, plain = JOIN_POOL_BACKWARD.overload("triton")(grad, *args), JOIN_POOL_BACKWARD.reference(grad, *args)
    exact = JOIN_POOL_BACKWARD.reference(grad.double(), taken, y.double(), *WINDOWS[window][:3])
    assert_within_budget(ours, plain, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", ["3 stride 2", "3 stride 2 ceil", "3 stride 1", "a loop over positions"])
def test_not_a_number_and_infinity(device, window, dtype):
    y = eighths(channels_last, (2, 16, 9, 8), dtype, 1, device)
    for seed, value in enumerate((NAN, INFINITY, -INFINITY)):
        y[torch.rand(y.shape, generator=torch.Generator().manual_seed(seed)).to(device) < 0.15] = value
    for act in (0, RELU):
        out, taken = pooled(JOIN_POOL.overload("triton"), y, None, act, WINDOWS[window])
        expected, position = pooled(JOIN_POOL.reference, y, None, act, WINDOWS[window])
        assert expected.isnan().any() and not expected.isnan().all()
        check_equal(out, expected)
        check_equal(taken, position)
        check_equal(pooled(JOIN_POOL.overload("triton"), y, None, act, WINDOWS[window], record=False)[0], expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [0.0, -INFINITY, NAN])
@pytest.mark.parametrize("window", WINDOWS)
def test_all_alike(device, window, value, layout):
    """The first of the positions in the image is taken, and of NaN the last; the gradient goes there."""
    y = LAYOUTS[layout]((1, 9, 6, 10)).fill_(value).to(device)
    out, taken = pooled(JOIN_POOL.overload("triton"), y, None, 0, WINDOWS[window])
    expected, position = pooled(JOIN_POOL.reference, y, None, 0, WINDOWS[window])
    check_equal(out, expected)
    check_equal(taken, position)
    check_gradient(y, taken, WINDOWS[window])


def test_equal_once_rounded(device):
    """What differs before it is rounded, and not after, is equal: the first is taken."""
    y = torch.full((1, 8, 3, 3), 1.0, dtype=torch.bfloat16, device=device)
    y[..., 1, 2] = 1.0078125  # the next number
    norm = torch.tensor([0.0, 1.0, 0.125, 1.0], device=device)[:, None].expand(4, 8).contiguous()
    out, taken = pooled(JOIN_POOL.overload("triton"), y, norm, RELU, pool_window(3))
    assert (out == 1.125).all() and not taken.any()


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_nothing(device, layout):
    window = WINDOWS["3 stride 2"]
    for shape in ((0, 8, 5, 6), (2, 0, 5, 6)):
        y = LAYOUTS[layout](shape).to(device)
        out, taken = pooled(JOIN_POOL.overload("triton"), y, None, RELU, window)
        assert out.shape == taken.shape == (*shape[:2], 3, 3)
        assert JOIN_POOL_BACKWARD.overload("triton")(out, taken, y, *window[:3]).shape == shape


def test_a_gradient_that_no_window_has(device):
    y, window = channels_last((2, 8, 3, 4)).to(device), pool_window((1, 2), (5, 5))
    for width in (0, 1):
        grad = channels_last((2, 8, 1, width)).to(device)
        taken = torch.zeros_like(grad, dtype=torch.uint8)
        result = JOIN_POOL_BACKWARD.overload("triton")(grad, taken, y, *window[:3])
        assert result.count_nonzero() == grad.numel() and torch.equal(result[..., :1, :width], grad)


def test_wrong_operands_are_named(device):
    y, window = channels_last((2, 8, 6, 4)).to(device), WINDOWS["3 stride 2"]
    with pytest.raises(ValueError, match=r"join_pool: y of shape .* is neither dense nor a channel slice"):
        pooled(JOIN_POOL.overload("triton"), transposed((2, 8, 6, 4)).to(device), None, RELU, window)
    grad, taken = pooled(JOIN_POOL.overload("triton"), y, None, RELU, window)
    backward = JOIN_POOL_BACKWARD.overload("triton")
    for name, one, other in (
        ("grad", grad.contiguous(), taken),
        ("grad", grad.half(), taken),
        ("grad", grad[:1], taken[:1]),
        ("taken", grad, taken.contiguous()),
        ("taken", grad, taken.int()),
        ("taken", grad, taken[:, :, 1:].contiguous(memory_format=torch.channels_last)),
    ):
        with pytest.raises(ValueError, match=f"join_pool_backward: {name} of shape .* does not fit y"):
            backward(one, other, y, *window[:3])
