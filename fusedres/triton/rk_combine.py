"""The updates of a Runge-Kutta step in Triton: flat memory, since every element is treated alike.

Must move, at least: the update, the state and each stage once, and the result; its backward, the gradient once and each
stage's gradient; the error, both states and each stage once. Two FLOPs per element and stage.

Eight stages go into a launch, more than any method here has; of further ones the sum so far is kept in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gated_join import check_alike
from .launch import cdiv, launch, register

__all__ = ["rk_combine", "rk_combine_backward", "rk_error"]

_ELEMENTS = 2048  # two loads of 16 bytes per thread and operand
_STAGES = 8
_FAN_IN = 4096  # partials that the last program adds at a time


@triton.jit
def plus(total, stage, weight, at, inside):
    """``total + weight * stage``, or ``total`` where there is no such stage."""
    if stage is not None:
        total += weight * tl.load(stage + at, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def weighted(start, k0, k1, k2, k3, k4, k5, k6, k7, w0, w1, w2, w3, w4, w5, w6, w7, at, inside, BLOCK: tl.constexpr):
    """``start + sum(w * k)`` in float32; without a start, the sum."""
    total = tl.zeros((BLOCK,), tl.float32)
    if start is not None:
        total = tl.load(start + at, mask=inside, other=0.0).to(tl.float32)
    total = plus(total, k0, w0, at, inside)
    total = plus(total, k1, w1, at, inside)
    total = plus(total, k2, w2, at, inside)
    total = plus(total, k3, w3, at, inside)
    total = plus(total, k4, w4, at, inside)
    total = plus(total, k5, w5, at, inside)
    total = plus(total, k6, w6, at, inside)
    return plus(total, k7, w7, at, inside)


@triton.jit
def rk_combine_kernel(
    start, k0, k1, k2, k3, k4, k5, k6, k7, w0, w1, w2, w3, w4, w5, w6, w7, out, length, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    total = weighted(start, k0, k1, k2, k3, k4, k5, k6, k7, w0, w1, w2, w3, w4, w5, w6, w7, at, inside, BLOCK)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def scaled(grad, out, weight, at, inside):
    if out is not None:
        tl.store(out + at, (weight * grad).to(out.dtype.element_ty), mask=inside)


@triton.jit
def rk_combine_bwd_kernel(
    grad, k0, k1, k2, k3, k4, k5, k6, k7, w0, w1, w2, w3, w4, w5, w6, w7, length, BLOCK: tl.constexpr
):
    """Writes the gradients of the stages, ``k0`` and so on."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    scaled(g, k0, w0, at, inside)
    scaled(g, k1, w1, at, inside)
    scaled(g, k2, w2, at, inside)
    scaled(g, k3, w3, at, inside)
    scaled(g, k4, w4, at, inside)
    scaled(g, k5, w5, at, inside)
    scaled(g, k6, w6, at, inside)
    scaled(g, k7, w7, at, inside)


