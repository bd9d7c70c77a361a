"""Bringing tensors into the layouts that kernels walk: contiguous, or channels_last where there are four dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dense", "like"]


def dense(x: Tensor) -> Tensor:
    """``x``, or a copy where its layout is neither contiguous nor channels_last."""
    if x.is_contiguous() or _is_channels_last(x):
        return x
    # A channel stride of one says channels_last even where rows are padded or sliced.
    return _copied(x, x.dim() == 4 and x.stride(1) == 1 and x.shape[1] > 1)


def like(x: Tensor, y: Tensor) -> Tensor:
    """``x``, dense, in the dtype and layout of ``y``, which is dense, or a slice of a channels_last buffer."""
    if x.dtype != y.dtype:
        x = x.to(y.dtype)
    if x.stride() == y.stride():
        return x
    return _copied(x, _is_channels_last(y) or (y.dim() == 4 and not y.is_contiguous()))


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _copied(x: Tensor, channels_last: bool) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
