"""The gated join: gate, branch and skip in one pass over the tensors.

.. math:: out = m \\cdot f + (1 - m) \\cdot x \\qquad
    m = \\sigma(logits) \\quad\\text{or}\\quad m = \\mathbb 1[\\sigma(logits) > threshold]

``logits`` is the raw output of the gate's convolution or linear layer, its bias included. With the sigmoid this is the
highway layer of Srivastava, Greff and Schmidhuber (2015, "Training Very Deep Networks", eq. 3), whose carry gate is one
minus its transform gate; with a threshold every element comes from one side alone, which is a sparse skip.

.. math:: df = m \\cdot grad \\qquad dx = (1 - m) \\cdot grad \\qquad dlogits = (f - x)\\, s\\, (1 - s) \\cdot grad,
    \\quad s = \\sigma(logits)

A threshold has no derivative, so a sparse gate's logits have no gradient, unless it is passed *straight through*
(Bengio, Leonard and Courville 2013, "Estimating or Propagating Gradients Through Stochastic Neurons", section 4), which
takes the sigmoid's. All tensors have one shape, any, one dtype and one dense layout. Arithmetic is in float32 (float64
for float64), rounded once. ``m`` multiplies even where it is zero, so NaN and infinity travel as in the formula.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..select import backend_for, kernels
from .bn_stats import statistics_dtype
from .layout import dense, like
from .operands import check_alike, kernels_pay, needs_gradient
from .registry import declare

__all__ = ["GATED_JOIN", "GATED_JOIN_BACKWARD", "gated_join"]


def _gate(logits: Tensor, threshold: float | None) -> tuple[Tensor, Tensor]:
    """The sigmoid and ``m``, in the dtype of the arithmetic."""
    s = torch.sigmoid(logits.to(statistics_dtype(logits.dtype)))
    return s, s if threshold is None else (s > threshold).to(s.dtype)


def _rounded(value: Tensor, like: Tensor) -> Tensor:
    """``value`` in the dtype and the strides of ``like``, in memory of its own."""
    return torch.empty_like(like).copy_(value)


def _reference(f: Tensor, logits: Tensor, x: Tensor, threshold: float | None) -> Tensor:
    _, m = _gate(logits, threshold)
    return _rounded(m * f + (1 - m) * x, f)


def _fake(f: Tensor, logits: Tensor, x: Tensor, threshold: float | None) -> Tensor:
    return torch.empty_like(f)


GATED_JOIN = declare(
    "gated_join",
    "(Tensor f, Tensor logits, Tensor x, float? threshold) -> Tensor",
    reference=_reference,
    fake=_fake,
    kernels=("cpu", "cuda", "triton"),
)


def _backward_reference(
    grad: Tensor,
    logits: Tensor,
    f: Tensor | None,
    x: Tensor | None,
    threshold: float | None,
    need_f: bool,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    s, m = _gate(logits, threshold)
    nothing = grad.new_empty(0)
    grad_f = _rounded(m * grad, grad) if need_f else nothing
    grad_x = _rounded((1 - m) * grad, grad) if need_x else nothing.clone()
    if f is None or x is None:
        return grad_f, nothing.clone(), grad_x
    difference = f.to(s.dtype) - x.to(s.dtype)
    return grad_f, _rounded(grad * difference * (s * (1 - s)), grad), grad_x


def _backward_fake(
    grad: Tensor,
    logits: Tensor,
    f: Tensor | None,
    x: Tensor | None,
    threshold: float | None,
    need_f: bool,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    needed = need_f, f is not None and x is not None, need_x
    return tuple(torch.empty_like(grad) if need else grad.new_empty(0) for need in needed)


GATED_JOIN_BACKWARD = declare(
    "gated_join_backward",
    "(Tensor grad, Tensor logits, Tensor? f, Tensor? x, float? threshold, bool need_f, bool need_x) "
    "-> (Tensor, Tensor, Tensor)",
    reference=_backward_reference,
    fake=_backward_fake,
    kernels=("cpu", "cuda", "triton"),
)
"""``(df, dlogits, dx)``, each empty where it is not needed; ``dlogits`` is, where ``f`` and ``x`` are given."""


def _run(f: Tensor, logits: Tensor, x: Tensor, threshold: float | None) -> Tensor:
    """The join by a kernel, on operands as they come."""
    dtype = torch.promote_types(torch.promote_types(f.dtype, logits.dtype), x.dtype)
    f = dense(f.to(dtype))
    return kernels(f.device.type, dtype).gated_join(f, like(logits, f), like(x, f), threshold)


class _GatedJoin(torch.autograd.Function):
    """``(f, logits, x, threshold, straight_through) -> out``; keeps the logits, and both sides only for their sake."""

    @staticmethod
    def forward(
        ctx: Any, f: Tensor, logits: Tensor, x: Tensor, threshold: float | None, straight_through: bool
    ) -> Tensor:
        needs_logits = ctx.needs_input_grad[1] and (threshold is None or straight_through)
        ctx.save_for_backward(logits, f if needs_logits else None, x if needs_logits else None)
        ctx.threshold = threshold
        ctx.dtypes = f.dtype, logits.dtype, x.dtype
        return _run(f, logits, x, threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, f, x = ctx.saved_tensors
        needs_f, _, needs_x = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # create_graph=True: the same formulas, in ops that can be differentiated again
            found = _differentiable_backward(grad, logits, f, x, ctx.threshold)
        else:
            logits = dense(logits.to(grad.dtype))  # its layout is a real one; the gradient's may be that of an expand
            sides = [None if side is None else like(side, logits) for side in (f, x)]
            backward = kernels(grad.device.type, grad.dtype).gated_join_backward
            found = backward(like(grad, logits), logits, *sides, ctx.threshold, needs_f, needs_x)
        needed = needs_f, f is not None, needs_x
        grads = [g.to(dtype) if need else None for need, g, dtype in zip(needed, found, ctx.dtypes)]
        return (*grads, None, None)


def _differentiable_backward(
    grad: Tensor, logits: Tensor, f: Tensor | None, x: Tensor | None, threshold: float | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    s, m = _gate(logits, threshold)
    slope = None if f is None else grad * (f - x) * (s * (1 - s))
    return m * grad, slope, (1 - m) * grad


def _stock(f: Tensor, logits: Tensor, x: Tensor, threshold: float | None, straight_through: bool) -> Tensor:
    """The join from PyTorch's own ops, differentiated by autograd."""
    m = torch.sigmoid(logits)
    if threshold is not None:
        mask = (m > threshold).to(m.dtype)
        m = mask + (m - m.detach()) if straight_through else mask
    return m * f + (1 - m) * x


