"""``join_pool`` and ``join_pool_backward``: every instruction set, layout, dtype and window against stock PyTorch."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fusedres.ops.activations import ACTIVATIONS, IDENTITY, RELU, Activation
from fusedres.ops.join_pool import JOIN_POOL, JOIN_POOL_BACKWARD, POOL_SETTINGS, PoolWindow, pool_window, pooled_size
from fusedres.testing import assert_within_budget, channels_last, contiguous, sliced

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {"channels_last": channels_last, "contiguous": contiguous, "sliced": sliced}
ACTS = [Activation(name, 0.125) for name in ACTIVATIONS]
WINDOWS = (
    pool_window(3, 2, 1),
    pool_window(2),
    pool_window(3, 2, ceil_mode=True),
    pool_window((3, 2), (1, 2), (1, 0)),
    pool_window(2, 3, 1),  # values between windows
    pool_window(5, 1, 2),
)
STEM = WINDOWS[0]
relaxed = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def rows_of(channels: int) -> Tensor:
    """Of a norm, with scales of either sign."""
    rows = torch.randn(4, channels, generator=torch.Generator().manual_seed(1))
    rows[2] += torch.where(rows[2] < 0, -0.2, 0.2)
    return rows


def stock(y: Tensor, rows: Tensor | None, act: Activation, window: PoolWindow) -> tuple[Tensor, Tensor]:
    """The result and the positions taken, as numbers of the image, by stock PyTorch's ops in the dtype of ``y``."""
    z = y if rows is None else y * rows[2, :, None, None].to(y.dtype) + rows[3, :, None, None].to(y.dtype)
    kernel, stride, padding, ceil = window
    return F.max_pool2d(act(z), kernel, stride, padding, ceil_mode=ceil, return_indices=True)


def pooled(y: Tensor, rows: Tensor | None, act: Activation, window: PoolWindow, record: bool = True, backend="cpu"):
    return JOIN_POOL.overload(backend)(y, rows, act.code, act.param, *window, record)


def spread(grad: Tensor, taken: Tensor, y: Tensor, window: PoolWindow, backend: str = "cpu") -> Tensor:
    return JOIN_POOL_BACKWARD.overload(backend)(grad, taken, y, *window[:3])


def in_image(taken: Tensor, width: int, window: PoolWindow) -> Tensor:
    """Positions in windows as numbers of the image."""
    (_, kernel), (down, right), (top, left), _ = window
    rows = torch.arange(taken.shape[2])[:, None] * down - top + taken // kernel
    return rows * width + torch.arange(taken.shape[3]) * right - left + taken % kernel


