"""The updates of a Runge-Kutta step, each in one pass over the state.

.. math:: out = y + \\sum_i w_i k_i

With :math:`w_i = h\\, a_{ji}` this is the point at which stage ``j`` is evaluated, with :math:`w_i = h\\, b_i` the
step's result, and with the weights of a continuous extension the state at any time within the step (Hairer, Norsett and
Wanner 1993, "Solving Ordinary Differential Equations I", eq. II.1.8 and section II.6). Backward is one pass too:
:math:`dy = grad`, :math:`dk_i = w_i \\cdot grad`; nothing is kept for it.

.. math:: error = \\sqrt{\\frac1n \\sum_j \\Big( \\frac{\\sum_i e_i k_{i,j}}
    {atol + rtol \\max(|y_{0,j}|, |y_{1,j}|)} \\Big)^2}

is the norm of an embedded method's error estimate (ibid., eq. II.4.10 and II.4.11); 0 for an empty state. It is an op
of its own because in methods whose last stage is the first of the next step (Dormand and Prince's) that stage is
evaluated at the result: the result is written before the error is known.

The tensors have one shape, any, one dtype and one dense layout. Arithmetic is in float32 (float64 for float64), rounded
once; the error is a number in that dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..select import kernels
from .bn_stats import statistics_dtype
from .layout import dense, like
from .operands import check_alike, kernels_pay, kernels_run, needs_gradient
from .registry import declare

__all__ = ["RK_COMBINE", "RK_COMBINE_BACKWARD", "RK_ERROR", "combine", "error_norm", "rk_combine"]


def _weighted(start: Tensor, stages: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    for stage, weight in zip(stages, weights, strict=True):
        start = torch.add(start, stage.to(start.dtype), alpha=weight)
    return start


def _reference(y: Tensor, stages: list[Tensor], weights: list[float]) -> Tensor:
    return torch.empty_like(y).copy_(_weighted(y.to(statistics_dtype(y.dtype)), stages, weights))


def _fake(y: Tensor, stages: list[Tensor], weights: list[float]) -> Tensor:
    return torch.empty_like(y)


RK_COMBINE = declare(
    "rk_combine",
    "(Tensor y, Tensor[] stages, float[] weights) -> Tensor",
    reference=_reference,
    fake=_fake,
    kernels=("cpu", "triton"),
)


def _backward_reference(grad: Tensor, weights: list[float]) -> list[Tensor]:
    wide = grad.to(statistics_dtype(grad.dtype))
    return [torch.empty_like(grad).copy_(wide * weight) for weight in weights]


def _backward_fake(grad: Tensor, weights: list[float]) -> list[Tensor]:
    return [torch.empty_like(grad) for _ in weights]


RK_COMBINE_BACKWARD = declare(
    "rk_combine_backward",
    "(Tensor grad, float[] weights) -> Tensor[]",
    reference=_backward_reference,
    fake=_backward_fake,
    kernels=("cpu", "triton"),
)
"""The gradients of the stages."""


def _error_reference(
    y0: Tensor, y1: Tensor, stages: list[Tensor], weights: list[float], rtol: float, atol: float
) -> Tensor:
    dtype = statistics_dtype(y0.dtype)
    if not y0.numel():
        return y0.new_zeros((), dtype=dtype)
    error = _weighted(torch.zeros_like(y0, dtype=dtype), stages, weights)
    tolerance = atol + rtol * torch.maximum(y0.abs(), y1.abs()).to(dtype)
    return (error / tolerance).square().mean().sqrt()


def _error_fake(y0: Tensor, y1: Tensor, stages: list[Tensor], weights: list[float], rtol: float, atol: float) -> Tensor:
    return y0.new_empty((), dtype=statistics_dtype(y0.dtype))


RK_ERROR = declare(
    "rk_error",
    "(Tensor y0, Tensor y1, Tensor[] stages, float[] weights, float rtol, float atol) -> Tensor",
    reference=_error_reference,
    fake=_error_fake,
    kernels=("cpu", "triton"),
)
"""The norm of the error estimate, a tensor without dimensions."""


def _run(y: Tensor, stages: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The update by a kernel, on operands as they come."""
    y = dense(y)
    return kernels(y.device.type, y.dtype).rk_combine(y, [like(stage, y) for stage in stages], weights)


class _RkCombine(torch.autograd.Function):
    """``(y, weights, *stages) -> out``; keeps nothing."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: tuple[float, ...], *stages: Tensor) -> Tensor:
        ctx.weights = weights
        ctx.dtypes = [stage.dtype for stage in stages]
        return _run(y, stages, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = [i for i, need in enumerate(ctx.needs_input_grad[2:]) if need]
        weights = [ctx.weights[i] for i in needed]
        if torch.is_grad_enabled():  # create_graph=True: in ops that can be differentiated again
            found = [grad * weight for weight in weights]
        else:
            found = kernels(grad.device.type, grad.dtype).rk_combine_backward(dense(grad), weights)
        grads: list[Tensor | None] = [None] * len(ctx.weights)
        for i, g in zip(needed, found):
            grads[i] = g.to(ctx.dtypes[i])
        return (grad, None, *grads)


def combine(y: Tensor, stages: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """:func:`rk_combine` without its checks."""
    if not kernels_pay(y, *stages):
        return _weighted(y.to(statistics_dtype(y.dtype)), stages, weights).to(y.dtype)
    if not needs_gradient(y, *stages):
        return _run(y, stages, weights)
    return _RkCombine.apply(y, tuple(weights), *stages)


def error_norm(
    y0: Tensor, y1: Tensor, stages: Sequence[Tensor], weights: Sequence[float], rtol: float, atol: float
) -> Tensor:
    """The norm of an error estimate, on operands as they come; has no gradient."""
    with torch.no_grad():
        y0 = dense(y0)
        operands = like(y1, y0), [like(stage, y0) for stage in stages], tuple(weights), rtol, atol
        if kernels_run(y0, y1, *stages):
            return kernels(y0.device.type, y0.dtype).rk_error(y0.detach(), *operands)
        return _error_reference(y0, *operands)


def rk_combine(y: Tensor, stages: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """A Runge-Kutta update: ``y + sum(w * k for w, k in zip(weights, stages))``, in one pass, as its backward.

    Stock PyTorch takes a pass per stage, which reads and writes the sum so far.

    Args:
        y: the state, of any shape, float32, bfloat16, float16 or float64.
        stages: derivatives, each of ``y``'s shape and dtype (under autocast, of any).
        weights: one number per stage, the step size included.

    Returns:
        a tensor like ``y``, differentiable in ``y`` and in every stage.

    Raises:
        TypeError: for something that is no tensor, another dtype, or a weight that is no number.
        ValueError: for shapes or devices that differ, and for another number of weights than of stages.
    """
    check_alike("rk_combine", y=y, **{f"stages[{i}]": stage for i, stage in enumerate(stages)})
    if len(weights) != len(stages):
        raise ValueError(f"rk_combine: weights must be one number per stage, got {len(weights)} for {len(stages)}")
    for i, weight in enumerate(weights):
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise TypeError(f"rk_combine: weights[{i}] must be a number, got {type(weight).__name__}")
    return combine(y, stages, [float(weight) for weight in weights])
