"""What the cases of several Triton kernels share."""

from __future__ import annotations

import torch

__all__ = ["GEOMETRIES", "rows"]

GEOMETRIES = {  # kernel size, stride, padding, dilation
    "1x1": ((1, 1), (1, 1), (0, 0), (1, 1)),
    "1x1 stride 2": ((1, 1), (2, 2), (0, 0), (1, 1)),
    "3x3": ((3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3 stride 2": ((3, 3), (2, 2), (1, 1), (1, 1)),
    "3x3 dilated": ((3, 3), (1, 1), (2, 2), (2, 2)),
    "1x3 uneven": ((1, 3), (2, 1), (0, 1), (1, 1)),
    "1x1 padded": ((1, 1), (1, 1), (1, 1), (1, 1)),
}


def rows(channels, seed, device):
    """The rows of a norm, or any ``[4, channels]`` with its second and third row well above zero."""
    values = torch.randn(4, channels, generator=torch.Generator().manual_seed(seed))
    values[1:3] = values[1:3].abs() + 0.5
    return values.to(device)
