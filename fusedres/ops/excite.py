"""The excitation: from the mean of every sample's channels to a gain per sample and channel.

.. math:: gain_{n,c} = mask_n \\cdot gate\\big(W_2 \\, act(W_1 s_n + b_1) + b_2\\big)_c \\qquad
    s_{n,c} = scale_c \\cdot mean_{n,c} + shift_c

(Hu et al. 2018, "Squeeze-and-Excitation Networks", eq. 2 to 4). ``means`` are those of a raw tensor, ``[N, C]`` in the
statistics' dtype: the mean of a batch-normalised tensor is the affine of that, with the rows ``[4, C]`` of
:mod:`fusedres.ops.bn_norm`. ``w1`` is ``[H, C]`` and ``w2`` ``[C, H]``, each with two more dimensions of size one where
it is a 1x1 convolution's, ``b1`` ``[H]`` and ``b2`` ``[C]``, all of one dtype, to which ``s`` is rounded; ``mask`` is
stochastic depth's, ``[N, 1]``. The gain is ``[N, C]`` in the dtype of ``means``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .join import BY_CODE
from .registry import declare

__all__ = ["EXCITE", "GATES", "squeezed"]

GATES = {"sigmoid": torch.sigmoid, "hardsigmoid": F.hardsigmoid}
"""What may end an excitation."""


def squeezed(norm: Tensor | None, means: Tensor) -> Tensor:
    """The mean of a batch-normalised tensor is the affine of the raw tensor's mean."""
    return means if norm is None else torch.addcmul(norm[3], norm[2], means)


def _reference(
    means: Tensor,
    norm: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    act: int,
    act_param: float,
    gate: str,
    mask: Tensor | None,
) -> Tensor:
    hidden = F.linear(squeezed(norm, means).to(w1.dtype), w1.flatten(1), b1)
    hidden = BY_CODE[act].forward(hidden, act_param)
    gain = GATES[gate](F.linear(hidden, w2.flatten(1), b2)).to(means.dtype)
    return gain if mask is None else gain * mask


def _fake(
    means: Tensor,
    norm: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    act: int,
    act_param: float,
    gate: str,
    mask: Tensor | None,
) -> Tensor:
    return torch.empty_like(means, memory_format=torch.contiguous_format)


EXCITE = declare(
    "excite",
    "(Tensor means, Tensor? norm, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, int act, float act_param, str gate, "
    "Tensor? mask) -> Tensor",
    reference=_reference,
    fake=_fake,
    kernels=("triton",),
)
