"""Whether a tensor is free of NaN and infinity.

.. math:: \\bigwedge_i \\; |x_i| < \\infty

``x`` is a dense 4-d tensor. oneDNN's convolutions apply ReLU as ``max(x, 0)``, which turns NaN into 0; stock PyTorch
keeps it. So what enters them is looked at first, in one read that the convolution then finds in cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import declare

__all__ = ["ALL_FINITE"]


def _reference(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())


def _fake(x: Tensor) -> bool:
    raise NotImplementedError("whether a tensor is finite depends on its values")


ALL_FINITE = declare("all_finite", "(Tensor x) -> bool", reference=_reference, fake=_fake, kernels=("cpu",))