def gated_join(
    f: Tensor,
    logits: Tensor,
    x: Tensor,
    *,
    threshold: float | None = None,
    straight_through: bool = False,
) -> Tensor:
    """A gated residual connection: ``m * f + (1 - m) * x`` with ``m = sigmoid(logits)``, in one pass, as its backward.

    Srivastava, Greff and Schmidhuber (2015, "Training Very Deep Networks", eq. 3). With ``threshold``,
    ``m = (sigmoid(logits) > threshold)``, zero or one, of the gate's dtype. Autograd keeps ``logits``, and ``f`` and
    ``x`` where the logits have a gradient; stock PyTorch keeps four tensors of this size.

    Args:
        f: the branch, of any shape.
        logits: of ``f``'s shape: what the gate computes, before its sigmoid.
        x: of ``f``'s shape: what is skipped to.
        threshold: makes the gate binary. Its logits then have no gradient.
        straight_through: gives the logits of a binary gate the gradient that those of a smooth one would have.

    Returns:
        a tensor like ``f``. All three are float32, bfloat16, float16 or float64, of one dtype; under autocast they may
        differ, and the result has the dtype that stock PyTorch's sum would have.

    Raises:
        TypeError: for something that is no tensor, another dtype, or a threshold that is no number.
        ValueError: for shapes or devices that differ, and for ``straight_through`` without a threshold.
    """
    check_alike("gated_join", f=f, logits=logits, x=x)
    if threshold is not None and (isinstance(threshold, bool) or not isinstance(threshold, (int, float))):
        raise TypeError(f"gated_join: threshold must be a number or None, got {type(threshold).__name__}")
    if straight_through and threshold is None:
        raise ValueError("gated_join: straight_through=True needs a threshold, got threshold=None")
    threshold = None if threshold is None else float(threshold)
    # The reference takes more passes than stock: it runs where it was chosen, not where a backend lacks this op.
    offering = ("reference", *GATED_JOIN.kernels)
    if not kernels_pay(f, logits, x) or backend_for(f.device, f.dtype) not in offering:
        return _stock(f, logits, x, threshold, straight_through)
    if not needs_gradient(f, logits, x):
        return _run(f, logits, x, threshold)
    return _GatedJoin.apply(f, logits, x, threshold, straight_through)
