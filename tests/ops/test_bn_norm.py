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


@pytest.mark.parametrize("name", ["bn_norm", "bn_norm_cpu"])
@pytest.mark.parametrize("training", [True, False])
def test_opcheck(name, training):
    stats = torch.ops.fusedres.bn_stats(channels_last((3, C, 5, 4))) if training else None
    torch.library.opcheck(getattr(torch.ops.fusedres, name).default, (stats, 60.0, *vectors(), 0.1, 1e-5))
