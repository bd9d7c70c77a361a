"""The join's backward: the per-channel sums, then the gradients; eager is autograd's own backward of the same join."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench.ops.contestants import BACKENDS, check, nbytes, require
from fusedres.benchmarking.shapes import ACTIVATIONS, MODIFIED, name_of
from fusedres.ops.activations import RELU
from fusedres.ops.registry import OPS
from fusedres.testing import channels_last, sliced

REDUCE, MASK, APPLY = OPS["join_backward_reduce"], OPS["join_backward_mask"], OPS["join_backward_apply"]
DROPOUT = 0.3


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


@pytest.mark.parametrize("contestant", ["eager", "reference"])
@pytest.mark.parametrize("shape", ACTIVATIONS, ids=name_of, indirect=True)
def test_join_backward_mask(race, shape, dtype, contestant):
    """The pass that leaves the norm's formula to what reads its gradient; eager applies that too, for want of one."""
    grad, y, residual = (channels_last(shape, dtype, seed) for seed in range(3))
    if contestant == "eager":
        call = eager(grad, y, residual)
    else:
        rows = torch.ops.fusedres.bn_norm(torch.ops.fusedres.bn_stats(y), 4.0, None, None, None, None, 0.0, 1e-5)
        operands = [grad, y, rows, residual, None, RELU.code, RELU.param, False]
        check(MASK, "reference", operands)
        call = lambda: MASK.overload("reference")(*operands)  # noqa: E731
    race(f"join backward mask {name_of(shape)} {dtype}", call, dtype=dtype, touched=nbytes(grad, y, residual, y))


@pytest.mark.parametrize("contestant", ["eager", *BACKENDS])
@pytest.mark.parametrize("form", ["slice", "gain", "dropout"])
@pytest.mark.parametrize("shape", MODIFIED, ids=name_of, indirect=True)
def test_modified_join_backward(race, shape, dtype, form, contestant):
    """Of a slice of the channels, added to a slice of a gradient; with excitation's factors; with dropout's mask."""
    make = sliced if form == "slice" else channels_last
    grad, y = channels_last(shape, dtype), make(shape, dtype, 1)
    total = make(shape, dtype, 2) if form == "slice" else None
    gain = torch.rand(shape[:2]) if form == "gain" else None
    if contestant == "eager":
        call = eager_modified(grad, y, total, gain, DROPOUT if form == "dropout" else 0.0)
    else:
        require(contestant, dtype)
        call = ours_modified(contestant, grad, y, total, gain, DROPOUT if form == "dropout" else 0.0)
    race(f"join backward, {form}, {name_of(shape)} {dtype}", call, dtype=dtype, touched=nbytes(grad, y, grad, y, y))


def ours_modified(backend, grad, y, total, gain, dropout):
    """Both passes, checked; an excitation's own gradient is left out on either side."""
    count = y.numel() / y.shape[1]
    rows = torch.ops.fusedres.bn_norm(torch.ops.fusedres.bn_stats(y), count, None, None, None, None, 0.0, 1e-5)
    operands = [grad, y, rows, None, None, RELU.code, RELU.param]
    modifiers = [gain, dropout, torch.tensor([1]) if dropout else None]

    def totals(sums):
        return sums if gain is None else torch.cat(((gain * sums[:2]).sum(1), sums[2:].sum(1)))

    sums = totals(REDUCE.overload("reference")(*operands, False, *modifiers)[0])
    check(REDUCE, backend, [*operands, False, *modifiers])
    check(APPLY, backend, [*operands, sums, count, True, False, False, *modifiers, None, total, total])

    def call():
        sums = totals(REDUCE.overload(backend)(*operands, False, *modifiers)[0])
        flags = True, False, False
        return APPLY.overload(backend)(*operands, sums, count, *flags, *modifiers, None, total, total)

    return call


def eager_modified(grad, y, total, gain, dropout):
    """Stock PyTorch's backward, without its forward; the gradient is added by a pass of its own."""
    y = y.detach().requires_grad_()
    z = F.batch_norm(y, None, None, training=True)
    out = torch.relu(z if gain is None else z * gain[:, :, None, None].to(z.dtype))
    out = F.dropout(out, dropout, training=True) if dropout else out

    def call():
        (found,) = torch.autograd.grad(out, y, grad, retain_graph=True)
        return found if total is None else total.add_(found)

    return call