@triton.jit
def rk_error_kernel(
    start, k0, k1, k2, k3, k4, k5, k6, k7, w0, w1, w2, w3, w4, w5, w6, w7, y0, y1, partials, rtol, atol, length,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A partial per program: the sum of squares of error over tolerance."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    total = weighted(start, k0, k1, k2, k3, k4, k5, k6, k7, w0, w1, w2, w3, w4, w5, w6, w7, at, inside, BLOCK)
    before = tl.abs(tl.load(y0 + at, mask=inside, other=0.0).to(tl.float32))
    after = tl.abs(tl.load(y1 + at, mask=inside, other=0.0).to(tl.float32))
    ratio = total / (atol + rtol * tl.maximum(before, after, propagate_nan=tl.PropagateNan.ALL))
    # Outside, the tolerance may be zero and the ratio NaN.
    tl.store(partials + tl.program_id(0), tl.sum(tl.where(inside, ratio * ratio, 0.0), 0))


@triton.jit(do_not_specialize=["count"])
def rk_norm_kernel(partials, out, count, length, BLOCK: tl.constexpr):
    """One program: the root of the mean, the partials added in order and in float64."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(partials + at, mask=at < count, other=0.0).to(tl.float64)
    tl.store(out, tl.sqrt(tl.sum(total, 0) / length).to(tl.float32))


def _check(op: str, y: Tensor, stages: Sequence[Tensor], weights: Sequence[float], **others: Tensor) -> None:
    if len(stages) != len(weights):
        raise ValueError(f"{op}: {len(stages)} stages and {len(weights)} weights")
    check_alike(op, y, {f"stages[{i}]": stage for i, stage in enumerate(stages)} | others)


def _slots(stages: Sequence[Tensor], weights: Sequence[float]) -> dict[str, Tensor | float | None]:
    """The kernels' eight pairs of arguments."""
    absent: list[None] = [None] * (_STAGES - len(stages))
    named = {f"k{i}": stage for i, stage in enumerate([*stages, *absent])}
    return named | {f"w{i}": weight for i, weight in enumerate([*map(float, weights), *absent])}


def _summed(
    start: Tensor | None, y: Tensor, stages: Sequence[Tensor], weights: Sequence[float]
) -> tuple[Tensor | None, Sequence[Tensor], Sequence[float]]:
    """All stages but the last eight or fewer added to ``start``, in float32; and those that are left."""
    while len(stages) > _STAGES:
        out = y.new_empty_strided(y.shape, y.stride(), dtype=torch.float32)
        _combine(start, stages[:_STAGES], weights[:_STAGES], out)
        start, stages, weights = out, stages[_STAGES:], weights[_STAGES:]
    return start, stages, weights


def _combine(start: Tensor | None, stages: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
    args = {"start": start, **_slots(stages, weights), "out": out, "length": out.numel()}
    launch(rk_combine_kernel, (cdiv(out.numel(), _ELEMENTS),), args, {"BLOCK": _ELEMENTS}, stages=1)


def rk_combine(y: Tensor, stages: list[Tensor], weights: list[float]) -> Tensor:
    """See :mod:`fusedres.ops.rk_combine`."""
    _check("rk_combine", y, stages, weights)
    out = y.new_empty_strided(y.shape, y.stride())
    if y.numel():
        start, stages, weights = _summed(y, y, stages, weights)
        _combine(start, stages, weights, out)
    return out


def rk_combine_backward(grad: Tensor, weights: list[float]) -> list[Tensor]:
    """See :mod:`fusedres.ops.rk_combine`."""
    outs = [grad.new_empty_strided(grad.shape, grad.stride()) for _ in weights]
    if grad.numel():
        for i in range(0, len(outs), _STAGES):
            args = {"grad": grad, **_slots(outs[i : i + _STAGES], weights[i : i + _STAGES]), "length": grad.numel()}
            launch(rk_combine_bwd_kernel, (cdiv(grad.numel(), _ELEMENTS),), args, {"BLOCK": _ELEMENTS}, stages=1)
    return outs


def rk_error(y0: Tensor, y1: Tensor, stages: list[Tensor], weights: list[float], rtol: float, atol: float) -> Tensor:
    """See :mod:`fusedres.ops.rk_combine`."""
    _check("rk_error", y0, stages, weights, y1=y1)
    out = y0.new_zeros((), dtype=torch.float32)
    if y0.numel():
        start, stages, weights = _summed(None, y0, stages, weights)
        blocks = cdiv(y0.numel(), _ELEMENTS)
        partials = y0.new_empty(blocks, dtype=torch.float32)
        args = {"start": start, **_slots(stages, weights), "y0": y0, "y1": y1, "partials": partials}
        args |= {"rtol": float(rtol), "atol": float(atol), "length": y0.numel()}
        launch(rk_error_kernel, (blocks,), args, {"BLOCK": _ELEMENTS}, stages=1)
        args = {"partials": partials, "out": out, "count": blocks, "length": float(y0.numel())}
        launch(rk_norm_kernel, (1,), args, {"BLOCK": min(_FAN_IN, triton.next_power_of_2(blocks))}, warps=8, stages=1)
    return out


register("rk_combine", rk_combine)
register("rk_combine_backward", rk_combine_backward)
register("rk_error", rk_error)
