"""Dropout's mask: the generator, the order of the elements, and the same mask from every op, layout and kernel."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from known_answers import PHILOX4X32_10
from torch import Tensor

from fusedres.ops.dropout import draw_seed, dropped, keep_scale, philox, philox4x32
from fusedres.testing import channels_last, contiguous, sliced

CPU = torch.device("cpu")
LAYOUTS = {"channels_last": channels_last, "contiguous": contiguous, "sliced": sliced}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
relaxed = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
ops = torch.ops.fusedres


# ---------------------------------------------------------------------------------------------------------------------
# The reference
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("counter", "key", "expected"), PHILOX4X32_10)
def test_known_answers(counter, key, expected):
    words = philox4x32([torch.tensor([word]) for word in counter], list(key))
    assert tuple(int(word) for word in words) == expected


def one_word(seed: int, i: int) -> int:
    """Word ``i`` of the stream, in plain integers."""
    c, k = [i // 4 % 2**32, i // 4 >> 32, 0, 0], [seed % 2**32, (seed >> 32) % 2**32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 % 2**32, (p0 >> 32) ^ c[3] ^ k[1], p0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c[i % 4]


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32, 2**63 - 1, -1])
@pytest.mark.parametrize("first", [0, 1, 6, 2**34 - 3, 2**45 + 2])
def test_words_are_those_of_plain_integers(seed, first):
    assert philox(seed, first, 9, CPU).tolist() == [one_word(seed, first + i) for i in range(9)]


def test_elements_are_counted_in_nhwc_order():
    n, c, h, w = shape = (2, 3, 4, 5)
    kept = keep_scale(torch.Size(shape), 0.5, torch.tensor([7]), torch.float64, CPU)
    for index in ((0, 0, 0, 0), (0, 2, 0, 0), (0, 0, 0, 1), (1, 2, 3, 4), (1, 0, 2, 3)):
        b, channel, y, x = index
        i = ((b * h + y) * w + x) * c + channel
        assert kept[index] == (2 if one_word(7, i) >= 2**31 else 0)
    assert kept.shape == (n, c, h, w)


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_the_mask_is_as_random_as_it_should_be(p):
    """Share, neighbours in every direction and other seeds, all within five standard deviations."""
    shape = torch.Size((8, 64, 32, 32))
    kept = (keep_scale(shape, p, torch.tensor([1234]), torch.float64, CPU) > 0).double()
    other = (keep_scale(shape, p, torch.tensor([1235]), torch.float64, CPU) > 0).double()
    deviation = math.sqrt(p * (1 - p))

    def near(found: Tensor, expected: float, sigma: float, count: int) -> bool:
        return abs(float(found) - expected) < 5 * sigma / math.sqrt(count)

    assert near(kept.mean(), 1 - p, deviation, kept.numel())
    standard, other = (kept - 1 + p) / deviation, (other - 1 + p) / deviation
    assert near((standard * other).mean(), 0, 1, kept.numel())
    for d in range(4):
        for distance in (1, 2, 4):
            rolled = standard.narrow(d, distance, shape[d] - distance) * standard.narrow(d, 0, shape[d] - distance)
            assert near(rolled.mean(), 0, 1, rolled.numel())
    for d in range(4):
        means = standard.mean([other for other in range(4) if other != d])
        assert means.abs().max() < 6 / math.sqrt(kept.numel() / shape[d])


def test_seeds_follow_torch():
    torch.manual_seed(5)
    first, second = draw_seed(), draw_seed()
    assert first.dtype == torch.int64 and first.shape == (1,) and first.device == CPU
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(first, draw_seed()) and torch.equal(second, draw_seed())
    torch.manual_seed(6)
    assert not torch.equal(first, draw_seed())


def test_scale_and_extremes():
    x = torch.full((1, 4, 8, 8), 3.0)
    seed = torch.tensor([1])
    assert set(dropped(x, 0.25, seed).unique().tolist()) == {0.0, 4.0}
    assert dropped(x, 0.0, None) is x
    assert torch.equal(dropped(x, 1.0, seed), torch.zeros_like(x))
    assert dropped(x * float("nan"), 1.0, seed).isnan().all()


def test_wrong_arguments_raise():
    x = torch.zeros(1, 2, 3, 4)
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\]"):
            dropped(x, p, torch.tensor([1]))
    with pytest.raises(ValueError, match="seed must be given"):
        dropped(x, 0.5, None)


# ---------------------------------------------------------------------------------------------------------------------
# The kernels
# ---------------------------------------------------------------------------------------------------------------------


def masks(ones: Tensor, p: float, seed: Tensor, name: str = "_cpu") -> list[Tensor]:
    """What the join makes of ones, what its backward emits, and the gradient that it lets through."""
    operands, modifiers = (ones, None, None, None, 0, 0.0), (None, p, seed)
    forward = getattr(ops, f"join{name}")(*operands, *modifiers)
    sums, emitted = getattr(ops, f"join_backward_reduce{name}")(ones, *operands, True, *modifiers)
    apply = getattr(ops, f"join_backward_apply{name}")
    gradient, _ = apply(ones, *operands, None, 1.0, False, False, False, *modifiers)
    torch.testing.assert_close(sums[0], gradient.float().sum((0, 2, 3)), rtol=1e-2, atol=1e-2, equal_nan=True)
    return [forward, emitted, gradient]


def check_masks(ones: Tensor, p: float, seed: Tensor) -> None:
    expected = keep_scale(ones.shape, p, seed, torch.float32, CPU).to(ones.dtype)
    for found in masks(ones, p, seed):
        assert torch.equal(found, expected)


def test_every_layout_and_dtype_has_the_reference_masks(isa):
    for make in LAYOUTS.values():
        for dtype in DTYPES:
            for shape in ((2, 37, 7, 5), (3, 64, 6, 6), (1, 200, 13, 11), (2, 3, 50, 90), (5, 16, 1, 1)):
                for p in (0.0, 0.3, 0.5, 1.0):
                    check_masks(make(shape, dtype).fill_(1), p, torch.tensor([2**40 + 3]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_remainder_of_channels(isa, layout):
    for channels in range(1, 68):
        check_masks(LAYOUTS[layout]((2, channels, 5, 3)).fill_(1), 0.5, torch.tensor([channels]))


@relaxed
@given(
    n=st.integers(0, 3),
    c=st.integers(1, 150),
    h=st.integers(1, 17),
    w=st.integers(1, 17),
    layout=st.sampled_from(sorted(LAYOUTS)),
    p=st.floats(0, 1),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_any_shape_and_seed(n, c, h, w, layout, p, seed):
    check_masks(LAYOUTS[layout]((n, c, h, w)).fill_(1), p, torch.tensor([seed]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_threshold_is_exact(isa, layout):
    """An element is kept where ``p`` is its word over 2^32, and dropped one step further."""
    x = LAYOUTS[layout]((1, 8, 2, 2)).fill_(1)
    for element, word in enumerate(PHILOX4X32_10[0][2]):  # of counter zero and seed zero
        for p, kept in ((word / 2**32, True), ((word + 1) / 2**32, False)):
            for found in masks(x, p, torch.tensor([0])):
                assert bool(found[0, element, 0, 0] > 0) is kept


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_bitwise_the_same_for_any_number_of_threads(layout, threads):
    args = LAYOUTS[layout]((3, 48, 33, 33)).fill_(1), 0.4, torch.tensor([99])
    for one, two in zip(threads(1, masks, *args), threads(2, masks, *args)):
        assert torch.equal(one, two)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("p", [0.5, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_zero_times_non_finite_values_is_as_in_stock(isa, layout, p, value):
    x = LAYOUTS[layout]((1, 19, 3, 4)).fill_(value)
    seed = torch.tensor([4])
    for found, expected in zip(masks(x, p, seed), masks(x, p, seed, "")):
        stock = x.contiguous() * keep_scale(x.shape, p, seed, x.dtype, CPU)
        torch.testing.assert_close(found.contiguous(), stock, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(expected.contiguous(), stock, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("p", "seed", "message"),
    [
        (0.5, None, "seed must be given"),
        (-0.5, torch.tensor([1]), r"dropout must be in \[0, 1\]"),
        (1.5, torch.tensor([1]), r"dropout must be in \[0, 1\]"),
        (float("nan"), torch.tensor([1]), r"dropout must be in \[0, 1\]"),
        (0.5, torch.tensor([1, 2]), "seed must be an int64 tensor of one element"),
        (0.5, torch.tensor([1.0]), "seed must be an int64 tensor of one element"),
    ],
)
def test_wrong_arguments_of_kernels_raise(p, seed, message):
    y = torch.ones(1, 2, 3, 4)
    operands = (y, None, None, None, 0, 0.0)
    with pytest.raises(RuntimeError, match=message):
        ops.join_cpu(*operands, None, p, seed)
    with pytest.raises(RuntimeError, match=message):
        ops.join_backward_reduce_cpu(y, *operands, False, None, p, seed)
    with pytest.raises(RuntimeError, match=message):
        ops.join_backward_apply_cpu(y, *operands, None, 1.0, False, False, False, None, p, seed)
