"""The join's backward, in two passes: the per-channel sums, then the gradients.

With :math:`z` the activation's argument, recomputed from what the forward read, :math:`g = act'(z) \\cdot grad`, and
``n`` values per channel, a batch norm in training has (Ioffe and Szegedy 2015, section 3; mean, rstd and scale as in
:mod:`fusedres.ops.bn_norm`)

.. math::
    \\hat y = (y - mean)\\, rstd \\qquad dgamma = \\sum g \\hat y \\qquad dbeta = \\sum g

    dy = scale \\Big( g - \\frac{dbeta}{n} - \\hat y \\, \\frac{dgamma}{n} \\Big)

and :math:`dy = scale \\cdot g` where its statistics are constants. The residual's gradient is ``g`` itself, or the same
formula with the residual's norm; it is written in the pass that has ``g`` in registers.

A dropout masks and scales ``grad``. A gain stands between the norm and the sum: there
:math:`u = gain \\cdot g + offset` takes the place of ``g`` in the formulas of ``y``, with the gradient that reaches
every value of a channel of a sample through the squeeze as ``offset``. The first pass then yields its sums per sample,
from which the gain's own gradient follows.

Where what reads ``dy`` applies the formula itself as it loads (:mod:`fusedres.ops.conv_fused_backward`), there is no
second pass: the first (:data:`JOIN_BACKWARD_MASK`) also writes ``g``, which is the residual's gradient too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dropout import dropped
from .join import BY_CODE, join_argument
from .registry import declare

__all__ = ["JOIN_BACKWARD_APPLY", "JOIN_BACKWARD_MASK", "JOIN_BACKWARD_REDUCE"]

_OPERANDS = "Tensor grad, Tensor y, Tensor? norm, Tensor? residual, Tensor? res_norm, int act, float act_param"
_MODIFIERS = "Tensor? gain=None, float dropout=0.0, Tensor? seed=None"


def _masked_gradient(
    grad: Tensor,
    y: Tensor,
    norm: Tensor | None,
    residual: Tensor | None,
    res_norm: Tensor | None,
    act: int,
    act_param: float,
    gain: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    z = join_argument(y, norm, residual, res_norm, gain)
    slope = BY_CODE[act].derivative(z, act_param)
    # Where the activation is flat nothing passes, not even a NaN; a dropout multiplies by zero: both as stock PyTorch.
    return z, torch.where(slope == 0, 0.0, dropped(grad.to(z.dtype), dropout, seed) * slope)


def _normalised(x: Tensor, norm: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(x - mean) rstd, or x without a norm."""
    return x.to(dtype) if norm is None else (x.to(dtype) - norm[0, :, None, None]) * norm[1, :, None, None]


# ---------------------------------------------------------------------------------------------------------------------
# First pass
# ---------------------------------------------------------------------------------------------------------------------


def _sums_shape(y: Tensor, gain: Tensor | None) -> tuple[int, ...]:
    return (3, y.shape[1]) if gain is None else (3, y.shape[0], y.shape[1])


