"""The join's backward: the per-channel sums, then the gradients; eager is autograd's own backward of the same join."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench.ops.contestants import BACKENDS, check, nbytes, require
from bench.shapes import ACTIVATIONS, name_of
from fusedres.ops.activations import RELU
from fusedres.ops.registry import OPS
from fusedres.testing import channels_last

REDUCE, APPLY = OPS["join_backward_reduce"], OPS["join_backward_apply"]


@pytest.mark.parametrize("contestant", ["eager", *BACKENDS])
@pytest.mark.parametrize("shape", ACTIVATIONS, ids=name_of, indirect=True)
def test_join_backward(race, shape, dtype, contestant):
    grad, y, residual = (channels_last(shape, dtype, seed) for seed in range(3))
    if contestant == "eager":
        call = eager(grad, y, residual)
    else:
        require(contestant, dtype)
        call = ours(contestant, grad, y, residual)
    touched = 2 * nbytes(grad, y, residual) + nbytes(y, residual)
    race(f"join backward {name_of(shape)} {dtype}", call, dtype=dtype, touched=touched)


def ours(backend, grad, y, residual):
    """Both passes, checked."""
    channels, count = y.shape[1], y.numel() / y.shape[1]
    rows = torch.ops.fusedres.bn_norm(torch.ops.fusedres.bn_stats(y), count, None, None, None, None, 0.0, 1e-5)
    assert rows.shape == (4, channels)
    operands = [grad, y, rows, residual, None, RELU.code, RELU.param]
    sums = REDUCE.overload("reference")(*operands, False)[0]
    check(REDUCE, backend, [*operands, False])
    check(APPLY, backend, [*operands, sums, count, True, False, True])

    def call():
        sums = REDUCE.overload(backend)(*operands, False)[0]
        return APPLY.overload(backend)(*operands, sums, count, True, False, True)

    return call


def eager(grad, y, residual):
    """Stock PyTorch's backward, without its forward."""
    y, residual = y.detach().requires_grad_(), residual.detach().requires_grad_()
    out = torch.relu(F.batch_norm(y, None, None, training=True) + residual)
    return lambda: torch.autograd.grad(out, (y, residual), grad, retain_graph=True)
