"""Batch statistics: the mean and the sum of squared deviations of every channel.

.. math:: mean_c = \\frac1n \\sum_{i} x_{c,i} \\qquad M2_c = \\sum_i (x_{c,i} - mean_c)^2 \\qquad n = N H W

Computed from (count, mean, M2) partials over small pieces, merged by the pairwise formula of Chan, Golub and LeVeque
(1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", eq. 2.1), so that a large mean does
not cancel a small variance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import declare

__all__ = ["BN_STATS", "statistics_dtype"]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics of tensors of ``dtype`` are kept: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _reference(x: Tensor) -> Tensor:
    values = x.to(statistics_dtype(x.dtype))
    mean = values.mean((0, 2, 3))
    m2 = (values - mean[:, None, None]).square_().sum((0, 2, 3))
    return torch.stack((mean, m2))


def _fake(x: Tensor) -> Tensor:
    return x.new_empty((2, x.shape[1]), dtype=statistics_dtype(x.dtype))


BN_STATS = declare("bn_stats", "(Tensor x) -> Tensor", reference=_reference, fake=_fake, kernels=("cpu",))