def _reduce_reference(
    grad: Tensor,
    y: Tensor,
    norm: Tensor | None,
    residual: Tensor | None,
    res_norm: Tensor | None,
    act: int,
    act_param: float,
    emit: bool,
    gain: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    z, g = _masked_gradient(grad, y, norm, residual, res_norm, act, act_param, gain, dropout, seed)
    over = (0, 2, 3) if gain is None else (2, 3)
    sums = g.new_zeros(_sums_shape(y, gain))
    sums[0] = g.sum(over)
    sums[1] = (g * _normalised(y, norm, g.dtype)).sum(over)
    if residual is not None and res_norm is not None:
        sums[2] = (g * _normalised(residual, res_norm, g.dtype)).sum(over)
    if not emit:
        return sums, y.new_empty(0)
    value = dropped(BY_CODE[act].forward(z, act_param), dropout, seed)
    return sums, torch.empty_like(y).copy_(value)


def _reduce_fake(
    grad: Tensor,
    y: Tensor,
    norm: Tensor | None,
    residual: Tensor | None,
    res_norm: Tensor | None,
    act: int,
    act_param: float,
    emit: bool,
    gain: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    return y.new_empty(_sums_shape(y, gain), dtype=dtype), torch.empty_like(y) if emit else y.new_empty(0)


JOIN_BACKWARD_REDUCE = declare(
    "join_backward_reduce",
    f"({_OPERANDS}, bool emit, {_MODIFIERS}) -> (Tensor, Tensor)",
    reference=_reduce_reference,
    fake=_reduce_fake,
    kernels=("cpu", "cuda", "triton"),
)
"""The sums of :math:`g`, :math:`g \\hat y` and, with a residual norm, :math:`g \\hat r` (else zero), shape ``[3, C]``,
or ``[3, N, C]`` where there is a gain; and with ``emit`` the forward's result, recomputed in the same pass for the
weight gradient that needs it next."""


def _mask_reference(
    grad: Tensor,
    y: Tensor,
    norm: Tensor | None,
    residual: Tensor | None,
    res_norm: Tensor | None,
    act: int,
    act_param: float,
    emit: bool,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    operands = (grad, y, norm, residual, res_norm, act, act_param)
    _, g = _masked_gradient(*operands, None, dropout, seed)
    return torch.empty_like(y).copy_(g), *_reduce_reference(*operands, emit, None, dropout, seed)


def _mask_fake(
    grad: Tensor,
    y: Tensor,
    norm: Tensor | None,
    residual: Tensor | None,
    res_norm: Tensor | None,
    act: int,
    act_param: float,
    emit: bool,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    operands = (grad, y, norm, residual, res_norm, act, act_param)
    return torch.empty_like(y), *_reduce_fake(*operands, emit, None, dropout, seed)


JOIN_BACKWARD_MASK = declare(
    "join_backward_mask",
    f"({_OPERANDS}, bool emit, float dropout=0.0, Tensor? seed=None) -> (Tensor, Tensor, Tensor)",
    reference=_mask_reference,
    fake=_mask_fake,
    kernels=("triton",),
)
"""``(g, sums, value)``: the gradient behind the activation in the dtype and layout of ``y``, and what
:data:`JOIN_BACKWARD_REDUCE` yields, from the same pass. No gain: with one the sums are not those of ``g``."""


# ---------------------------------------------------------------------------------------------------------------------
# Second pass
# ---------------------------------------------------------------------------------------------------------------------


def _input_gradient(
    g: Tensor, x: Tensor, norm: Tensor | None, dbeta: Tensor, dgamma: Tensor, count: float, training: bool
) -> Tensor:
    if norm is None:
        return g
    scale = norm[2, :, None, None]
    if not training:
        return scale * g
    offset, slope = dbeta / count, dgamma / count
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
    gain: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    offset: Tensor | None = None,
    addend: Tensor | None = None,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _, g = _masked_gradient(grad, y, norm, residual, res_norm, act, act_param, gain, dropout, seed)
    u = g if gain is None else gain[:, :, None, None] * g
    if offset is not None:
        u = u + offset[:, :, None, None]
    rows = g.new_zeros((3, 1)) if sums is None else sums
    grad_y = _input_gradient(u, y, norm, rows[0], rows[1], count, training)
    if addend is not None:
        grad_y = grad_y + addend
    if into is None:
        grad_y = torch.empty_like(y).copy_(grad_y)
    else:
        into.copy_(grad_y)
        grad_y = y.new_empty(0)
    if residual is None or not need_residual:
        return grad_y, y.new_empty(0)
    grad_residual = _input_gradient(
        g, residual, res_norm, rows[3 if len(rows) > 3 else 0], rows[2], count, res_training
    )
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
    gain: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    offset: Tensor | None = None,
    addend: Tensor | None = None,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    writes_residual = residual is not None and need_residual
    return torch.empty_like(y) if into is None else y.new_empty(0), torch.empty_like(
        y
    ) if writes_residual else y.new_empty(0)


JOIN_BACKWARD_APPLY = declare(
    "join_backward_apply",
    f"({_OPERANDS}, Tensor? sums, float count, bool training, bool res_training, bool need_residual, {_MODIFIERS}, "
    "Tensor? offset=None, Tensor? addend=None, Tensor(a!)? into=None) -> (Tensor, Tensor)",
    reference=_apply_reference,
    fake=_apply_fake,
    kernels=("cpu", "cuda", "triton"),
)
"""``(dy + addend, dresidual)``; ``dresidual`` is empty where it is not needed, and so is ``dy`` where it was written to
``into``, which may be the addend itself: both may be channel slices of a channels_last buffer.

``sums`` is ``[3, C]``, the totals of :math:`u`, of :math:`u \\hat y` and of :math:`g \\hat r`, with a fourth row, that
of :math:`g`, where a gain or an offset tells ``u`` from ``g``."""
