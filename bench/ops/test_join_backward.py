"""The join's backward: the per-channel sums, then the gradients; eager is autograd's own backward of the same join."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench.ops.contestants import BACKENDS, COMPILED, Contest, backward_of, check, group_of, nbytes
from bench.shapes import MODIFIED, activations
from fusedres.ops.activations import RELU
from fusedres.ops.registry import OPS
from fusedres.testing import channels_last, sliced

REDUCE, MASK, APPLY = OPS["join_backward_reduce"], OPS["join_backward_mask"], OPS["join_backward_apply"]
BOTH = OPS["join_backward"]  # whose kernel is in test_on_gpu.py
DROPOUT = 0.3


def rows_of(y):
    """The norm's rows, from the batch."""
    count = y.numel() / y.shape[1]
    return torch.ops.fusedres.bn_norm(torch.ops.fusedres.bn_stats(y), count, None, None, None, None, 0.0, 1e-5), count


@pytest.mark.parametrize("contestant", ["eager", COMPILED, *BACKENDS])
@pytest.mark.parametrize("shape", activations(), indirect=True)
def test_join_backward(race, shape, dtype, contestant):
    group = group_of("join_backward", dtype, shape)

    def contest():
        grad, y, residual = (channels_last(shape, dtype, seed) for seed in range(3))
        rows, count = rows_of(y)
        arguments = [grad, y, rows, residual, None, RELU.code, RELU.param]
        flags = count, True, False, True

        def ours(name):
            return lambda given: lambda: APPLY.overload(name)(*given, REDUCE.overload(name)(*given, False)[0], *flags)

        def holds(name):
            check(REDUCE, name, [*arguments, False])
            check(APPLY, name, [*arguments, REDUCE.overload("reference")(*arguments, False)[0], *flags])
            check(BOTH, "reference", [*arguments, False, *flags])

        calls = {"eager": eager} | {name: ours(name) for name in BACKENDS}
        checks = {name: lambda name=name: holds(name) for name in BACKENDS}
        moved = 2 * nbytes(grad, y, residual) + nbytes(y, residual)
        return Contest(group, arguments, calls, checks, moved).with_compiled(compiled)

    race(group, contestant, contest)


def eager(given, compiles=False):
    """Stock PyTorch's backward, without its forward."""
    grad, y, _, residual, *_ = given
    return backward_of(joined, grad, y, residual, compiles=compiles)


def compiled(given):
    return eager(given, compiles=True)


def joined(y, residual):
    return torch.relu(F.batch_norm(y, None, None, training=True) + residual)


@pytest.mark.parametrize("contestant", ["eager", COMPILED, "reference"])
@pytest.mark.parametrize("shape", activations(), indirect=True)
def test_join_backward_mask(race, shape, dtype, contestant):
    """The pass that leaves the norm's formula to what reads its gradient; eager applies that too, for want of one."""
    group = group_of("join_backward_mask", dtype, shape)

    def contest():
        grad, y, residual = (channels_last(shape, dtype, seed) for seed in range(3))
        arguments = [grad, y, rows_of(y)[0], residual, None, RELU.code, RELU.param, False]
        calls = {
            "eager": eager,
            "reference": lambda given: lambda: MASK.overload("reference")(*given),
        }
        checks = {"reference": lambda: check(MASK, "reference", arguments)}
        return Contest(group, arguments, calls, checks, nbytes(grad, y, residual, y)).with_compiled(compiled)

    race(group, contestant, contest)


@pytest.mark.parametrize("contestant", ["eager", *BACKENDS])
@pytest.mark.parametrize("form", ["slice", "gain", "dropout"])
@pytest.mark.parametrize("shape", MODIFIED, indirect=True)
def test_modified_join_backward(race, shape, dtype, form, contestant):
    """Of a slice of the channels, added to a slice of a gradient; with excitation's factors; with dropout's mask."""
    group = group_of("join_backward", dtype, shape, form)

    def contest():
        make = sliced if form == "slice" else channels_last
        grad, y = channels_last(shape, dtype), make(shape, dtype, 1)
        total = make(shape, dtype, 2) if form == "slice" else None
        gain = torch.rand(shape[:2]) if form == "gain" else None
        dropout = DROPOUT if form == "dropout" else 0.0
        rows, count = rows_of(y)
        arguments = [grad, y, rows, None, None, RELU.code, RELU.param]
        modifiers = [gain, dropout, torch.tensor([1]) if dropout else None]
        flags = count, True, False, False

        def sums(name, given, modifiers):
            found = REDUCE.overload(name)(*given, False, *modifiers)[0]
            gain = modifiers[0]  # an excitation's own gradient is left out on either side
            return found if gain is None else torch.cat(((gain * found[:2]).sum(1), found[2:].sum(1)))

        def ours(name):
            def make(operands):
                given, modifiers, total = operands
                return lambda: APPLY.overload(name)(
                    *given, sums(name, given, modifiers), *flags, *modifiers, None, total, total
                )

            return make

        def holds(name):
            check(REDUCE, name, [*arguments, False, *modifiers])
            of_reference = sums("reference", arguments, modifiers)
            check(APPLY, name, [*arguments, of_reference, *flags, *modifiers, None, total, total])

        def theirs(operands):
            given, (gain, dropout, _), total = operands
            return eager_modified(given[0], given[1], total, gain, dropout)

        calls = {"eager": theirs} | {name: ours(name) for name in BACKENDS}
        checks = {name: lambda name=name: holds(name) for name in BACKENDS}
        operands = (arguments, modifiers, total)
        return Contest(group, operands, calls, checks, nbytes(grad, y, grad, y, y))

    race(group, contestant, contest)


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
