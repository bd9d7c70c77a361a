"""The shapes that ``python -m fusedres bench`` measures; those of the suites are in ``bench/shapes.py``."""

from __future__ import annotations

__all__ = ["BATCH", "BLOCK_INPUTS", "name_of"]

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


def name_of(shape: tuple[int, ...]) -> str:
    """``8x64x56x56``, for groups and ids."""
    return "x".join(map(str, shape))
