"""The gated join and its backward: gate, branch and skip in one pass; eager takes five forward, more backward."""

from __future__ import annotations

import pytest
import torch

from bench.ops.contestants import BACKENDS, check, nbytes, require
from fusedres.benchmarking.shapes import ACTIVATIONS, name_of
from fusedres.ops.registry import OPS
from fusedres.testing import channels_last

FORWARD, BACKWARD = OPS["gated_join"], OPS["gated_join_backward"]
THRESHOLDS = {"smooth": None, "sparse": 0.5}


@pytest.mark.parametrize("contestant", ["eager", *BACKENDS])
@pytest.mark.parametrize("kind", THRESHOLDS)
@pytest.mark.parametrize("shape", ACTIVATIONS, ids=name_of, indirect=True)
def test_gated_join(race, shape, dtype, kind, contestant):
    f, logits, x = operands(shape, dtype)
    threshold = THRESHOLDS[kind]
    if contestant == "eager":

        def call():
            return stock(f, logits, x, threshold)
    else:
        require(contestant, dtype)
        check(FORWARD, contestant, [f, logits, x, threshold])

        def call():
            return FORWARD.overload(contestant)(f, logits, x, threshold)

    race(f"gated join, {kind}, {name_of(shape)} {dtype}", call, dtype=dtype, touched=nbytes(f, logits, x, f))


@pytest.mark.parametrize("contestant", ["eager", *BACKENDS])
@pytest.mark.parametrize("shape", ACTIVATIONS, ids=name_of, indirect=True)
def test_gated_join_backward(race, shape, dtype, contestant):
    f, logits, x = operands(shape, dtype)
    grad = channels_last(shape, dtype, 3)
    if contestant == "eager":
        leaves = [t.detach().requires_grad_() for t in (f, logits, x)]
        out = stock(*leaves, None)

        def call():
            return torch.autograd.grad(out, leaves, grad, retain_graph=True)
    else:
        require(contestant, dtype)
        arguments = [grad, logits, f, x, None, True, True]
        check(BACKWARD, contestant, arguments)

        def call():
            return BACKWARD.overload(contestant)(*arguments)

    touched = nbytes(grad, f, logits, x) + nbytes(f, logits, x)
    race(f"gated join backward {name_of(shape)} {dtype}", call, dtype=dtype, touched=touched)


def operands(shape, dtype):
    """``f``, ``logits`` and ``x``; no logit so near zero that rounding decides which side of 0.5 its gate is."""
    f, logits, x = (channels_last(shape, dtype, seed) for seed in range(3))
    logits[logits.abs() < 0.05] += 0.5
    return f, logits, x


def stock(f, logits, x, threshold):
    """Stock PyTorch."""
    m = torch.sigmoid(logits)
    if threshold is not None:
        m = (m > threshold).to(m.dtype)
    return m * f + (1 - m) * x
