"""Batch statistics: the mean and the sum of squared deviations of every channel.

.. math:: mean_c = \\frac1n \\sum_{i} x_{c,i} \\qquad M2_c = \\sum_i (x_{c,i} - mean_c)^2 \\qquad n = N H W

Computed from (count, mean, M2) partials over small pieces, merged by the pairwise formula of Chan, Golub and LeVeque
(1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", eq. 2.1), so that a large mean does
not cancel a small variance. ``per_sample`` takes them over every sample on its own: the means are squeeze-excitation's
squeeze, and :mod:`fusedres.ops.bn_norm` merges the samples. ``into``, a channel slice of a wider channels_last buffer,
receives a copy of the tensor in the same pass: DenseNet's concatenation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import declare

__all__ = ["BN_STATS", "statistics_dtype"]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics of tensors of ``dtype`` are kept: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _reference(x: Tensor, per_sample: bool = False, into: Tensor | None = None) -> Tensor:
    if into is not None:
        into.copy_(x)
    values = x.to(statistics_dtype(x.dtype))
    over = (2, 3) if per_sample else (0, 2, 3)
    mean = values.mean(over, keepdim=True)
    m2 = (values - mean).square_().sum(over)
    return torch.stack((mean.view_as(m2), m2))


def _fake(x: Tensor, per_sample: bool = False, into: Tensor | None = None) -> Tensor:
    shape = (2, x.shape[0], x.shape[1]) if per_sample else (2, x.shape[1])
    return x.new_empty(shape, dtype=statistics_dtype(x.dtype))


BN_STATS = declare(
    "bn_stats",
    "(Tensor x, bool per_sample=False, Tensor(a!)? into=None) -> Tensor",
    reference=_reference,
    fake=_fake,
    kernels=("cpu", "cuda", "triton"),
)
"""``[2, C]``, or ``[2, N, C]`` of every sample: the rows mean and M2."""
