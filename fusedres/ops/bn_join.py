"""A batch norm in training and the join behind it, as one op.

.. math:: out = keep \\cdot act(scale_c \\cdot y + shift_c + r) \\qquad
    (mean, rstd, scale, shift) = bn\\_norm(bn\\_stats(y))

Nothing stands between :mod:`fusedres.ops.bn_stats`, :mod:`fusedres.ops.bn_norm` and :mod:`fusedres.ops.join` where the
value that is pending on ``y`` is read at once. On CUDA the three are one launch where ``y`` and the residual fit in the
L2 cache, so that the tensor is read from memory once; elsewhere they are what they are on their own. The formulas, the
operands and their layouts are those of the three; ``y`` holds at least one value per channel, and the running
statistics are written to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bn_norm import BN_NORM
from .bn_stats import BN_STATS, statistics_dtype
from .join import JOIN
from .registry import declare

__all__ = ["BN_JOIN"]

_SCHEMA = (
    "(Tensor y, Tensor? gamma, Tensor? beta, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, "
    "float eps, Tensor? residual, Tensor? res_norm, int act, float act_param, float dropout=0.0, Tensor? seed=None) "
    "-> (Tensor, Tensor)"
)


def _reference(
    y: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    res_norm: Tensor | None,
    act: int,
    act_param: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    count = y.numel() / y.shape[1]
    rows = BN_NORM.reference(BN_STATS.reference(y), count, gamma, beta, running_mean, running_var, momentum, eps)
    return JOIN.reference(y, rows, residual, res_norm, act, act_param, None, dropout, seed), rows


def _fake(
    y: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    res_norm: Tensor | None,
    act: int,
    act_param: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y), y.new_empty((4, y.shape[1]), dtype=statistics_dtype(y.dtype))


BN_JOIN = declare("bn_join", _SCHEMA, reference=_reference, fake=_fake, kernels=("cuda",))
"""``(out, rows)``, the rows being those of :mod:`fusedres.ops.bn_norm`, ``[4, C]``."""
