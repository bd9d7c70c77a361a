"""The shapes that ``python -m fusedres bench`` measures; those of the suites are in ``bench/shapes.py``."""

from __future__ import annotations

__all__ = ["BATCH", "BLOCK_INPUTS", "GROUPED", "name_of"]

BATCH = (8, 224)
"""Images and their resolution, for whole networks."""

BLOCK_INPUTS = (
    (1, 64, 7, 7),
    (1, 512, 7, 7),
    (1, 64, 56, 56),
    (2, 128, 28, 28),
    (8, 256, 14, 14),
    (8, 64, 56, 56),
    (32, 16, 32, 32),
)
"""What a block reads, down to the smallest."""

GROUPED = ((128, 56, 1), (256, 56, 2), (256, 28, 1), (512, 28, 2), (512, 14, 1), (1024, 14, 2), (1024, 7, 1))
"""Channels, height and stride of the 3x3 convolutions of ResNeXt-50 32x4d."""


def name_of(shape: tuple[int, ...]) -> str:
    """``8x64x56x56``, for groups and ids."""
    return "x".join(map(str, shape))
