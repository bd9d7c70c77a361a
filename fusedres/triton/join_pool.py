"""Max pooling of a join in Triton, and its gradient: a tile of pixels and channels of the result per program.

Must move, at least: forward, the input once and the result once, with a byte beside each value where it is recorded;
backward, the gradient and those bytes once and the result once. Windows overlap, so where channels are neighbours a
tile is about as high as it is wide, and a program finds in its own cache most of what it reads again. Per position of a
window 2 FLOPs for the affine, those of the activation, and a comparison or a sum.

The gradient is gathered, without atomics and in the order of the windows: the same in every run.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.join_pool import PoolWindow, pooled_size
from .launch import Layout, cdiv, launch, layout_of, register, tile_of
from .tiles import activate, load_row

__all__ = ["join_pool", "join_pool_backward"]

_ELEMENTS = 2048  # of a tile: loads for every position are in flight at once
_WIDEST = 64  # channels of a tile: whole cache lines in every dtype
_UNROLLED = 16  # positions: more are a loop


@triton.jit
def tile_place(H, W, C, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr):
    """Image, rows, columns and channels of this program's tile of a tensor ``[N, C, H, W]``."""
    tiles, across, down = tl.cdiv(C, BC), tl.cdiv(W, BW), tl.cdiv(H, BH)
    place = tl.program_id(0) // tiles
    pixels = tl.arange(0, BH * BW)
    h = (place // across % down) * BH + pixels // BW
    w = (place % across) * BW + pixels % BW
    channels = (tl.program_id(0) % tiles) * BC + tl.arange(0, BC)
    return (place // across // down).to(tl.int64), h, w, channels


@triton.jit
def along_pixels(x, NHWC: tl.constexpr):
    """A vector over a tile's pixels, to broadcast to the tile, whose last dimension is what is dense in memory."""
    return x[:, None] if NHWC else x[None, :]


@triton.jit
def along_channels(x, NHWC: tl.constexpr):
    """A vector over a tile's channels, likewise."""
    return x[None, :] if NHWC else x[:, None]


@triton.jit
def place_pointers(base, image, h, w, H, W, channels, pitch, NHWC: tl.constexpr):
    """Pointers to these pixels and channels of an image; ``pitch`` is the number of channels if not NHWC."""
    pixels = h.to(tl.int64) * W + w
    base += image * H * W * pitch
    if NHWC:
        pixels *= pitch
    else:
        channels = channels.to(tl.int64) * H * W
    return base + (along_pixels(pixels, NHWC) + along_channels(channels, NHWC))


@triton.jit
def in_image(h, w, H, W, channels, C, NHWC: tl.constexpr):
    """Which elements of a tile there are in an image."""
    inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
    return along_pixels(inside, NHWC) & along_channels(channels < C, NHWC)


# ---------------------------------------------------------------------------------------------------------------------
# Forward
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def take_larger(
    best,
    taken,
    position,
    y,
    scale,
    shift,
    act_param,
    image,
    top,
    left,
    H,
    W,
    channels,
    C,
    pitch,
    KW: tl.constexpr,
    ACT: tl.constexpr,
    NHWC: tl.constexpr,
    RECORD: tl.constexpr,
):
    """``best`` and ``taken`` after one more position of the windows that begin at ``top`` and ``left``.

    One outside the image stands for the nearest in it, which is in the window too: rows and columns then come in their
    order, some again, and what is seen again is no greater, so that nothing needs a mask of its own.
    """
    h = tl.maximum(tl.minimum(top + position // KW, H - 1), 0)
    w = tl.maximum(tl.minimum(left + position % KW, W - 1), 0)
    at = place_pointers(y, image, h, w, H, W, channels, pitch, NHWC)
    value = tl.load(at, mask=along_channels(channels < C, NHWC), other=0.0).to(tl.float32)
    if scale is not None:
        value = along_channels(scale, NHWC) * value + along_channels(shift, NHWC)
    value = activate(value, act_param, ACT)
    if RECORD:
        is_nan = value != value
        # Equal are values of the result's dtype, as in stock PyTorch, which writes them before it compares.
        value = value.to(y.dtype.element_ty).to(tl.float32)
        takes = (value > best) | is_nan
        number = along_pixels((h - top) * KW + w - left, NHWC)
        best, taken = tl.where(takes, value, best), tl.where(takes, number, taken)
    else:  # the greatest is the same, rounded before or after
        best = tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)
    return best, taken


@triton.jit(do_not_specialize=["H", "W", "OH", "OW"])
def join_pool_fwd_kernel(
    y,
    norm,
    out,
    taken,
    act_param,
    H,
    W,
    OH,
    OW,
    C,
    y_pitch,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    ACT: tl.constexpr,
    NHWC: tl.constexpr,
    UNROLL: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BC: tl.constexpr,
):
    image, oh, ow, channels = tile_place(OH, OW, C, BH, BW, BC)
    top, left = oh * SH - PH, ow * SW - PW
    scale, shift = None, None
    if norm is not None:
        scale, shift = load_row(norm, 2, channels, C, 1.0), load_row(norm, 3, channels, C, 0.0)
    # The first position in the image, which stays where nothing is greater than minus infinity.
    first = along_pixels(tl.maximum(-top, 0) * KW + tl.maximum(-left, 0), NHWC)
    number = first + along_channels(tl.zeros((BC,), tl.int32), NHWC)
    best = tl.full(number.shape, float("-inf"), tl.float32)
    if UNROLL:
        for position in tl.static_range(KH * KW):
            best, number = take_larger(
                best, number, position, y, scale, shift, act_param, image, top, left, H, W, channels, C, y_pitch,
                KW, ACT, NHWC, taken is not None,
            )  # fmt: skip
    else:
        for position in range(KH * KW):
            best, number = take_larger(
                best, number, position, y, scale, shift, act_param, image, top, left, H, W, channels, C, y_pitch,
                KW, ACT, NHWC, taken is not None,
            )  # fmt: skip
    inside = in_image(oh, ow, OH, OW, channels, C, NHWC)
    at = place_pointers(out, image, oh, ow, OH, OW, channels, C, NHWC)
    tl.store(at, best.to(out.dtype.element_ty), mask=inside)
    if taken is not None:
        at = place_pointers(taken, image, oh, ow, OH, OW, channels, C, NHWC)
        tl.store(at, number.to(tl.uint8), mask=inside)


def join_pool(
    y: Tensor,
    norm: Tensor | None,
    act: int,
    act_param: float,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil: bool,
    record: bool,
) -> tuple[Tensor, Tensor]:
    """See :mod:`fusedres.ops.join_pool`."""
    layout = layout_of("join_pool", "y", y)
    n, channels, h, w = y.shape
    size = pooled_size((h, w), PoolWindow(tuple(kernel), tuple(stride), tuple(padding), ceil))
    out = torch.empty((n, channels, *size), dtype=y.dtype, device=y.device, memory_format=_format(layout))
    taken = torch.empty_like(out, dtype=torch.uint8) if record else None
    empty = y.new_empty(0, dtype=torch.uint8) if taken is None else taken
    if y.numel() == 0 or out.numel() == 0:
        return out, empty
    args = {"y": y, "norm": norm, "out": out, "taken": taken, "act_param": float(act_param)}
    args |= {"H": h, "W": w, "OH": size[0], "OW": size[1], "C": channels, "y_pitch": layout.pitch}
    grid, tile = _tiles(n, channels, size, layout)
    meta = _window(kernel, stride, padding) | {"ACT": act, "NHWC": layout.channels_last, **tile}
    meta["UNROLL"] = kernel[0] * kernel[1] <= _UNROLLED
    launch(join_pool_fwd_kernel, grid, args, meta, warps=8, stages=1)
    return out, empty


def _format(layout: Layout) -> torch.memory_format:
    return torch.channels_last if layout.channels_last else torch.contiguous_format


def _window(kernel: list[int], stride: list[int], padding: list[int]) -> dict[str, int]:
    return dict(zip(("KH", "KW", "SH", "SW", "PH", "PW"), (*kernel, *stride, *padding)))


def _tiles(n: int, channels: int, size: tuple[int, int], layout: Layout) -> tuple[tuple[int], dict[str, int]]:
    """The grid over ``[n, channels, *size]`` and a program's tile, wide where pixels are neighbours, else square."""
    pixels, columns = tile_of(_ELEMENTS, channels, layout.channels_last, _WIDEST)
    across = 1 << pixels.bit_length() // 2 if layout.channels_last else 64
    down = pixels // across
    grid = (n * cdiv(size[0], down) * cdiv(size[1], across) * cdiv(channels, columns),)
    return grid, {"BH": down, "BW": across, "BC": columns}


# ---------------------------------------------------------------------------------------------------------------------
# Backward
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def taken_gradient(position, inside, grad, taken, image, oh, ow, OH, OW, channels, C, NHWC: tl.constexpr):
    """The gradient of these windows where they took this position, else 0."""
    inside &= in_image(oh, ow, OH, OW, channels, C, NHWC)
    value = tl.load(place_pointers(grad, image, oh, ow, OH, OW, channels, C, NHWC), mask=inside, other=0.0)
    number = tl.load(place_pointers(taken, image, oh, ow, OH, OW, channels, C, NHWC), mask=inside, other=0)
    return tl.where(number.to(tl.int32) == position, value.to(tl.float32), 0.0)


@triton.jit
def store_gathered(
    pixel,
    grad,
    taken,
    grad_y,
    image,
    down,
    across,
    H,
    W,
    OH,
    OW,
    channels,
    C,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    NHWC: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Writes the gradient of one pixel of every block: the sum over the windows that begin in it or before it."""
    DOWN: tl.constexpr = (KH - 1) // SH
    ACROSS: tl.constexpr = (KW - 1) // SW
    WINDOWS: tl.constexpr = (DOWN + 1) * (ACROSS + 1)
    PIXELS: tl.constexpr = down.shape[0]
    CHANNELS: tl.constexpr = channels.shape[0]
    total = tl.zeros((PIXELS, CHANNELS) if NHWC else (CHANNELS, PIXELS), tl.float32)
    if UNROLL:
        for window in tl.static_range(WINDOWS):
            up, back = DOWN - window // (ACROSS + 1), ACROSS - window % (ACROSS + 1)
            kh, kw = pixel // SW + up * SH, pixel % SW + back * SW
            if kh < KH and kw < KW:
                total += taken_gradient(
                    kh * KW + kw, True, grad, taken, image, down - up, across - back, OH, OW, channels, C, NHWC
                )
    else:
        for window in range(WINDOWS):
            up, back = DOWN - window // (ACROSS + 1), ACROSS - window % (ACROSS + 1)
            kh, kw = pixel // SW + up * SH, pixel % SW + back * SW
            inside = (kh < KH) & (kw < KW)
            total += taken_gradient(
                kh * KW + kw, inside, grad, taken, image, down - up, across - back, OH, OW, channels, C, NHWC
            )
    h, w = down * SH + pixel // SW - PH, across * SW + pixel % SW - PW
    inside = in_image(h, w, H, W, channels, C, NHWC)
    at = place_pointers(grad_y, image, h, w, H, W, channels, C, NHWC)
    tl.store(at, total.to(grad_y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["H", "W", "OH", "OW"])
def join_pool_bwd_kernel(
    grad,
    taken,
    grad_y,
    H,
    W,
    OH,
    OW,
    C,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    NHWC: tl.constexpr,
    UNROLL: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BC: tl.constexpr,
):
    """A tile is of blocks of the padded image, each of a stride's pixels, in which the same windows begin.

    So the number of a pixel in a window is the same for the whole tile.
    """
    image, down, across, channels = tile_place(tl.cdiv(H + PH, SH), tl.cdiv(W + PW, SW), C, BH, BW, BC)
    if UNROLL:
        for pixel in tl.static_range(SH * SW):
            store_gathered(
                pixel, grad, taken, grad_y, image, down, across, H, W, OH, OW, channels, C,
                KH, KW, SH, SW, PH, PW, NHWC, UNROLL,
            )  # fmt: skip
    else:
        for pixel in range(SH * SW):
            store_gathered(
                pixel, grad, taken, grad_y, image, down, across, H, W, OH, OW, channels, C,
                KH, KW, SH, SW, PH, PW, NHWC, UNROLL,
            )  # fmt: skip


def join_pool_backward(
    grad: Tensor, taken: Tensor, y: Tensor, kernel: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    """See :data:`fusedres.ops.join_pool.JOIN_POOL_BACKWARD`."""
    layout = layout_of("join_pool_backward", "y", y)
    _check(grad, taken, y, layout)
    n, channels, h, w = y.shape
    grad_y = torch.empty(y.shape, dtype=y.dtype, device=y.device, memory_format=_format(layout))
    if grad_y.numel() == 0:
        return grad_y
    args = {"grad": grad, "taken": taken, "grad_y": grad_y}
    args |= {"H": h, "W": w, "OH": grad.shape[2], "OW": grad.shape[3], "C": channels}
    blocks = cdiv(h + padding[0], stride[0]), cdiv(w + padding[1], stride[1])
    grid, tile = _tiles(n, channels, blocks, layout)
    meta = _window(kernel, stride, padding) | {"NHWC": layout.channels_last, **tile}
    meta["UNROLL"] = math.prod(cdiv(k, s) * s for k, s in zip(kernel, stride)) <= _UNROLLED
    launch(join_pool_bwd_kernel, grid, args, meta, warps=8, stages=1)
    return grad_y


def _check(grad: Tensor, taken: Tensor, y: Tensor, layout: Layout) -> None:
    for name, x, dtype in (("grad", grad, y.dtype), ("taken", taken, torch.uint8)):
        dense = x.is_contiguous(memory_format=_format(layout))
        if x.dtype != dtype or x.device != y.device or x.shape != (*y.shape[:2], *grad.shape[2:]) or not dense:
            raise ValueError(
                f"join_pool_backward: {name} of shape {tuple(x.shape)} and strides {x.stride()}, {x.dtype} on "
                f"{x.device} does not fit y of shape {tuple(y.shape)} and strides {y.stride()}, {y.dtype} on {y.device}"
            )


register("join_pool", join_pool)
register("join_pool_backward", join_pool_backward)
