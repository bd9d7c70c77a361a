"""Channel slices of channels_last buffers whose other channels hold NaN, to be written to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["empty_slice"]


def empty_slice(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, before: int = 3, behind: int = 2
) -> tuple[Tensor, Callable[[], None]]:
    """A slice of NaN with so many channels on either side, and a check that none of those was written to."""
    n, c, h, w = shape
    buffer = torch.full((n, before + c + behind, h, w), float("nan"), dtype=dtype)
    buffer = buffer.contiguous(memory_format=torch.channels_last)

    def check() -> None:
        assert buffer[:, :before].isnan().all(), "channels before the slice were written to"
        assert buffer[:, before + c :].isnan().all(), "channels behind the slice were written to"

    return buffer[:, before : before + c], check
