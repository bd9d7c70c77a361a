"""Launching a kernel, and what every launcher asks of its tensors: layout, tiles, how many programs fill the device.

:func:`recorded` turns launches into descriptions of themselves. With tensors on the ``meta`` device it tells which
specialisations of which kernels a call would run, so that exactly those can be compiled without a GPU
(:mod:`fusedres.triton.offline`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..ops.registry import OPS, implement

__all__ = ["Launch", "Layout", "cdiv", "common_layout", "described", "interpreted", "launch", "layout_of"]
__all__ += ["multiprocessors", "next_power_of_2", "pixels_of", "recorded", "register", "seed_argument", "splits_of"]
__all__ += ["taps_of", "tile_of"]

cdiv = triton.cdiv
next_power_of_2 = triton.next_power_of_2

# What a device has if there is none to ask: an H100's.
_MULTIPROCESSORS = 132


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return triton.knobs.runtime.interpret


def register(name: str, function: Any) -> None:
    """Makes ``function`` the kernel of op ``name`` in this backend."""
    implement(OPS[name], "triton", function, "CPU" if interpreted() else "CUDA")


# ---------------------------------------------------------------------------------------------------------------------
# Launches
# ---------------------------------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """One launch of a kernel.

    Attributes:
        args: the arguments by name, tensors, their descriptors and numbers; ``None`` is a compile-time constant.
        meta: the ``tl.constexpr`` arguments by name.
        options: ``num_warps``, ``num_stages`` and perhaps ``maxnreg``.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    meta: dict[str, Any]
    options: dict[str, int]


_recorder = threading.local()


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collects the launches of the ``with`` block, none of which runs."""
    before = getattr(_recorder, "launches", None)
    _recorder.launches = launches = []
    try:
        yield launches
    finally:
        _recorder.launches = before


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    args: dict[str, Any],
    meta: dict[str, Any],
    *,
    warps: int = 4,
    stages: int = 3,
    registers: int = 0,
) -> None:
    """Runs a kernel on the device and the current stream of its tensors; ``registers`` limits those of a thread."""
    options = {"num_warps": warps, "num_stages": stages} | ({"maxnreg": registers} if registers else {})
    launches = getattr(_recorder, "launches", None)
    if launches is not None:
        launches.append(Launch(kernel, grid, args, meta, options))
        return
    device = next(value.device for value in args.values() if isinstance(value, Tensor))
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[grid](**args, **meta, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Layouts and tiles
# ---------------------------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """How a 4-d tensor lies in memory.

    Attributes:
        channels_last: whether channels are neighbours, else pixels are.
        pitch: elements from one pixel to the next in channels_last; more than the channels in a slice of a buffer.
    """

    channels_last: bool
    pitch: int


def layout_of(op: str, name: str, x: Tensor) -> Layout:
    """The layout of ``x``.

    Raises:
        ValueError: where it is neither dense nor a slice of the channels of a channels_last tensor.
    """
    _, c, h, w = x.shape
    if x.is_contiguous(memory_format=torch.channels_last):
        return Layout(True, c)
    if x.is_contiguous():
        return Layout(False, c)
    pitch = x.stride(3)
    if x.stride() == (h * w * pitch, 1, w * pitch, pitch) and pitch >= c:
        return Layout(True, pitch)
    raise ValueError(
        f"{op}: {name} of shape {tuple(x.shape)} and strides {x.stride()} is neither dense nor a channel slice"
    )


def common_layout(op: str, tensors: dict[str, Tensor | None]) -> dict[str, Layout]:
    """The layout of every tensor that is there; the first one's shape, dtype and order are everyone's.

    Raises:
        ValueError: where one differs, naming it.
    """
    present = {name: x for name, x in tensors.items() if x is not None}
    first, lead = next(iter(present.items()))
    layouts = {}
    for name, x in present.items():
        layouts[name] = layout_of(op, name, x)
        if x.shape != lead.shape or x.dtype != lead.dtype or x.device != lead.device:
            raise ValueError(
                f"{op}: {name} of shape {tuple(x.shape)}, {x.dtype} on {x.device} does not fit {first} of shape "
                f"{tuple(lead.shape)}, {lead.dtype} on {lead.device}"
            )
        if layouts[name].channels_last != layouts[first].channels_last:
            raise ValueError(f"{op}: {name} and {first}, both of shape {tuple(x.shape)}, differ in layout")
    return layouts


def tile_of(elements: int, channels: int, channels_last: bool, widest: int = 256) -> tuple[int, int]:
    """Pixels and channels of a tile with this many elements: long along what is dense in memory."""
    columns = min(next_power_of_2(max(channels, 8)), widest if channels_last else 8)
    return elements // columns, columns


# ---------------------------------------------------------------------------------------------------------------------
# Tensor descriptors
# ---------------------------------------------------------------------------------------------------------------------


def described(*operands: tuple[Tensor, int]) -> bool:
    """Whether descriptors can stand for operands, each with its pitch in elements: addresses are multiples of 16 bytes.

    That is what the copies ask for (CUDA C++ Programming Guide, "Tensor Memory Access").
    """
    return all(x.data_ptr() % 16 == 0 and pitch * x.element_size() % 16 == 0 for x, pitch in operands)


def pixels_of(x: Tensor, pitch: int, rows: int, columns: int) -> TensorDescriptor:
    """A channels_last tensor as ``[pixels, channels]``, which a kernel loads in tiles of so many rows and columns."""
    n, c, h, w = x.shape
    return TensorDescriptor(x, [n * h * w, c], [pitch, 1], [rows, columns])


def taps_of(weight: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Channels_last weights as ``[taps, filters, channels]``: a tile is of one tap, and zero behind its channels."""
    k, c, r, s = weight.shape
    return TensorDescriptor(weight, [r * s, k, c], [c, r * s * c, 1], [1, rows, columns])


# ---------------------------------------------------------------------------------------------------------------------
# How many programs
# ---------------------------------------------------------------------------------------------------------------------


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(x: Tensor) -> int:
    """Streaming multiprocessors of the tensor's device."""
    return _multiprocessors(x.device.index) if x.device.type == "cuda" else _MULTIPROCESSORS


def splits_of(rows: int, block: int, others: int, programs: int) -> tuple[int, int]:
    """Into how many pieces to split ``rows``, and how long each is: whole blocks, so that ``programs`` run in all."""
    wanted = max(1, programs // max(others, 1))
    piece = cdiv(cdiv(rows, min(wanted, cdiv(rows, block))), block) * block
    return cdiv(rows, piece), piece


def seed_argument(seed: Tensor | None, y: Tensor) -> Tensor | int | None:
    """A dropout's seed as a kernel takes it: its memory where that is on the device, else its value."""
    return seed if seed is None or seed.device == y.device else int(seed)
