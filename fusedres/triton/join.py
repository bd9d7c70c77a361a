"""The join in Triton: one tile of pixels and channels per program, everything read once.

Must move, at least: the operands once and the result once. 2 FLOPs per element for each affine, 1 for the sum, those
of the activation.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Layout, cdiv, common_layout, launch, register, seed_argument, tile_of
from .tiles import activate, keep_factor, load_gain, load_row, pointers

__all__ = ["dropout_arguments", "join", "join_argument"]

_ELEMENTS = 8192  # of a tile: per operand four 16-byte loads of each of 256 threads are in flight


@triton.jit
def join_argument(y, residual, scale, shift, gain, res_scale, res_shift):
    """``gain * (scale * y + shift) + res_scale * residual + res_shift`` on tiles; gain and residual may be ``None``."""
    z = scale[None, :] * y + shift[None, :]
    if gain is not None:
        z = gain * z
    if residual is not None:
        z += res_scale[None, :] * residual + res_shift[None, :]
    return z


@triton.jit(do_not_specialize=["seed", "threshold", "pixels"])
def join_fwd_kernel(
    y,
    norm,
    gain,
    residual,
    res_norm,
    out,
    seed,
    threshold,
    keep_scale,
    act_param,
    pixels,
    C,
    HW,
    y_pitch,
    residual_pitch,
    ACT: tl.constexpr,
    NHWC: tl.constexpr,
    QUADS: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    tiles = tl.cdiv(C, BC)
    row = (tl.program_id(0) // tiles).to(tl.int64) * BM
    columns = (tl.program_id(0) % tiles) * BC + tl.arange(0, BC)
    inside = (row + tl.arange(0, BM) < pixels)[:, None] & (columns < C)[None, :]
    value = tl.load(pointers(y, row, BM, columns, y_pitch, C, HW, NHWC), mask=inside, other=0.0).to(tl.float32)
    side = None
    if residual is not None:
        at = pointers(residual, row, BM, columns, residual_pitch, C, HW, NHWC)
        side = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    factor = None
    if gain is not None:
        factor = load_gain(gain, row, BM, columns, C, HW, inside)
    scale, shift = load_row(norm, 2, columns, C, 1.0), load_row(norm, 3, columns, C, 0.0)
    res_scale, res_shift = load_row(res_norm, 2, columns, C, 1.0), load_row(res_norm, 3, columns, C, 0.0)
    result = activate(join_argument(value, side, scale, shift, factor, res_scale, res_shift), act_param, ACT)
    if seed is not None:
        result *= keep_factor(seed, threshold, keep_scale, row, BM, columns, C, QUADS)
    at = pointers(out, row, BM, columns, C, C, HW, NHWC)
    tl.store(at, result.to(out.dtype.element_ty), mask=inside)


def dropout_arguments(dropout: float, seed: Tensor | None, y: Tensor) -> dict[str, Any]:
    """The arguments of a kernel that :func:`~fusedres.triton.tiles.keep_factor` takes."""
    scale = 1.0 / (1.0 - dropout) if dropout < 1 else 0.0
    return {"seed": seed_argument(seed, y), "threshold": int(dropout * 2**32), "keep_scale": scale}


def operand_layouts(op: str, tensors: dict[str, Tensor | None]) -> tuple[Layout, dict[str, Any]]:
    """The first tensor's layout, and every tensor's pitch as a kernel takes it."""
    layouts = common_layout(op, tensors)
    pitches = {f"{name}_pitch": layouts[name].pitch if name in layouts else None for name in tensors}
    return next(iter(layouts.values())), pitches


def join(
    y: Tensor,
    norm: Tensor | None,
    residual: Tensor | None,
    res_norm: Tensor | None,
    act: int,
    act_param: float,
    gain: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """See :mod:`fusedres.ops.join`."""
    layout, pitches = operand_layouts("join", {"y": y, "residual": residual})
    _, channels, h, w = y.shape
    out = dense_like(y, layout)
    if y.numel() == 0:
        return out
    block, columns = tile_of(_ELEMENTS, channels, layout.channels_last)
    pixels = y.numel() // channels
    args = {"y": y, "norm": norm, "gain": gain, "residual": residual, "res_norm": res_norm, "out": out}
    args |= dropout_arguments(dropout, seed, y)
    args |= {"act_param": float(act_param), "pixels": pixels, "C": channels, "HW": h * w, **pitches}
    meta = {"ACT": act, "NHWC": layout.channels_last, "QUADS": channels % 4 == 0 and columns % 4 == 0}
    meta |= {"BM": block, "BC": columns}
    launch(join_fwd_kernel, (cdiv(pixels, block) * cdiv(channels, columns),), args, meta, warps=8, stages=1)
    return out


def dense_like(x: Tensor, layout: Layout) -> Tensor:
    """An uninitialised dense tensor of the shape and the order of ``x``, which may be a slice."""
    if layout.pitch == x.shape[1] or not layout.channels_last:
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=torch.channels_last)


register("join", join)
