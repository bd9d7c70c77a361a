"""The gated join and its backward: gate, branch and skip in one pass; eager takes five forward, more backward."""

from __future__ import annotations

import pytest
import torch

from bench.ops.contestants import BACKENDS, COMPILED, Contest, backward_of, check, group_of, nbytes
from bench.shapes import activations
from fusedres.ops.registry import OPS
from fusedres.testing import channels_last

FORWARD, BACKWARD = OPS["gated_join"], OPS["gated_join_backward"]
THRESHOLDS = {"smooth": None, "sparse": 0.5}
SHAPES = activations("ResNet-50", "CIFAR ResNet-20")


@pytest.mark.parametrize("contestant", ["eager", COMPILED, *BACKENDS])
@pytest.mark.parametrize("kind", THRESHOLDS)
@pytest.mark.parametrize("shape", SHAPES, indirect=True)
def test_gated_join(race, shape, dtype, kind, contestant):
    group, threshold = group_of("gated_join", dtype, shape, kind), THRESHOLDS[kind]

    def contest():
        f, logits, x = operands(shape, dtype)
        calls = {"eager": lambda given: lambda: stock(*given, threshold)}
        calls |= {name: lambda given, name=name: lambda: FORWARD.overload(name)(*given, threshold) for name in BACKENDS}
        checks = {name: lambda name=name: check(FORWARD, name, [f, logits, x, threshold]) for name in BACKENDS}
        return Contest(group, (f, logits, x), calls, checks, nbytes(f, logits, x, f)).with_compiled()

    race(group, contestant, contest)


@pytest.mark.parametrize("contestant", ["eager", COMPILED, *BACKENDS])
@pytest.mark.parametrize("shape", SHAPES, indirect=True)
def test_gated_join_backward(race, shape, dtype, contestant):
    group = group_of("gated_join_backward", dtype, shape)

    def eager(arguments, compiles=False):
        grad, logits, f, x = arguments[:4]
        return backward_of(smooth, grad, f, logits, x, compiles=compiles)

    def contest():
        f, logits, x = operands(shape, dtype)
        grad = channels_last(shape, dtype, 3)
        arguments = [grad, logits, f, x, None, True, True]
        calls = {"eager": eager}
        calls |= {name: lambda given, name=name: lambda: BACKWARD.overload(name)(*given) for name in BACKENDS}
        checks = {name: lambda name=name: check(BACKWARD, name, arguments) for name in BACKENDS}
        moved = nbytes(grad, f, logits, x) + nbytes(f, logits, x)
        found = Contest(group, arguments, calls, checks, moved)
        return found.with_compiled(lambda given: eager(given, compiles=True))

    race(group, contestant, contest)


def operands(shape, dtype):
    """``f``, ``logits`` and ``x``; no logit so near zero that rounding decides which side of 0.5 its gate is."""
    f, logits, x = (channels_last(shape, dtype, seed) for seed in range(3))
    logits[logits.abs() < 0.05] += 0.5
    return f, logits, x


def smooth(f, logits, x):
    return stock(f, logits, x, None)


def stock(f, logits, x, threshold):
    """Stock PyTorch."""
    m = torch.sigmoid(logits)
    if threshold is not None:
        m = (m > threshold).to(m.dtype)
    return m * f + (1 - m) * x
