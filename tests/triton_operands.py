"""What the cases of several Triton kernels share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from fusedres.triton.tuning import Tiles, fixed

__all__ = ["GEOMETRIES", "WAYS", "rows", "walked"]

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


WAYS = {
    "by descriptor": Tiles(32, 32, 32, 4, 2, descriptors=True),
    "persistent": Tiles(32, 32, 32, 4, 2, descriptors=True, persistent=True),
    "persistent by address": Tiles(32, 32, 32, 4, 2, persistent=True),
}


@contextmanager
def walked(way: str) -> Iterator[None]:
    """Convolutions load and walk over tiles in this way, on a device with so little room that programs loop."""
    from fusedres.triton import conv_fused

    with pytest.MonkeyPatch.context() as patch, fixed(WAYS[way]):
        patch.setattr(conv_fused, "multiprocessors", lambda x: 1)
        yield
