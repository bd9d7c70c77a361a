"""Channel slices of channels_last buffers: with NaN in the other channels, to be written to; beyond 32-bit offsets."""

from __future__ import annotations

import mmap
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["empty_slice", "far", "far_apart"]


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


def far_apart(dtype: torch.dtype = torch.float32) -> Tensor:
    """A slice whose pixels lie so far apart that the last ones are past 2^31 elements; few of the pages exist."""
    pixels, channels, pitch = 5, 8, 2**29
    no_reserve = 0x4000  # Linux's MAP_NORESERVE, which Python does not name
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    flat = torch.frombuffer(mmap.mmap(-1, pixels * pitch * dtype.itemsize, flags=flags), dtype=dtype)
    assert (pixels - 1) * pitch >= 2**31
    return flat.as_strided((1, channels, 1, pixels), (pixels * pitch, 1, pixels * pitch, pitch))


def far(t: Tensor) -> Tensor:
    """The values of a tensor of :func:`far_apart`'s shape, there."""
    return far_apart(t.dtype).copy_(t)
