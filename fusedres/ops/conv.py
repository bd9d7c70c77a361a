"""The convolution itself, through the vendor's library (oneDNN on a CPU, cuDNN on a GPU), and its two gradients.

.. math:: y_{n,k,p} = b_k + \\sum_{c,t} w_{k,c,t} \\; x_{n,c,\\,stride \\cdot p + dilation \\cdot t - padding}

``x`` is ``[N, C, H, W]``, ``weight`` ``[K, C / groups, R, S]``, ``bias`` ``[K]`` or ``None``, all of one dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ConvGeometry", "conv_backward", "conv_fprop", "geometry", "output_size"]

_backward = torch.ops.aten.convolution_backward.default


class ConvGeometry(NamedTuple):
    """What a convolution is besides its weights; pairs are (height, width)."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


def geometry(
    stride: int | tuple[int, int],
    padding: int | tuple[int, int] | str,
    dilation: int | tuple[int, int],
    groups: int,
    kernel_size: tuple[int, int],
) -> ConvGeometry:
    """Normalises the arguments of ``nn.Conv2d``, string padding included.

    Raises:
        ValueError: where ``padding="same"`` would be uneven, which needs a padded copy of the input.
    """
    strides, dilations = _pair(stride), _pair(dilation)
    if padding == "valid":
        return ConvGeometry(strides, (0, 0), dilations, groups)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilations, kernel_size)]
        if any(total % 2 for total in totals):
            raise ValueError(f"padding='same' is uneven for kernel_size={kernel_size} and dilation={dilations}")
        return ConvGeometry(strides, (totals[0] // 2, totals[1] // 2), dilations, groups)
    if isinstance(padding, str):
        raise ValueError(f"padding must be 'same', 'valid' or numbers, got {padding!r}")
    return ConvGeometry(strides, _pair(padding), dilations, groups)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def output_size(size: tuple[int, int], kernel_size: tuple[int, int], g: ConvGeometry) -> tuple[int, int]:
    """Height and width of the result."""
    height, width = (
        (size[i] + 2 * g.padding[i] - g.dilation[i] * (kernel_size[i] - 1) - 1) // g.stride[i] + 1 for i in (0, 1)
    )
    return height, width


def conv_fprop(x: Tensor, weight: Tensor, bias: Tensor | None, g: ConvGeometry) -> Tensor:
    """The forward pass."""
    return torch.conv2d(x, weight, bias, g.stride, g.padding, g.dilation, g.groups)


def conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """``(dx, dweight)``, each ``None`` where it is not needed.

    The bias has its gradient from the sums that the join's backward takes anyway.
    """
    if not (need_x or need_weight):
        return None, None
    dx, dweight, _ = _backward(
        grad, x, weight, None, g.stride, g.padding, g.dilation, False, (0, 0), g.groups, (need_x, need_weight, False)
    )
    return dx, dweight
