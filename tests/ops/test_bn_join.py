"""A batch norm and the join behind it as one op: its reference is the three ops, which are stock PyTorch's layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fusedres.ops.activations import Activation
from fusedres.ops.bn_join import BN_JOIN
from fusedres.testing import channels_last, contiguous

EPS, MOMENTUM = 1e-5, 0.3


@pytest.mark.parametrize("make", [channels_last, contiguous])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_is_batch_norm_sum_and_activation(make, residual, affine):
    y, side = make((3, 7, 5, 4), torch.float64), make((3, 7, 5, 4), torch.float64, 1) if residual else None
    gamma, beta = (torch.rand(2, 7, dtype=torch.float64) + 0.5).unbind(0) if affine else (None, None)
    buffers, expected_buffers = ([torch.zeros(7).double(), torch.ones(7).double()] for _ in range(2))
    z = F.batch_norm(y, *expected_buffers, gamma, beta, True, MOMENTUM, EPS)
    expected = F.silu(z if side is None else z + side)
    act = Activation("silu")
    out, rows = BN_JOIN.reference(y, gamma, beta, *buffers, MOMENTUM, EPS, side, None, act.code, act.param)
    torch.testing.assert_close(out, expected)
    assert out.stride() == y.stride()
    torch.testing.assert_close(rows[0], y.mean((0, 2, 3)))
    for ours, theirs in zip(buffers, expected_buffers):
        torch.testing.assert_close(ours, theirs)
