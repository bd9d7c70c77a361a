"""From statistics to the affine of a batch norm, and the update of its running statistics.

With batch statistics (mean, M2) of ``count`` values per channel (Ioffe and Szegedy 2015, algorithm 1):

.. math::
    rstd = (M2 / count + eps)^{-1/2} \\qquad scale = gamma \\cdot rstd \\qquad shift = beta - mean \\cdot scale

    running\\_mean \\leftarrow (1 - m)\\, running\\_mean + m \\cdot mean \\qquad
    running\\_var \\leftarrow (1 - m)\\, running\\_var + m \\cdot M2 / (count - 1)

The statistics may be ``[2, K, C]``, partials of ``count / K`` values each, which are merged first. Without any the
running statistics take their place and nothing is updated. The result holds the rows
``(mean, rstd, scale, shift)``, shape ``[4, C]``: all that later passes, forward and backward, need of the norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bn_stats import statistics_dtype
from .registry import declare

__all__ = ["BN_NORM"]

_SCHEMA = (
    "(Tensor? stats, float count, Tensor? gamma, Tensor? beta, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "float momentum, float eps) -> Tensor"
)


def _merged(stats: Tensor, count: float) -> tuple[Tensor, Tensor]:
    """Chan's merge of partials of equally many values."""
    means, m2s = stats.unbind(0)
    mean = means.mean(0)
    return mean, m2s.sum(0) + count / len(means) * (means - mean).square().sum(0)


def _reference(
    stats: Tensor | None,
    count: float,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    if stats is None:
        if running_mean is None or running_var is None:
            raise ValueError("bn_norm: neither batch statistics nor running statistics are given")
        dtype = statistics_dtype(running_mean.dtype)
        mean, var = running_mean.to(dtype), running_var.to(dtype)
    else:
        mean, m2 = stats.unbind(0) if stats.dim() == 2 else _merged(stats, count)
        var = m2 / count
        if running_mean is not None:
            running_mean.mul_(1 - momentum).add_(mean.to(running_mean.dtype), alpha=momentum)
        if running_var is not None:
            running_var.mul_(1 - momentum).add_((m2 / (count - 1)).to(running_var.dtype), alpha=momentum)
    rstd = torch.rsqrt(var + eps)
    scale = rstd if gamma is None else rstd * gamma
    shift = -mean * scale if beta is None else beta - mean * scale
    return torch.stack((mean, rstd, scale.to(mean.dtype), shift.to(mean.dtype)))


def _fake(
    stats: Tensor | None,
    count: float,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    like = running_mean if stats is None else stats
    assert like is not None
    return like.new_empty((4, like.shape[-1]), dtype=statistics_dtype(like.dtype))


BN_NORM = declare("bn_norm", _SCHEMA, reference=_reference, fake=_fake, kernels=("cpu", "cuda", "triton"))
