"""Batch statistics: every instruction set, layout and dtype against float64, and what they must survive."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusedres.testing import assert_within_budget, channels_last, contiguous, rms

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {"channels_last": channels_last, "contiguous": contiguous}
relaxed = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def kernel(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.fusedres.bn_stats_cpu(x)


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
)
def test_any_shape(n, c, h, w, layout):
    x = LAYOUTS[layout]((n, c, h, w))
    torch.testing.assert_close(kernel(x), exact(x).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 32, 40, 40), (2, 5, 70, 70)])
def test_large_mean_does_not_cancel_small_variance(isa, layout, shape):
    x = LAYOUTS[layout](shape) * 1e-2 + 1e3
    check(x)


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
    first = threads(1, kernel, x)
    assert torch.equal(first, threads(2, kernel, x))
    assert torch.equal(first, threads(2, kernel, x))


def test_constant_has_no_variance(isa):
    assert torch.equal(kernel(torch.full((2, 3, 8, 8), 0.1))[1], torch.zeros(3))


def test_wrong_input_raises():
    with pytest.raises(RuntimeError, match="no element"):
        kernel(torch.zeros(0, 3, 2, 2))
    with pytest.raises(RuntimeError, match="dense"):
        kernel(torch.zeros(2, 3, 4, 5).transpose(2, 3))
    with pytest.raises(RuntimeError, match="dtype"):
        kernel(torch.zeros(2, 3, 4, 5, dtype=torch.float64))


@pytest.mark.parametrize("name", ["bn_stats", "bn_stats_cpu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(name, dtype):
    torch.library.opcheck(getattr(torch.ops.fusedres, name).default, (channels_last((2, 5, 4, 3), dtype),))


def test_reference_in_float64():
    x = contiguous((2, 5, 4, 3), torch.float64)
    torch.testing.assert_close(torch.ops.fusedres.bn_stats(x), exact(x), rtol=1e-13, atol=1e-13)
