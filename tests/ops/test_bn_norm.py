"""From statistics to an affine, and the running statistics, against stock PyTorch's batch norm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres.testing import assert_within_budget, channels_last, rms

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
C = 37


def vectors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """gamma, beta, running_mean, running_var."""
    gamma, beta, mean, var = torch.randn(4, C, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [gamma, beta, mean, var.abs() + 0.5]


def rows(x: Tensor, operands: list[Tensor | None], training: bool, name: str = "bn_norm_cpu") -> Tensor:
    op = getattr(torch.ops.fusedres, name)
    if not training:
        return op(None, 1.0, *operands, 0.1, 1e-5)
    return op(torch.ops.fusedres.bn_stats(x), x.numel() / x.shape[1], *operands, 0.1, 1e-5)


def applied(x: Tensor, rows: Tensor) -> Tensor:
    return rows[2, :, None, None] * x + rows[3, :, None, None]


@pytest.mark.parametrize("name", ["bn_norm", "bn_norm_cpu"])
@pytest.mark.parametrize("training", [True, False])
def test_against_float64(name, training):
    x = channels_last((3, C, 5, 4))
    operands, stock, exact = vectors(), vectors(), [t.double() for t in vectors()]
    found = rows(x, operands, training, name)

    def batch_norm(x: Tensor, v: list[Tensor]) -> Tensor:
        return F.batch_norm(x, v[2], v[3], v[0], v[1], training, 0.1, 1e-5)

    expected, reference = batch_norm(x, stock), batch_norm(x.double(), exact)
    assert_within_budget(applied(x, found), expected, reference)
    assert_within_budget(operands[2], stock[2], exact[2], "running_mean", scale=rms(x))
    assert_within_budget(operands[3], stock[3], exact[3], "running_var")


@pytest.mark.parametrize("name", ["bn_norm", "bn_norm_cpu"])
@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_statistics_of_samples_are_merged(name, mean):
    """Against float64: nothing is lost to statistics of the whole batch, not even where the samples' means differ."""
    x = channels_last((5, C, 7, 4)) + torch.arange(5.0).view(5, 1, 1, 1) / 2 + mean
    operands, stock, exact = vectors(), vectors(), [t.double() for t in vectors()]
    op = getattr(torch.ops.fusedres, name)
    found = op(torch.ops.fusedres.bn_stats(x, True), 140.0, *operands, 0.1, 1e-5)
    expected = F.batch_norm(x, stock[2], stock[3], stock[0], stock[1], True, 0.1, 1e-5)
    reference = F.batch_norm(x.double(), exact[2], exact[3], exact[0], exact[1], True, 0.1, 1e-5)
    scale = rms(found[2]) * rms(x)  # of the two numbers whose sum the result is
    assert_within_budget(applied(x, found), expected, reference, scale=scale)
    assert_within_budget(operands[2], stock[2], exact[2], "running_mean", scale=rms(x))
    assert_within_budget(operands[3], stock[3], exact[3], "running_var")


def test_one_sample_is_as_no_samples():
    stats = torch.ops.fusedres.bn_stats(channels_last((1, C, 7, 4)))
    stats[0, 3] = float("inf")
    one, none = (torch.ops.fusedres.bn_norm_cpu(s, 28.0, *vectors(), 0.1, 1e-5) for s in (stats[:, None], stats))
    torch.testing.assert_close(one, none, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_of_any_dtype(dtype):
    x = channels_last((3, C, 5, 4))
    ours, reference = vectors(dtype), vectors(dtype)
    found, expected = rows(x, ours, True), rows(x, reference, True, "bn_norm")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(ours, reference):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("absent", [(0,), (1,), (0, 1), (2, 3), (0, 1, 2, 3)])
def test_absent_operands(absent):
    x = channels_last((3, C, 5, 4))
    operands = [None if i in absent else t for i, t in enumerate(vectors())]
    stats = [None if i in absent else t.clone() for i, t in enumerate(vectors())]
    expected = F.batch_norm(x, stats[2], stats[3], stats[0], stats[1], True, 0.1, 1e-5)
    torch.testing.assert_close(applied(x, rows(x, operands, True)), expected, rtol=1e-4, atol=1e-5)


def test_strided_vectors():
    x = channels_last((3, C, 5, 4))
    strided = [torch.stack((t, torch.full_like(t, float("nan"))), 1)[:, 0] for t in vectors()]
    dense = vectors()
    assert torch.equal(rows(x, strided, True), rows(x, dense, True))
    assert all(torch.equal(a, b) for a, b in zip(strided, dense))


def test_statistics_are_updated_only_when_they_are_the_batchs():
    operands = vectors()
    rows(channels_last((3, C, 5, 4)), operands, False)
    assert all(torch.equal(a, b) for a, b in zip(operands, vectors()))


def test_no_statistics_at_all_raises():
    with pytest.raises(ValueError, match="neither batch statistics nor running statistics"):
        torch.ops.fusedres.bn_norm(None, 1.0, None, None, None, None, 0.1, 1e-5)
    with pytest.raises(RuntimeError, match="neither batch statistics nor running statistics"):
        torch.ops.fusedres.bn_norm_cpu(None, 1.0, torch.ones(3), None, None, None, 0.1, 1e-5)


def test_wrong_length_raises():
    operands = vectors()
    operands[0] = torch.ones(C + 1)
    with pytest.raises(RuntimeError, match="gamma"):
        rows(channels_last((3, C, 5, 4)), operands, False)
    for stats in (
        torch.ones(3, C),
        torch.ones(2, 4, 4, C),
        torch.ones(2, C, dtype=torch.float64),
        torch.ones(C, 2).t(),
    ):
        with pytest.raises(RuntimeError, match="stats"):
            torch.ops.fusedres.bn_norm_cpu(stats, 1.0, *vectors(), 0.1, 1e-5)
