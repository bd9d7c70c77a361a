"""The join: affine, gain, residual, activation and dropout in one pass over the tensor.

.. math:: z = gain_{n,c} \\cdot (scale_c \\cdot y + shift_c) + r \\qquad r \\in \\{0,\\; residual,\\;
    res\\_scale_c \\cdot residual + res\\_shift_c\\} \\qquad out = keep \\cdot act(z)

``y``, ``residual`` and ``out`` are ``[N, C, H, W]`` of one dtype and one dense layout; ``y`` may also be a slice of
the channels of a channels_last buffer. A norm is the ``[4, C]`` tensor of :mod:`fusedres.ops.bn_norm`; without one the
affine is the identity. The *dual* affine, where the residual has a norm of its own, is the projection shortcut of He
et al. (2016, "Deep Residual Learning for Image Recognition", eq. 2). The gain, ``[N, C]`` in the statistics' dtype, is
the excitation of Hu et al. (2018, "Squeeze-and-Excitation Networks", eq. 4) or the survival of a sample in Huang et
al. (2016, "Deep Networks with Stochastic Depth", eq. 2). The dropout is that of :mod:`fusedres.ops.dropout`.
Arithmetic is in float32 (float64 for float64), rounded once; a kernel may round before a dropout's factor too, as stock
PyTorch does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import ACTIVATIONS
from .bn_stats import BN_STATS, statistics_dtype
from .dropout import dropped
from .registry import declare

__all__ = ["BY_CODE", "JOIN", "JOIN_STATS", "join_argument"]

_ARGUMENTS = (
    "Tensor y, Tensor? norm, Tensor? residual, Tensor? res_norm, int act, float act_param, "
    "Tensor? gain=None, float dropout=0.0, Tensor? seed=None"
)

BY_CODE = {formula.code: formula for formula in ACTIVATIONS.values()}


def _affine(x: Tensor, norm: Tensor | None) -> Tensor:
    x = x.to(statistics_dtype(x.dtype))
    return x if norm is None else norm[2, :, None, None] * x + norm[3, :, None, None]


def join_argument(
    y: Tensor, norm: Tensor | None, residual: Tensor | None, res_norm: Tensor | None, gain: Tensor | None = None
) -> Tensor:
    """The activation's argument, in the statistics' dtype."""
    z = _affine(y, norm)
    if gain is not None:
        z = gain[:, :, None, None] * z
    return z if residual is None else z + _affine(residual, res_norm)


def _reference(
    y: Tensor,
    norm: Tensor | None,
    residual: Tensor | None,
    res_norm: Tensor | None,
    act: int,
    act_param: float,
    gain: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    out = dropped(BY_CODE[act].forward(join_argument(y, norm, residual, res_norm, gain), act_param), dropout, seed)
    # A result of its own in a dense layout, whatever the formula was: out may neither alias y nor take another stride.
    return torch.empty_like(y).copy_(out)


def _fake(
    y: Tensor,
    norm: Tensor | None,
    residual: Tensor | None,
    res_norm: Tensor | None,
    act: int,
    act_param: float,
    gain: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    return torch.empty_like(y)


JOIN = declare("join", f"({_ARGUMENTS}) -> Tensor", reference=_reference, fake=_fake, kernels=("cpu", "cuda", "triton"))


def _stats_reference(
    y: Tensor,
    norm: Tensor | None,
    residual: Tensor | None,
    res_norm: Tensor | None,
    act: int,
    act_param: float,
    gain: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    out = _reference(y, norm, residual, res_norm, act, act_param, gain, dropout, seed)
    return out, BN_STATS.reference(out)


def _stats_fake(
    y: Tensor,
    norm: Tensor | None,
    residual: Tensor | None,
    res_norm: Tensor | None,
    act: int,
    act_param: float,
    gain: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y), y.new_empty((2, y.shape[1]), dtype=statistics_dtype(y.dtype))


JOIN_STATS = declare(
    "join_stats",
    f"({_ARGUMENTS}) -> (Tensor, Tensor)",
    reference=_stats_reference,
    fake=_stats_fake,
    kernels=("cuda",),
)
"""The join, and the statistics of its rounded result as :mod:`fusedres.ops.bn_stats` has them, ``[2, C]``: what the
norm of a pre-activation block behind it reads. One pass in channels_last, two in the contiguous layout."""
