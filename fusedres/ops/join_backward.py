"""The join's backward, in two passes: the per-channel sums, then the gradients.

With :math:`z` the activation's argument, recomputed from what the forward read, :math:`g = act'(z) \\cdot grad`, and
``n`` values per channel, a batch norm in training has (Ioffe and Szegedy 2015, section 3; mean, rstd and scale as in
:mod:`fusedres.ops.bn_norm`)

.. math::
    \\hat y = (y - mean)\\, rstd \\qquad dgamma = \\sum g \\hat y \\qquad dbeta = \\sum g

    dy = scale \\Big( g - \\frac{dbeta}{n} - \\hat y \\, \\frac{dgamma}{n} \\Big)

and :math:`dy = scale \\cdot g` where its statistics are constants. The residual's gradient is ``g`` itself, or the same
formula with the residual's norm; it is written in the pass that has ``g`` in registers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .join import BY_CODE, join_argument
from .registry import declare

__all__ = ["JOIN_BACKWARD_APPLY", "JOIN_BACKWARD_REDUCE"]

_OPERANDS = "Tensor grad, Tensor y, Tensor? norm, Tensor? residual, Tensor? res_norm, int act, float act_param"


def _masked_gradient(
    grad: Tensor,
    y: Tensor,
    norm: Tensor | None,
    residual: Tensor | None,
    res_norm: Tensor | None,
    act: int,
    act_param: float,
) -> tuple[Tensor, Tensor]:
    z = join_argument(y, norm, residual, res_norm)
    slope = BY_CODE[act].derivative(z, act_param)
    # Where the activation is flat nothing passes, not even a NaN: as stock PyTorch masks.
    return z, torch.where(slope == 0, 0.0, grad.to(z.dtype) * slope)


def _normalised(x: Tensor, norm: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(x - mean) rstd, or x without a norm."""
    return x.to(dtype) if norm is None else (x.to(dtype) - norm[0, :, None, None]) * norm[1, :, None, None]


# ---------------------------------------------------------------------------------------------------------------------
# First pass
# ---------------------------------------------------------------------------------------------------------------------


def _reduce_reference(
    grad: Tensor,
    y: Tensor,
    norm: Tensor | None,
    residual: Tensor | None,
    res_norm: Tensor | None,
    act: int,
    act_param: float,
    emit: bool,
) -> tuple[Tensor, Tensor]:
    z, g = _masked_gradient(grad, y, norm, residual, res_norm, act, act_param)
    sums = g.new_zeros((3, y.shape[1]))
    sums[0] = g.sum((0, 2, 3))
    sums[1] = (g * _normalised(y, norm, g.dtype)).sum((0, 2, 3))
    if residual is not None and res_norm is not None:
        sums[2] = (g * _normalised(residual, res_norm, g.dtype)).sum((0, 2, 3))
    if not emit:
        return sums, y.new_empty(0)
    return sums, torch.empty_like(y).copy_(BY_CODE[act].forward(z, act_param))


def _reduce_fake(
    grad: Tensor,
    y: Tensor,
    norm: Tensor | None,
    residual: Tensor | None,
    res_norm: Tensor | None,
    act: int,
    act_param: float,
    emit: bool,
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    return y.new_empty((3, y.shape[1]), dtype=dtype), torch.empty_like(y) if emit else y.new_empty(0)


JOIN_BACKWARD_REDUCE = declare(
    "join_backward_reduce",
    f"({_OPERANDS}, bool emit) -> (Tensor, Tensor)",
    reference=_reduce_reference,
    fake=_reduce_fake,
    kernels=("cpu",),
)
"""Rows ``dbeta``, ``dgamma`` and the residual norm's ``dgamma`` (zero without one), shape ``[3, C]``, and with ``emit``
the forward's ``act(z)``, recomputed in the same pass for the weight gradient that needs it next."""


# ---------------------------------------------------------------------------------------------------------------------
# Second pass
# ---------------------------------------------------------------------------------------------------------------------


def _input_gradient(
    g: Tensor, x: Tensor, norm: Tensor | None, sums: Tensor | None, row: int, count: float, training: bool
) -> Tensor:
    if norm is None:
        return g
    scale = norm[2, :, None, None]
    if not training:
        return scale * g
    assert sums is not None
    offset, slope = sums[0] / count, sums[row] / count
    return scale * (g - offset[:, None, None] - _normalised(x, norm, g.dtype) * slope[:, None, None])


def _apply_reference(
    grad: Tensor,
    y: Tensor,
    norm: Tensor | None,
    residual: Tensor | None,
    res_norm: Tensor | None,
    act: int,
    act_param: float,
    sums: Tensor | None,
    count: float,
    training: bool,
    res_training: bool,
    need_residual: bool,
) -> tuple[Tensor, Tensor]:
    _, g = _masked_gradient(grad, y, norm, residual, res_norm, act, act_param)
    grad_y = torch.empty_like(y).copy_(_input_gradient(g, y, norm, sums, 1, count, training))
    if residual is None or not need_residual:
        return grad_y, y.new_empty(0)
    grad_residual = _input_gradient(g, residual, res_norm, sums, 2, count, res_training)
    return grad_y, torch.empty_like(y).copy_(grad_residual)


def _apply_fake(
    grad: Tensor,
    y: Tensor,
    norm: Tensor | None,
    residual: Tensor | None,
    res_norm: Tensor | None,
    act: int,
    act_param: float,
    sums: Tensor | None,
    count: float,
    training: bool,
    res_training: bool,
    need_residual: bool,
) -> tuple[Tensor, Tensor]:
    writes_residual = residual is not None and need_residual
    return torch.empty_like(y), torch.empty_like(y) if writes_residual else y.new_empty(0)


JOIN_BACKWARD_APPLY = declare(
    "join_backward_apply",
    f"({_OPERANDS}, Tensor? sums, float count, bool training, bool res_training, bool need_residual) "
    "-> (Tensor, Tensor)",
    reference=_apply_reference,
    fake=_apply_fake,
    kernels=("cpu",),
)
"""``(dy, dresidual)``; ``dresidual`` is empty where it is not needed."""
