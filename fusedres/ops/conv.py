"""The convolution itself, through the vendor's library (oneDNN on a CPU, cuDNN on a GPU), and its two gradients.

.. math:: y_{n,k,p} = b_k + \\sum_{c,t} w_{k,c,t} \\; x_{n,c,\\,stride \\cdot p + dilation \\cdot t - padding}

``x`` is ``[N, C, H, W]``, ``weight`` ``[K, C / groups, R, S]``, ``bias`` ``[K]`` or ``None``, all of one dtype.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .registry import define

__all__ = [
    "ConvGeometry",
    "adds_pointwise_dgrad",
    "conv_backward",
    "conv_fprop",
    "geometry",
    "groups_of",
    "onednn_refuses",
    "output_size",
    "pointwise_dgrad_add_",
]

_backward = torch.ops.aten.convolution_backward.default

# Pixels below which oneDNN's work on a transposed weight costs more than a pass over the gradient saves.
_FEWEST_PIXELS = 4096


class ConvGeometry(NamedTuple):
    """What a convolution is besides its weights; pairs are (height, width)."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


@cache
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
    (s0, s1), (p0, p1), (d0, d1), _ = g
    height = (size[0] + 2 * p0 - d0 * (kernel_size[0] - 1) - 1) // s0 + 1
    return height, (size[1] + 2 * p1 - d1 * (kernel_size[1] - 1) - 1) // s1 + 1


def groups_of(x: Tensor, weight: Tensor) -> int:
    """The groups of a convolution of ``x`` with ``weight``: their shapes say it."""
    return x.shape[1] // weight.shape[1]


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
    if x.dtype != weight.dtype:  # dgrad reads nothing of x but its shape
        x = x.to(weight.dtype) if need_weight else torch.empty_like(x, dtype=weight.dtype)
    dx, dweight, _ = _backward(
        grad, x, weight, None, g.stride, g.padding, g.dilation, False, (0, 0), g.groups, (need_x, need_weight, False)
    )
    return dx, dweight


@cache
def onednn_refuses(device_type: str, dtype: torch.dtype) -> str | None:
    """``None`` where oneDNN's fused convolutions run this dtype here, else why they do not."""
    if device_type != "cpu" or not torch.backends.mkldnn.is_available():
        return "oneDNN is not available"
    if not hasattr(torch.ops.mkldnn, "_convolution_pointwise") or not hasattr(
        torch._C._nn, "mkldnn_reorder_conv2d_weight"
    ):
        return "this build of torch does not expose oneDNN's fused convolutions"
    if dtype == torch.float32:
        return None
    if dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    if dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return None
    return f"oneDNN has no {dtype} convolutions on this CPU"


def adds_pointwise_dgrad(onto: Tensor, grad: Tensor, weight: Tensor, g: ConvGeometry) -> bool:
    """Whether :func:`pointwise_dgrad_add_` takes these tensors, and is worth it."""
    last = torch.channels_last
    return (
        weight.shape[2:] == (1, 1)
        and g == ((1, 1), (0, 0), g.dilation, 1)
        and grad.numel() // max(grad.shape[1], 1) >= _FEWEST_PIXELS
        and onto.is_contiguous(memory_format=last)
        and grad.is_contiguous(memory_format=last)
        and onednn_refuses(grad.device.type, grad.dtype) is None
    )


def pointwise_dgrad_add_(onto: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """``onto += dx`` for a 1x1 convolution: dgrad is a 1x1 convolution itself, and oneDNN's can add to its output.

    .. math:: onto_{n,c,p} \\mathrel{+}= \\sum_k w_{k,c} \\; grad_{n,k,p}
    """
    add_ = torch.ops.fusedres.pointwise_dgrad_add_ if torch.compiler.is_compiling() else _pointwise_dgrad_add_
    add_(onto, grad, weight)
    return onto


def _pointwise_dgrad_add_(onto: Tensor, grad: Tensor, weight: Tensor) -> None:
    transposed = weight.transpose(0, 1)
    torch.ops.mkldnn._convolution_pointwise_.binary(
        onto, grad, transposed, None, (0, 0), (1, 1), (1, 1), 1, "add", 1.0, None, [], ""
    )


# A compiler does not take an op that returns what it wrote to: in its graph this one returns nothing.
define(
    "pointwise_dgrad_add_(Tensor(a!) onto, Tensor grad, Tensor weight) -> ()",
    _pointwise_dgrad_add_,
    lambda onto, grad, weight: None,
)
