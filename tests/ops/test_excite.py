"""The excitation's reference against stock PyTorch's layers; the kernel runs in tests/triton/cases."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusedres.ops.activations import ACTIVATIONS, Activation
from fusedres.ops.excite import GATES


def operands(dtype=torch.float64, normed=True, bias=True, masked=True, pointwise=False):
    torch.manual_seed(1)
    wide = torch.promote_types(dtype, torch.float32)
    means, norm = torch.randn(3, 10, dtype=wide), torch.randn(4, 10, dtype=wide) if normed else None
    fc1, fc2 = nn.Linear(10, 4, bias=bias, dtype=dtype), nn.Linear(4, 10, bias=bias, dtype=dtype)
    weights = [w[:, :, None, None] if pointwise else w for w in (fc1.weight.detach(), fc2.weight.detach())]
    biases = [fc1.bias.detach(), fc2.bias.detach()] if bias else [None, None]
    mask = torch.tensor([[0.0], [2.0], [2.0]], dtype=wide) if masked else None
    return means, norm, weights[0], biases[0], weights[1], biases[1], mask


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(
    "case", [{}, {"normed": False}, {"bias": False}, {"masked": False}, {"pointwise": True}], ids=str
)
def test_against_stocks_layers(case, name, gate):
    means, norm, w1, b1, w2, b2, mask = operands(**case)
    act = Activation(name, 0.125)
    ours = torch.ops.fusedres.excite(means, norm, w1, b1, w2, b2, act.code, act.param, gate, mask)
    squeeze = means if norm is None else norm[2] * means + norm[3]
    expected = GATES[gate](F.linear(act(F.linear(squeeze, w1.flatten(1), b1)), w2.flatten(1), b2))
    torch.testing.assert_close(ours, expected if mask is None else expected * mask)
