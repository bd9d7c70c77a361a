"""Calls that find their inputs outside of every cache: a call's operands are others than those of the call before."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

__all__ = ["cache_bytes", "copies", "rotating"]

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNKNOWN = 32 * 2**20
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def cache_bytes(device: torch.device | str = "cpu") -> int:
    """The size of the last-level cache; 32 MiB where a CPU does not tell."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in sorted(_CACHES.glob("index*/size"))]
    return max((int(size[:-1]) * _UNITS[size[-1]] for size in sizes), default=_UNKNOWN)


def copies(nbytes: int, device: torch.device | str = "cpu", most: int = 64) -> int:
    """How many copies of operands of ``nbytes`` fill the last-level cache twice; at least 2 and at most ``most``.

    Operands so small that ``most`` copies fit the cache stay in it, as they do in a network.
    """
    return min(most, max(2, math.ceil(2 * cache_bytes(device) / max(nbytes, 1))))


def rotating(calls: Iterable[Callable[[], Any]]) -> Callable[[], Any]:
    """One call that makes these one after the other, over and over."""
    each = itertools.cycle(calls)
    return lambda: next(each)()
