"""Inference: a 3x3 convolution by Winograd's minimal filtering, from weights that were transformed beforehand.

.. math:: out = act\\big(conv(x, w) + b + residual\\big) \\qquad
    conv(x, w) = A^T \\big[(G w G^T) \\odot (B^T d B)\\big] A

F(2x2, 3x3) makes a 2x2 tile of results from a 4x4 window ``d`` with 16 products where the definition takes 36 (Lavin
and Gray 2016, "Fast algorithms for convolutional neural networks", section 4.1). Sums run over channels alone, not over
channels and taps, so in float32 its error is smaller than a direct convolution's (ibid., table 3).

``x`` is ``[N, C, H, W]``, channels_last, float32; stride and dilation are one. :data:`CONV_WINOGRAD_PACK` makes
``[ceil(K / 32), 16, C, 32]`` of weights ``[K, C, 3, 3]``: the 16 points of ``G w G^T``, in panels of 32 filters, zeros
past the last. ``residual`` has the shape of the result, ``bias`` is ``[K]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import env
from .conv import ConvGeometry, output_size
from .join import BY_CODE
from .registry import declare

__all__ = ["CONV_WINOGRAD", "CONV_WINOGRAD_PACK", "winograd_unsuited"]

_PANEL = 32

# Rows of G and of a left inverse: what the weights become, and how they come back.
_G = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
_G_BACK = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, -1.0, 0.0), (0.0, 0.0, 0.0, 1.0))


def _transformed(weight: Tensor, rows: tuple[tuple[float, ...], ...]) -> Tensor:
    matrix = torch.tensor(rows, dtype=weight.dtype, device=weight.device)
    return torch.einsum("ir,kcrs,js->kcij", matrix, weight, matrix)


def _pack_reference(weight: Tensor) -> Tensor:
    filters, channels = weight.shape[:2]
    panels = -(-filters // _PANEL)
    points = weight.new_zeros((panels * _PANEL, channels, 16))
    points[:filters] = _transformed(weight, _G).flatten(2)
    return points.view(panels, _PANEL, channels, 16).permute(0, 3, 2, 1).contiguous()


def _pack_fake(weight: Tensor) -> Tensor:
    return weight.new_empty((-(-weight.shape[0] // _PANEL), 16, weight.shape[1], _PANEL))


CONV_WINOGRAD_PACK = declare(
    "conv_winograd_pack", "(Tensor weight) -> Tensor", reference=_pack_reference, fake=_pack_fake, kernels=("cpu",)
)


def _reference(
    x: Tensor,
    packed: Tensor,
    filters: int,
    bias: Tensor | None,
    residual: Tensor | None,
    act: int,
    act_param: float,
    padding: list[int],
) -> Tensor:
    points = packed.permute(0, 3, 2, 1).reshape(-1, packed.shape[2], 4, 4)[:filters]
    y = torch.conv2d(x, _transformed(points, _G_BACK), bias, padding=padding)
    out = BY_CODE[act].forward(y if residual is None else y + residual, act_param)
    return out.contiguous(memory_format=torch.channels_last)


def _fake(
    x: Tensor,
    packed: Tensor,
    filters: int,
    bias: Tensor | None,
    residual: Tensor | None,
    act: int,
    act_param: float,
    padding: list[int],
) -> Tensor:
    size = output_size((x.shape[2], x.shape[3]), (3, 3), ConvGeometry((1, 1), (padding[0], padding[1]), (1, 1), 1))
    shape = (x.shape[0], filters, *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


CONV_WINOGRAD = declare(
    "conv_winograd",
    "(Tensor x, Tensor packed, int filters, Tensor? bias, Tensor? residual, int act, float act_param, int[] padding) "
    "-> Tensor",
    reference=_reference,
    fake=_fake,
    kernels=("cpu",),
)
"""``out``, channels_last."""


# Channels below which the transforms cost more than they save, and tiles below which reading the larger weights does.
_FEWEST_CHANNELS = 32
_FEWEST_TILES = 32


def winograd_unsuited(x: Tensor, weight: Tensor, g: ConvGeometry) -> str | None:
    """``None`` where the kernel takes this convolution and is expected to beat the vendor's, else why not.

    Args:
        x: the convolution's input, or, for the data gradient, a tensor of its size.
        weight: ``[K, C, R, S]``.
    """
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        return f"minimal filtering is for float32, not {x.dtype}"
    if tuple(weight.shape[2:]) != (3, 3) or g.stride != (1, 1) or g.dilation != (1, 1) or g.groups != 1:
        return "minimal filtering is for 3x3 kernels with stride 1, dilation 1 and no groups"
    if not _has_vectors():
        return "there are no kernels with vector instructions"
    if min(weight.shape[0], weight.shape[1]) < _FEWEST_CHANNELS:
        return f"fewer than {_FEWEST_CHANNELS} channels or filters"
    height, width = output_size((x.shape[2], x.shape[3]), (3, 3), g)
    tiles = x.shape[0] * -(-height // 2) * -(-width // 2)
    return f"{tiles} tiles are too few for the transformed weights" if tiles < _FEWEST_TILES else None


def _has_vectors() -> bool:
    return env.library_missing() is None and torch.ops.fusedres.cpu_has_vectors()
