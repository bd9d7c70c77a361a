"""The rows of a batch norm in the emulator."""

from __future__ import annotations

import pytest
import torch
from cuda_ops import check_bn_norm

from fusedres.ops.bn_norm import BN_NORM


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("partials", [None, 1, 3, 20])
@pytest.mark.parametrize("absent", ["", "affine", "running"])
def test_against_float64(dtype, partials, absent):
    for channels in (1, 32, 45):
        check_bn_norm(channels, partials, dtype, "cpu", absent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_statistics(dtype):
    check_bn_norm(37, None, dtype, "cpu", "stats")


def test_a_single_infinite_partial_stays_itself():
    stats = torch.tensor([[float("inf")], [float("nan")]])
    rows = BN_NORM.overload("cuda")(stats, 4.0, None, None, None, None, 0.1, 1e-5)
    assert rows[0].isinf().all() and rows[1].isnan().all()


def test_strided_vectors():
    wide = torch.randn(8, 2).abs() + 1
    mean, var = wide[:, 0], wide[:, 1]
    expected = BN_NORM.overload("reference")(None, 1.0, None, None, mean, var, 0.0, 1e-5)
    torch.testing.assert_close(BN_NORM.overload("cuda")(None, 1.0, None, None, mean, var, 0.0, 1e-5), expected)


def test_wrong_input():
    with pytest.raises(RuntimeError, match="neither"):
        BN_NORM.overload("cuda")(None, 1.0, torch.ones(4), None, None, None, 0.0, 1e-5)
    with pytest.raises(RuntimeError, match="gamma"):
        BN_NORM.overload("cuda")(torch.ones(2, 4), 3.0, torch.ones(5), None, None, None, 0.0, 1e-5)
    with pytest.raises(RuntimeError, match="stats"):
        BN_NORM.overload("cuda")(torch.ones(3, 4), 3.0, None, None, None, None, 0.0, 1e-5)