def gradient_like(out: Tensor, seed: int = 5) -> Tensor:
    values = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
    return torch.empty_like(out).copy_(values)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_float64(isa, layout, dtype, backend):
    for act, window in itertools.product(ACTS, WINDOWS):
        y, rows = LAYOUTS[layout]((2, 37, 9, 7), dtype, 3), rows_of(37)
        ours, taken = pooled(y, rows, act, window, backend=backend)
        expected, exact = stock(y, rows, act, window)[0], stock(y.double(), rows, act, window)[0]
        assert_within_budget(ours, expected, exact, f"{act} {window}")
        last = layout != "contiguous"
        assert ours.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        assert taken.dtype == torch.uint8 and taken.stride() == ours.stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_plain_pooling_is_stocks_to_the_bit(isa, layout, dtype):
    """Positions too: of equal values, of which 16 bits make many, the first one's."""
    for act, window in itertools.product((IDENTITY, RELU), WINDOWS):
        y = LAYOUTS[layout]((2, 21, 11, 13), dtype, 3)
        y.copy_((4 * y).round() / 4)
        ours, taken = pooled(y, None, act, window)
        expected, index = stock(y, None, act, window)
        assert torch.equal(ours, expected)
        assert torch.equal(in_image(taken, 13, window), index)
        assert torch.equal(pooled(y, None, act, window, record=False)[0], expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_no_number(isa, layout):
    """A NaN wins, the last of several; of minus infinity everywhere the first position in the image is taken."""
    for dtype, window in itertools.product(DTYPES, WINDOWS):
        y = LAYOUTS[layout]((1, 19, 11, 13), dtype, 3)
        y[:, ::2, 4:6, 3:5] = float("nan")
        y[:, ::3, 7:] = -float("inf")
        y[:, 5, 1, 1] = float("inf")
        ours, taken = pooled(y, None, IDENTITY, window)
        expected, index = stock(y, None, IDENTITY, window)
        torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(in_image(taken, 13, window), index)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_against_float64(isa, layout, dtype, backend):
    for window in WINDOWS:
        y = LAYOUTS[layout]((2, 37, 9, 7), dtype, 3)
        out, taken = pooled(y, None, IDENTITY, window)
        grad = gradient_like(out)
        results = []
        for t in (y, y.double()):
            t = t.detach().requires_grad_()
            stock(t, None, IDENTITY, window)[0].backward(grad.to(t.dtype))
            results.append(t.grad)
        ours = spread(grad, taken, y, window, backend)
        assert ours.dtype == dtype and ours.shape == y.shape
        assert_within_budget(ours, *results, str(window))


@relaxed
@given(
    n=st.integers(0, 3),
    c=st.integers(1, 70),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    layout=st.sampled_from(sorted(LAYOUTS)),
    kernel=st.tuples(st.integers(1, 15), st.integers(1, 15)),
    stride=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    padded=st.tuples(st.integers(0, 7), st.integers(0, 7)),
    ceil=st.booleans(),
    act=st.sampled_from(ACTS),
    normed=st.booleans(),
)
def test_any_shape(n, c, size, layout, kernel, stride, padded, ceil, act, normed):
    padding = tuple(min(p, k // 2) for p, k in zip(padded, kernel))
    window = pool_window(kernel, stride, padding, ceil_mode=ceil)
    assume(min(pooled_size(size, window)) > 0)
    y, rows = LAYOUTS[layout]((n, c, *size), torch.float32, 3), rows_of(c) if normed else None
    ours, taken = pooled(y, rows, act, window)
    expected, _ = pooled(y, rows, act, window, backend="reference")
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    value = torch.ops.fusedres.join_cpu(y, rows, None, None, act.code, act.param)
    at = in_image(taken, size[1], window).flatten(2)
    assert torch.equal(value.flatten(2).gather(2, at).view(ours.shape), ours)
    grad = gradient_like(ours)
    torch.testing.assert_close(spread(grad, taken, y, window), spread(grad, taken, y, window, "reference"))


@given(
    size=st.integers(1, 60),
    kernel=st.integers(1, 15),
    stride=st.integers(1, 9),
    pad=st.integers(0, 7),
    ceil=st.booleans(),
)
def test_sizes_are_stocks(size, kernel, stride, pad, ceil):
    window = pool_window(kernel, stride, min(pad, kernel // 2), ceil_mode=ceil)
    try:
        expected = F.max_pool2d(torch.zeros(1, 1, size, size), *window[:3], ceil_mode=ceil).shape[2:]
    except RuntimeError:  # no window fits
        assert min(pooled_size((size, size), window)) <= 0
    else:
        assert pooled_size((size, size), window) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bitwise_the_same_for_any_number_of_threads(layout, threads):
    y, rows = LAYOUTS[layout]((3, 48, 65, 67), torch.bfloat16, 3), rows_of(48)
    (one, taken), (two, taken_by_two) = (threads(n, pooled, y, rows, RELU, STEM) for n in (1, 2))
    assert torch.equal(one, two) and torch.equal(taken, taken_by_two)
    grad = gradient_like(one)
    assert torch.equal(threads(1, spread, grad, taken, y, STEM), threads(2, spread, grad, taken, y, STEM))


def test_settings_of_the_module():
    for pool in (nn.MaxPool2d(3, 2, 1), nn.MaxPool2d((2, 4)), nn.MaxPool2d(3, ceil_mode=True)):
        kernel, stride, padding, ceil = pool_window(*(getattr(pool, name) for name in POOL_SETTINGS))
        x = torch.randn(1, 2, 17, 19)
        assert torch.equal(pool(x), F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil))


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3, "dilation": 2},
        {"kernel_size": 3, "return_indices": True},
        {"kernel_size": 3, "padding": 2},
        {"kernel_size": 3, "padding": -1},
        {"kernel_size": 16},
        {"kernel_size": 0},
        {"kernel_size": (1, 2, 3)},
        {"kernel_size": 2, "stride": 0},
        {"kernel_size": 2.0},
    ],
    ids=str,
)
def test_windows_that_no_kernel_has(arguments):
    with pytest.raises(ValueError):
        pool_window(**arguments)


def test_wrong_input_raises():
    y = torch.zeros(2, 3, 8, 8)
    out, taken = pooled(y, None, RELU, STEM)
    with pytest.raises(RuntimeError, match="padding must be at most half of kernel"):
        JOIN_POOL.overload("cpu")(y, None, 1, 0.0, [3, 3], [2, 2], [2, 2], False, True)
    with pytest.raises(RuntimeError, match="kernel must have 1 to 255 positions"):
        JOIN_POOL.overload("cpu")(y, None, 1, 0.0, [16, 16], [2, 2], [2, 2], False, True)
    with pytest.raises(RuntimeError, match="stride must be positive"):
        JOIN_POOL.overload("cpu")(y, None, 1, 0.0, [2, 2], [0, 1], [0, 0], False, True)
    with pytest.raises(RuntimeError, match="fits into y"):
        pooled(y, None, RELU, pool_window(9))
    with pytest.raises(RuntimeError, match=r"\[4, 3\]"):
        pooled(y, torch.zeros(4, 2), RELU, STEM)
    with pytest.raises(RuntimeError, match="grad of shape"):
        spread(out[:, :, 1:].contiguous(), taken, y, STEM)
    with pytest.raises(RuntimeError, match="grad must have the dtype of y"):
        spread(out.double(), taken, y, STEM)
    with pytest.raises(RuntimeError, match="taken must have the dtype uint8"):
        spread(out, taken.int(), y, STEM)
    with pytest.raises(RuntimeError, match="dense in the layout of y"):
        spread(out.contiguous(memory_format=torch.channels_last), taken, y, STEM)
