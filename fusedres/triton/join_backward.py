"""The join's backward in Triton: a reduction with partial sums per program, and an elementwise pass.

Must move, at least: first pass, the operands once (and the gradient that it masks, and the result with ``emit``, where
those are wanted); second pass, the operands once and
each gradient once. About 10 FLOPs per element each, and those of the activation.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .join import dense_like, dropout_arguments, join_argument, operand_layouts
from .launch import Layout, cdiv, launch, layout_of, multiprocessors, register, splits_of, tile_of
from .tiles import activate, activation_gradient, keep_factor, load_gain, load_row, pointers

__all__ = ["join_backward_apply", "join_backward_mask", "join_backward_reduce", "sum_partials"]

_REDUCE_ELEMENTS = 2048  # of a tile: three accumulators per position and three operands
_APPLY_ELEMENTS = 4096
_PROGRAMS = 4  # per multiprocessor
_FAN_IN = 256


@triton.jit
def masked_gradient(grad, z, act_param, keep, ACT: tl.constexpr):
    """``act'(z) * grad * keep``; zero where nothing was kept, whatever the gradient."""
    g = activation_gradient(z, grad, act_param, ACT)
    if keep is not None:
        g = tl.where(keep == 0.0, 0.0, g * keep)
    return g


# ---------------------------------------------------------------------------------------------------------------------
# First pass
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["seed", "threshold", "rows", "piece"])
def join_bwd_reduce_kernel(
    grad,
    y,
    norm,
    gain,
    residual,
    res_norm,
    masked,
    emitted,
    partials,
    seed,
    threshold,
    keep_scale,
    act_param,
    rows,
    piece,
    C,
    HW,
    grad_pitch,
    y_pitch,
    residual_pitch,
    ACT: tl.constexpr,
    NHWC: tl.constexpr,
    QUADS: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Partials ``[group, split, 3, C]`` of ``rows`` pixels per group, ``piece`` of them per split."""
    splits = tl.cdiv(rows, piece)
    group = tl.program_id(0) // splits
    start = (tl.program_id(0) % splits) * piece
    count = tl.minimum(rows - start, piece)
    columns = tl.program_id(1) * BC + tl.arange(0, BC)
    first = group.to(tl.int64) * rows + start
    mean, rstd = load_row(norm, 0, columns, C, 0.0), load_row(norm, 1, columns, C, 1.0)
    scale, shift = load_row(norm, 2, columns, C, 1.0), load_row(norm, 3, columns, C, 0.0)
    res_mean, res_rstd = load_row(res_norm, 0, columns, C, 0.0), load_row(res_norm, 1, columns, C, 1.0)
    res_scale, res_shift = load_row(res_norm, 2, columns, C, 1.0), load_row(res_norm, 3, columns, C, 0.0)
    total = tl.zeros((BM, BC), tl.float32)
    total_y = tl.zeros((BM, BC), tl.float32)
    total_r = tl.zeros((BM, BC), tl.float32)
    for step in tl.range(0, tl.cdiv(count, BM), num_stages=STAGES):
        row = first + step * BM
        inside = (step * BM + tl.arange(0, BM) < count)[:, None] & (columns < C)[None, :]
        value = tl.load(pointers(y, row, BM, columns, y_pitch, C, HW, NHWC), mask=inside, other=0.0).to(tl.float32)
        at = pointers(grad, row, BM, columns, grad_pitch, C, HW, NHWC)
        incoming = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        side = None
        if residual is not None:
            at = pointers(residual, row, BM, columns, residual_pitch, C, HW, NHWC)
            side = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        factor = None
        if gain is not None:
            factor = load_gain(gain, row, BM, columns, C, HW, inside)
        keep = None
        if seed is not None:
            keep = keep_factor(seed, threshold, keep_scale, row, BM, columns, C, QUADS)
        z = join_argument(value, side, scale, shift, factor, res_scale, res_shift)
        # Outside the loaded gradient is 0, but an activation's gradient of 0 may still be NaN times 0.
        g = tl.where(inside, masked_gradient(incoming, z, act_param, keep, ACT), 0.0)
        total += g
        total_y += g * ((value - mean[None, :]) * rstd[None, :])
        if res_norm is not None:
            total_r += g * ((side - res_mean[None, :]) * res_rstd[None, :])
        if masked is not None:
            at = pointers(masked, row, BM, columns, C, C, HW, NHWC)
            tl.store(at, g.to(masked.dtype.element_ty), mask=inside)
        if emitted is not None:
            result = activate(z, act_param, ACT)
            if keep is not None:
                result *= keep
            at = pointers(emitted, row, BM, columns, C, C, HW, NHWC)
            tl.store(at, result.to(emitted.dtype.element_ty), mask=inside)
    at = partials + tl.program_id(0).to(tl.int64) * 3 * C + columns
    tl.store(at, tl.sum(total, 0), mask=columns < C)
    tl.store(at + C, tl.sum(total_y, 0), mask=columns < C)
    tl.store(at + 2 * C, tl.sum(total_r, 0), mask=columns < C)


@triton.jit(do_not_specialize=["splits", "fan_in", "split_stride", "row_stride"])
def sum_partials_kernel(
    partials, out, splits, fan_in, length, C, split_stride, row_stride, BS: tl.constexpr, BC: tl.constexpr
):
    """Sums ``fan_in`` partials ``[group, split, row, C]``, ``length`` numbers each, in an order that is fixed.

    The result lies ``split_stride`` apart for every ``group * splits' + split'``, its rows ``row_stride``.
    """
    merged = tl.cdiv(splits, fan_in)
    group = tl.program_id(0) // merged
    begin = (tl.program_id(0) % merged) * fan_in
    end = tl.minimum(begin + fan_in, splits)
    columns = tl.program_id(1) * BC + tl.arange(0, BC)
    base = partials + group.to(tl.int64) * splits * length
    total = tl.zeros((BS, BC), tl.float32)
    for s in range(begin, end, BS):
        index = s + tl.arange(0, BS)
        inside = (index < end)[:, None] & (columns < length)[None, :]
        total += tl.load(base + (index * length)[:, None] + columns[None, :], mask=inside, other=0.0)
    at = out + tl.program_id(0).to(tl.int64) * split_stride + (columns // C) * row_stride + columns % C
    tl.store(at, tl.sum(total, 0), mask=columns < length)


def sum_partials(partials: Tensor) -> Tensor:
    """Partials ``[groups, splits, rows, C]`` summed over the splits: ``[rows, groups, C]``."""
    groups, splits, rows, channels = partials.shape
    out = partials.new_empty((rows, groups, channels))
    while True:
        last = splits <= _FAN_IN
        fan_in = splits if last else min(_FAN_IN, max(16, cdiv(splits, _FAN_IN)))
        merged = cdiv(splits, fan_in)
        result = out if last else partials.new_empty((groups, merged, rows, channels))
        args = {"partials": partials, "out": result, "splits": splits, "fan_in": fan_in, "length": rows * channels}
        args |= {"C": channels, "split_stride": channels if last else rows * channels}
        args |= {"row_stride": groups * channels if last else channels}
        grid = (groups * merged, cdiv(rows * channels, 32))
        launch(sum_partials_kernel, grid, args, {"BS": 32, "BC": 32}, warps=4, stages=1)
        if last:
            return out
        partials, splits = result, merged


def join_backward_reduce(
    grad: Tensor,
    y: Tensor,
    norm: Tensor | None,
    residual: Tensor | None,
    res_norm: Tensor | None,
    act: int,
    act_param: float,
    emit: bool,
    gain: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :mod:`fusedres.ops.join_backward`."""
    operands = {"y": y, "grad": grad, "residual": residual}
    rows = {"norm": norm, "res_norm": None if residual is None else res_norm, "gain": gain}
    return _reduced("join_backward_reduce", operands, rows, act, act_param, None, emit, dropout, seed)


def join_backward_mask(
    grad: Tensor,
    y: Tensor,
    norm: Tensor | None,
    residual: Tensor | None,
    res_norm: Tensor | None,
    act: int,
    act_param: float,
    emit: bool,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :data:`fusedres.ops.join_backward.JOIN_BACKWARD_MASK`."""
    op, operands = "join_backward_mask", {"y": y, "grad": grad, "residual": residual}
    rows = {"norm": norm, "res_norm": None if residual is None else res_norm, "gain": None}
    masked = dense_like(y, layout_of(op, "y", y))
    return masked, *_reduced(op, operands, rows, act, act_param, masked, emit, dropout, seed)


def _reduced(
    op: str,
    operands: dict[str, Tensor | None],
    rows: dict[str, Tensor | None],
    act: int,
    act_param: float,
    masked: Tensor | None,
    emit: bool,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The launch that both ops share: the sums and what is emitted; the masked gradient goes to ``masked``."""
    y, gain = operands["y"], rows["gain"]
    layout, pitches = operand_layouts(op, operands)
    n, channels, h, w = y.shape
    groups = 1 if gain is None else n
    emitted = dense_like(y, layout) if emit else None
    empty = y.new_empty(0) if emitted is None else emitted
    if y.numel() == 0:
        sums = y.new_zeros((3, groups, channels), dtype=torch.float32)
        return (sums[:, 0] if gain is None else sums), empty
    block, columns = tile_of(_REDUCE_ELEMENTS, channels, layout.channels_last, widest=128)
    pixels = y.numel() // channels // groups
    tiles = cdiv(channels, columns)
    splits, piece = splits_of(pixels, block, tiles * groups, _PROGRAMS * multiprocessors(y))
    partials = y.new_empty((groups, splits, 3, channels), dtype=torch.float32)
    args = {**operands, **rows, "masked": masked, "emitted": emitted, "partials": partials}
    args |= {**dropout_arguments(dropout, seed, y), "act_param": float(act_param)}
    args |= {"rows": pixels, "piece": piece, "C": channels, "HW": h * w, **pitches}
    meta = _meta(act, layout, channels, block, columns) | {"STAGES": 3}
    launch(join_bwd_reduce_kernel, (groups * splits, tiles), args, meta, warps=8)
    sums = sum_partials(partials)
    return (sums[:, 0] if gain is None else sums), empty


def _meta(act: int, layout: Layout, channels: int, block: int, columns: int) -> dict[str, Any]:
    quads = channels % 4 == 0 and columns % 4 == 0
    return {"ACT": act, "NHWC": layout.channels_last, "QUADS": quads, "BM": block, "BC": columns}


# ---------------------------------------------------------------------------------------------------------------------
# Second pass
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def norm_gradient(
    u, x, norm, sums, SUM: tl.constexpr, DOT: tl.constexpr, columns, C, per_count, TRAINING: tl.constexpr
):
    """The gradient of a norm's input from that of its output; ``sums`` are read only with batch statistics."""
    if norm is not None:
        if TRAINING:
            mean, rstd = load_row(norm, 0, columns, C, 0.0), load_row(norm, 1, columns, C, 1.0)
            level = load_row(sums, SUM, columns, C, 0.0) * per_count
            slope = load_row(sums, DOT, columns, C, 0.0) * per_count
            u = u - level[None, :] - ((x - mean[None, :]) * rstd[None, :]) * slope[None, :]
        u = load_row(norm, 2, columns, C, 1.0)[None, :] * u
    return u


@triton.jit(do_not_specialize=["seed", "threshold", "pixels"])
def join_bwd_apply_kernel(
    grad,
    y,
    norm,
    gain,
    residual,
    res_norm,
    sums,
    offset,
    addend,
    grad_y,
    grad_residual,
    seed,
    threshold,
    keep_scale,
    act_param,
    per_count,
    pixels,
    C,
    HW,
    grad_pitch,
    y_pitch,
    residual_pitch,
    addend_pitch,
    grad_y_pitch,
    TRAINING: tl.constexpr,
    RES_TRAINING: tl.constexpr,
    RES_SUM: tl.constexpr,
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
    at = pointers(grad, row, BM, columns, grad_pitch, C, HW, NHWC)
    incoming = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    side = None
    if residual is not None:
        at = pointers(residual, row, BM, columns, residual_pitch, C, HW, NHWC)
        side = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    factor = None
    if gain is not None:
        factor = load_gain(gain, row, BM, columns, C, HW, inside)
    keep = None
    if seed is not None:
        keep = keep_factor(seed, threshold, keep_scale, row, BM, columns, C, QUADS)
    scale, shift = load_row(norm, 2, columns, C, 1.0), load_row(norm, 3, columns, C, 0.0)
    res_scale, res_shift = load_row(res_norm, 2, columns, C, 1.0), load_row(res_norm, 3, columns, C, 0.0)
    z = join_argument(value, side, scale, shift, factor, res_scale, res_shift)
    g = masked_gradient(incoming, z, act_param, keep, ACT)
    u = g
    if gain is not None:
        u = factor * g
    if offset is not None:
        u += load_gain(offset, row, BM, columns, C, HW, inside)
    result = norm_gradient(u, value, norm, sums, 0, 1, columns, C, per_count, TRAINING)
    if addend is not None:
        at = pointers(addend, row, BM, columns, addend_pitch, C, HW, NHWC)
        result += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    at = pointers(grad_y, row, BM, columns, grad_y_pitch, C, HW, NHWC)
    tl.store(at, result.to(grad_y.dtype.element_ty), mask=inside)
    if grad_residual is not None:
        at = pointers(grad_residual, row, BM, columns, C, C, HW, NHWC)
        result = norm_gradient(g, side, res_norm, sums, RES_SUM, 2, columns, C, per_count, RES_TRAINING)
        tl.store(at, result.to(grad_residual.dtype.element_ty), mask=inside)


def join_backward_apply(
    grad: Tensor,
    y: Tensor,
    norm: Tensor | None,
    residual: Tensor | None,
    res_norm: Tensor | None,
    act: int,
    act_param: float,
    sums: Tensor | None,
    count: float,
    training: bool,
    res_training: bool,
    need_residual: bool,
    gain: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    offset: Tensor | None = None,
    addend: Tensor | None = None,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :mod:`fusedres.ops.join_backward`."""
    operands = {"y": y, "grad": grad, "residual": residual, "addend": addend}
    _, channels, h, w = y.shape
    layout = layout_of("join_backward_apply", "y", y)
    grad_y = dense_like(y, layout) if into is None else into
    _, pitches = operand_layouts("join_backward_apply", operands | {"grad_y": grad_y})
    grad_residual = dense_like(y, layout) if residual is not None and need_residual else None
    results = (
        grad_y if into is None else y.new_empty(0),
        y.new_empty(0) if grad_residual is None else grad_residual,
    )
    if y.numel() == 0:
        return results
    block, columns = tile_of(_APPLY_ELEMENTS, channels, layout.channels_last)
    pixels = y.numel() // channels
    args = {**operands, "norm": norm, "gain": gain, "res_norm": None if residual is None else res_norm}
    args |= {"sums": None if sums is None else sums.contiguous(), "offset": offset, "grad_y": grad_y}
    args |= {"grad_residual": grad_residual, **dropout_arguments(dropout, seed, y), "act_param": float(act_param)}
    args |= {"per_count": 1.0 / count, "pixels": pixels, "C": channels, "HW": h * w, **pitches}
    meta = _meta(act, layout, channels, block, columns) | {"TRAINING": training, "RES_TRAINING": res_training}
    meta["RES_SUM"] = 3 if sums is not None and len(sums) > 3 else 0
    launch(join_bwd_apply_kernel, (cdiv(pixels, block) * cdiv(channels, columns),), args, meta, warps=8, stages=1)
    return results


register("join_backward_reduce", join_backward_reduce)
register("join_backward_mask", join_backward_mask)
register("join_backward_apply", join_backward_apply)
