"""Stochastic depth (Huang et al. 2016, "Deep Networks with Stochastic Depth")."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["StochasticDepth"]


class StochasticDepth(nn.Module):
    """Drops whole samples of a branch in training, and scales those that survive::

        y[n] = x[n] * b[n] / (1 - p),  b[n] ~ Bernoulli(1 - p)

    so that the branch has the same expectation in training as in evaluation, where this is the identity (Huang et al.
    2016, eq. 2, with the scale moved from evaluation to training). There is one ``b`` per sample, torchvision's mode
    ``"row"``; the same seed drops the same samples as ``torchvision.ops.StochasticDepth(p, "row")``. No parameters, no
    keys. In a block of ``fusedres.nn`` the mask is a factor of the join and costs no pass.

    Args:
        p: the probability that a sample is dropped.

    Shape: ``[N, ...]`` to the same, of any floating dtype.

    Raises:
        ValueError: where ``p`` is not between 0 and 1.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"p must be between 0 and 1, got {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        survival = 1.0 - self.p
        kept = torch.empty((x.shape[0],) + (1,) * (x.dim() - 1), dtype=x.dtype, device=x.device).bernoulli_(survival)
        return x * (kept.div_(survival) if survival > 0 else kept)

    def extra_repr(self) -> str:
        return f"p={self.p}"
