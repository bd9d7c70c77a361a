"""Batch statistics and the rows made of them, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusedres.ops.bn_norm import BN_NORM
from fusedres.ops.bn_stats import BN_STATS
from fusedres.testing import assert_within_budget, channels_last, contiguous, rms

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {"channels_last": channels_last, "contiguous": contiguous}
relaxed = settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])


def kernel(*args):
    return BN_STATS.overload("triton")(*args)


def stock(x, per_sample):
    """The statistics as stock PyTorch's batch norm finds them: read from its running ones."""
    found = []
    for part in x.split(1) if per_sample else [x]:
        count = part.numel() // part.shape[1]
        mean, var = torch.zeros(2, part.shape[1], device=x.device)
        torch.nn.functional.batch_norm(part, mean, var, None, None, True, 1.0, 1e-5)
        found.append(torch.stack((mean, var * (count - 1))))
    return torch.stack(found, 1) if per_sample else found[0]


def check(x, per_sample=False, into=None):
    ours = kernel(x, per_sample, into)
    # Stock has no variance of a single value.
    single = x[0, 0].numel() * (1 if per_sample else len(x)) == 1
    plain = BN_STATS.reference(x, per_sample) if single else stock(x, per_sample)
    exact = BN_STATS.reference(x.double(), per_sample).float()
    for name, *tensors in zip(("mean", "M2"), ours, plain, exact):
        # A mean is a sum that may cancel: one rounding of its terms is always allowed.
        assert_within_budget(*tensors, name, scale=rms(x) if name == "mean" else None)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics(device, dtype, layout, per_sample):
    check(LAYOUTS[layout]((3, 37, 9, 7), dtype, 1).to(device) + 100, per_sample)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 64, 1, 1), (1, 300, 5, 3), (1, 8, 120, 40)], ids=str)
def test_statistics_of_other_shapes(device, shape):
    check(channels_last(shape, torch.float32, 1).to(device))


@relaxed
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 12), st.integers(1, 12)),
    layout=st.sampled_from(sorted(LAYOUTS)),
    per_sample=st.booleans(),
)
def test_any_shape(device, shape, layout, per_sample):
    x = LAYOUTS[layout](shape, torch.float32, 2).to(device)
    torch.testing.assert_close(kernel(x, per_sample), BN_STATS.reference(x, per_sample), rtol=1e-5, atol=1e-5)


def test_many_pieces_are_merged_in_levels(device):
    from fusedres.triton.bn_stats import merge_statistics

    values = torch.randn(2, 12345, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device) + 3
    piece = 8
    parts = [values[:, i : i + piece] for i in range(0, 12345, piece)]
    partials = torch.stack(
        [torch.stack((p.mean(1), (p - p.mean(1, keepdim=True)).square().sum(1)), 1) for p in parts], 1
    )
    merged = merge_statistics(partials.float().contiguous(), 12345, piece)
    mean = values.mean(1)
    torch.testing.assert_close(merged[0].double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(merged[1].double(), (values - mean[:, None]).square().sum(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("per_sample", [False, True])
def test_nothing(device, per_sample):
    x = channels_last((0, 8, 4, 4)).to(device)
    torch.testing.assert_close(
        kernel(x, per_sample, None), BN_STATS.reference(x, per_sample), equal_nan=True, rtol=0, atol=0
    )


@pytest.mark.parametrize("channels", [12, 16])
def test_slices(device, channels):
    buffer = channels_last((2, 48, 5, 7), torch.bfloat16, 1).to(device)
    into = channels_last((2, 40, 5, 7), torch.bfloat16, 2).to(device)
    before = into.clone()
    x = buffer[:, 3 : 3 + channels]
    check(x, False, into[:, 8 : 8 + channels])
    assert torch.equal(into[:, 8 : 8 + channels], x)
    assert torch.equal(into[:, :8], before[:, :8]) and torch.equal(into[:, 8 + channels :], before[:, 8 + channels :])


def test_bitwise_the_same_from_run_to_run(device):
    x = channels_last((2, 24, 33, 17), torch.bfloat16, 1).to(device)
    assert torch.equal(kernel(x), kernel(x))


@pytest.mark.parametrize("parts", [None, 0, 3], ids=["running", "merged", "partials"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows(device, parts, affine, dtype):
    generator = torch.Generator().manual_seed(3)
    c, count = 150, 96.0
    gamma, beta = torch.randn(2, c, generator=generator).to(dtype).to(device)
    stats = None if parts is None else torch.rand(*((2, c) if not parts else (2, parts, c)), generator=generator) + 0.5
    stats = None if stats is None else stats.to(device)
    running = [t.to(dtype).to(device) for t in torch.rand(2, c, generator=generator) + 0.1]

    def run(op, cast):
        affines = (cast(gamma), cast(beta)) if affine else (None, None)
        buffers = [cast(t).clone() for t in running]
        rows = op(None if stats is None else cast(stats), count, *affines, *buffers, 0.1, 1e-5)
        return [rows.float(), *(b.to(dtype) for b in buffers)]

    same = run(BN_NORM.reference, lambda t: t)
    exact = run(BN_NORM.reference, lambda t: t.double())
    for ours, plain, reference in zip(run(BN_NORM.overload("triton"), lambda t: t), same, exact):
        assert_within_budget(ours, plain, reference)


def test_rows_need_statistics(device):
    with pytest.raises(ValueError, match="neither"):
        BN_NORM.overload("triton")(None, 1.0, None, torch.ones(3, device=device), None, None, 0.1, 1e-5)
