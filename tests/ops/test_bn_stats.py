"""Batch statistics: every instruction set, layout and dtype against float64, and what they must survive."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slices import empty_slice

from fusedres.testing import assert_within_budget, channels_last, contiguous, rms, sliced

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DENSE = {"channels_last": channels_last, "contiguous": contiguous}
LAYOUTS = {**DENSE, "sliced": sliced}
relaxed = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def kernel(x: torch.Tensor, per_sample: bool = False, into: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.fusedres.bn_stats_cpu(x, per_sample, into)


def stock(x: torch.Tensor) -> torch.Tensor:
    """The statistics as stock PyTorch's batch norm finds them: read from its running ones."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, var = torch.zeros(x.shape[1], dtype=dtype), torch.ones(x.shape[1], dtype=dtype)
    F.batch_norm(x, mean, var, training=True, momentum=1.0)
    return torch.stack((mean, var * (x.numel() // x.shape[1] - 1)))


def exact(x: torch.Tensor) -> torch.Tensor:
    values = x.double()
    mean = values.mean((0, 2, 3))
    return torch.stack((mean, (values - mean[:, None, None]).square().sum((0, 2, 3))))


def check(x: torch.Tensor) -> None:
    ours, theirs, reference = kernel(x), stock(x), exact(x)
    assert_within_budget(ours[0], theirs[0], reference[0], "mean", scale=rms(x))
    assert_within_budget(ours[1], theirs[1], reference[1], "m2")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_float64(isa, layout, dtype):
    check(LAYOUTS[layout]((4, 67, 13, 11), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("plane", [(13, 11), (30, 30), (1, 2)])  # one partial, several, hardly any values
def test_every_sample_on_its_own_against_float64(isa, layout, dtype, plane):
    x = LAYOUTS[layout]((4, 67, *plane), dtype)
    ours = kernel(x, per_sample=True)
    assert ours.shape == (2, 4, 67)
    for i in range(4):
        theirs, reference = stock(x[i : i + 1]), exact(x[i : i + 1])
        assert_within_budget(ours[0, i], theirs[0], reference[0], f"mean of sample {i}", scale=rms(x))
        assert_within_budget(ours[1, i], theirs[1], reference[1], f"m2 of sample {i}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize(
    ("layout", "to_slice"),
    [
        ("contiguous", False),
        ("channels_last", False),
        ("channels_last", True),
        ("sliced", False),
        ("sliced", True),
    ],
)
def test_copies_in_the_same_pass(isa, layout, dtype, to_slice, per_sample):
    x = LAYOUTS[layout]((3, 67, 13, 11), dtype)
    x[1, 2, 3, 4] = float("nan")
    x[1, 5, 3, 4] = float("inf")
    into, check_gaps = empty_slice(x.shape, dtype)
    if not to_slice:
        into = DENSE["contiguous" if layout == "contiguous" else "channels_last"](x.shape, dtype, 1)
    found = kernel(x, per_sample, into)
    torch.testing.assert_close(into, x, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found, kernel(x, per_sample), rtol=0, atol=0, equal_nan=True)
    if to_slice:
        check_gaps()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_remainder_of_channels(isa, layout):
    for channels in range(1, 68):
        x = LAYOUTS[layout]((2, channels, 5, 3))
        torch.testing.assert_close(kernel(x), exact(x).float(), rtol=1e-4, atol=1e-5)


@relaxed
@given(
    n=st.integers(1, 4),
    c=st.integers(1, 70),
    h=st.integers(1, 20),
    w=st.integers(1, 20),
    layout=st.sampled_from(sorted(LAYOUTS)),
    copies=st.booleans(),
)
def test_any_shape(n, c, h, w, layout, copies):
    x = LAYOUTS[layout]((n, c, h, w))
    into, check_gaps = (torch.full_like(x, float("nan")), None) if layout == "contiguous" else empty_slice(x.shape)
    torch.testing.assert_close(kernel(x, False, into if copies else None), exact(x).float(), rtol=1e-4, atol=1e-5)
    each = torch.stack([exact(x[i : i + 1]) for i in range(n)], 1).float()
    torch.testing.assert_close(kernel(x, True, into if copies else None), each, rtol=1e-4, atol=1e-5)
    assert not copies or torch.equal(into, x)
    if check_gaps is not None:
        check_gaps()


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (1, 3, 1, 1), (1, 3, 4, 1), (3, 1, 1, 5), (2, 1, 4, 1), (1, 1, 1, 1)])
def test_slices_with_dimensions_of_one(isa, shape):
    """Whose strides are anything at all."""
    x, (into, check_gaps) = sliced(shape), empty_slice(shape)
    strides = [stride if size > 1 else 12345 for stride, size in zip(x.stride(), shape)]
    x = x.as_strided(shape, strides)
    torch.testing.assert_close(kernel(x, False, into), exact(x).float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(into, x)
    check_gaps()


def test_no_sample_has_no_statistics_of_its_own():
    assert kernel(torch.zeros(0, 3, 2, 2), per_sample=True).shape == (2, 0, 3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 32, 40, 40), (2, 5, 70, 70)])
def test_large_mean_does_not_cancel_small_variance(isa, layout, shape):
    x = LAYOUTS[layout](shape).mul_(1e-2).add_(1e3)
    check(x)
    for i, ours in enumerate(kernel(x, per_sample=True).unbind(1)):
        assert_within_budget(ours[1], stock(x[i : i + 1])[1], exact(x[i : i + 1])[1], f"m2 of sample {i}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_non_finite_values_stay_in_their_channel(isa, layout, value):
    x = LAYOUTS[layout]((2, 19, 4, 5))
    x[1, 3, 2, 2] = value
    ours, theirs = kernel(x), stock(x)
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    assert ours.isfinite().sum() == 2 * 18
    assert torch.equal(ours[0, 3].nan_to_num(), theirs[0, 3].nan_to_num())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_the_same_for_any_number_of_threads(layout, dtype, threads):
    x = LAYOUTS[layout]((4, 48, 33, 33), dtype)
    for per_sample in (False, True):
        first = threads(1, kernel, x, per_sample)
        assert torch.equal(first, threads(2, kernel, x, per_sample))
        assert torch.equal(first, threads(2, kernel, x, per_sample))


def test_constant_has_no_variance(isa):
    assert torch.equal(kernel(torch.full((2, 3, 8, 8), 0.1))[1], torch.zeros(3))


def test_wrong_input_raises():
    with pytest.raises(RuntimeError, match="no element"):
        kernel(torch.zeros(0, 3, 2, 2))
    with pytest.raises(RuntimeError, match="no element"):
        kernel(torch.zeros(2, 3, 0, 2), per_sample=True)
    with pytest.raises(RuntimeError, match="dense"):
        kernel(torch.zeros(2, 3, 4, 5).transpose(2, 3))
    with pytest.raises(RuntimeError, match="dtype"):
        kernel(torch.zeros(2, 3, 4, 5, dtype=torch.float64))
    x = channels_last((2, 3, 4, 5))
    with pytest.raises(RuntimeError, match="into must have the layout"):
        kernel(x, False, torch.zeros(2, 3, 4, 5))
    with pytest.raises(RuntimeError, match="into must have the layout"):
        kernel(x.contiguous(), False, empty_slice(x.shape)[0])
    with pytest.raises(RuntimeError, match="into differs"):
        kernel(x, False, x[:1])
    with pytest.raises(RuntimeError, match="into must have the dtype"):
        kernel(x, False, x.bfloat16())


@pytest.mark.parametrize("strides", [(60, 1, 15, 2), (61, 1, 15, 3), (60, 1, 16, 3), (60, 2, 15, 3), (0, 1, 15, 3)])
def test_what_is_no_slice_raises(strides):
    """Pixels that overlap, and distances that differ between columns, rows and samples."""
    with pytest.raises(RuntimeError, match="x must have the layout"):
        kernel(torch.zeros(200).as_strided((2, 3, 4, 5), strides))


def test_reference_in_float64():
    x = contiguous((2, 5, 4, 3), torch.float64)
    torch.testing.assert_close(torch.ops.fusedres.bn_stats(x), exact(x), rtol=1e-13, atol=1e-13)
    into = torch.zeros_like(x)
    each = torch.stack([exact(x[i : i + 1]) for i in range(2)], 1)
    torch.testing.assert_close(torch.ops.fusedres.bn_stats(x, True, into), each, rtol=1e-13, atol=1e-13)
    assert torch.equal(into, x)
