"""Batch statistics in Triton: one pass for partials, one that merges them.

A program takes a piece of the rows and some channels. Every position of its tile keeps a running mean and M2 (Welford
1962, "Note on a Method for Calculating Corrected Sums of Squares and Products"), so nothing crosses threads until the
end; there the positions are merged by Chan's formula, and the pieces by :func:`merge_statistics`. The order of every
sum is fixed.

Must move, at least: the tensor once (twice with ``into``). 5 FLOPs per element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, common_layout, launch, multiprocessors, register, splits_of, tile_of
from .tiles import pointers

__all__ = ["bn_stats", "merge_statistics", "statistics_of_nothing"]

_ELEMENTS = 4096  # of a tile: two accumulators per position, 32 registers of 256 threads each
_PROGRAMS = 4  # per multiprocessor
_FAN_IN = 256  # partials that one program of the merge takes


@triton.jit(do_not_specialize=["rows", "piece"])
def bn_stats_kernel(
    x,
    into,
    partials,
    pivots,
    rows,
    piece,
    C,
    HW,
    x_pitch,
    into_pitch,
    NHWC: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Partials ``[group, split, (mean, M2), C]`` of ``rows`` pixels per group, ``piece`` of them per split.

    Means are less the group's pivot, ``[group, C]``.
    """
    splits = tl.cdiv(rows, piece)
    group = tl.program_id(0) // splits
    start = (tl.program_id(0) % splits) * piece
    count = tl.minimum(rows - start, piece)
    columns = tl.program_id(1) * BC + tl.arange(0, BC)
    first = group.to(tl.int64) * rows + start
    # Deviations from the mean of the group's first pixels: then no sum loses digits to a mean that is large, and a mean
    # that is small loses none to a pivot that is large.
    few = tl.minimum(rows, BM)
    at = pointers(x, group.to(tl.int64) * rows, BM, columns, x_pitch, C, HW, NHWC)
    inside = (tl.arange(0, BM) < few)[:, None] & (columns < C)[None, :]
    pivot = tl.sum(tl.load(at, mask=inside, other=0.0).to(tl.float32), 0) / few.to(tl.float32)
    if start == 0:
        tl.store(pivots + group * C + columns, pivot, mask=columns < C)
    mean = tl.zeros((BM, BC), tl.float32)
    m2 = tl.zeros((BM, BC), tl.float32)
    seen = 0.0
    for step in tl.range(0, tl.cdiv(count, BM), num_stages=STAGES):
        inside = (step * BM + tl.arange(0, BM) < count)[:, None] & (columns < C)[None, :]
        row = first + step * BM
        raw = tl.load(pointers(x, row, BM, columns, x_pitch, C, HW, NHWC), mask=inside, other=0.0)
        if into is not None:
            tl.store(pointers(into, row, BM, columns, into_pitch, C, HW, NHWC), raw, mask=inside)
        value = raw.to(tl.float32) - pivot[None, :]
        # A position that is inside now has been inside in every step before.
        delta = tl.where(inside, value - mean, 0.0)
        seen += 1.0
        mean += delta * (1.0 / seen)
        m2 += delta * (value - mean)
    counts = tl.maximum(count - tl.arange(0, BM) + BM - 1, 0) // BM
    weight = counts.to(tl.float32)[:, None]
    total = tl.sum(weight * mean, 0) / count.to(tl.float32)
    between = mean - total[None, :]
    out = partials + tl.program_id(0).to(tl.int64) * 2 * C + columns
    tl.store(out, total, mask=columns < C)
    tl.store(out + C, tl.sum(m2 + weight * between * between, 0), mask=columns < C)


@triton.jit(do_not_specialize=["rows", "piece", "fan_in", "mean_stride", "split_stride"])
def bn_merge_kernel(
    partials,
    pivots,
    out,
    rows,
    piece,
    C,
    fan_in,
    mean_stride,
    split_stride,
    BS: tl.constexpr,
    BC: tl.constexpr,
):
    """Merges ``fan_in`` partials ``[group, split, 2, C]``, each of ``piece`` of a group's ``rows`` values, into one.

    The result's mean lies at ``group * splits' + split'`` times ``split_stride``, its M2 ``mean_stride`` behind.
    """
    splits = tl.cdiv(rows, piece)
    merged = tl.cdiv(splits, fan_in)
    group = tl.program_id(0) // merged
    begin = (tl.program_id(0) % merged) * fan_in
    end = tl.minimum(begin + fan_in, splits)
    count = (tl.minimum(end * piece, rows) - begin * piece).to(tl.float32)
    columns = tl.program_id(1) * BC + tl.arange(0, BC)
    base = partials + group.to(tl.int64) * splits * 2 * C
    mean = tl.zeros((BS, BC), tl.float32)
    for s in range(begin, end, BS):
        index = s + tl.arange(0, BS)
        inside = (index < end)[:, None] & (columns < C)[None, :]
        weight = tl.maximum(tl.minimum(piece, rows - index * piece), 0).to(tl.float32)[:, None]
        part = tl.load(base + (index * 2 * C)[:, None] + columns[None, :], mask=inside, other=0.0)
        mean += part * (weight / count)
    mean = tl.sum(mean, 0)
    m2 = tl.zeros((BS, BC), tl.float32)
    for s in range(begin, end, BS):
        index = s + tl.arange(0, BS)
        inside = (index < end)[:, None] & (columns < C)[None, :]
        weight = tl.maximum(tl.minimum(piece, rows - index * piece), 0).to(tl.float32)[:, None]
        at = base + (index * 2 * C)[:, None] + columns[None, :]
        between = tl.load(at, mask=inside, other=0.0) - mean[None, :]
        part = tl.load(at + C, mask=inside, other=0.0)
        m2 += tl.where(inside, part + weight * between * between, 0.0)
    at = out + tl.program_id(0).to(tl.int64) * split_stride + columns
    if pivots is not None:
        mean += tl.load(pivots + group * C + columns, mask=columns < C, other=0.0)
    tl.store(at, mean, mask=columns < C)
    tl.store(at + mean_stride, tl.sum(m2, 0), mask=columns < C)


def merge_statistics(partials: Tensor, rows: int, piece: int, pivots: Tensor | None = None) -> Tensor:
    """Partials ``[groups, splits, 2, C]``, each of ``piece`` of ``rows`` values (the last of what is left), merged.

    Args:
        pivots: ``[groups, C]``, what all means of a group are less by, if anything.

    Returns:
        ``[2, groups, C]``, the means and M2 of every group.
    """
    groups, splits, _, channels = partials.shape
    out = partials.new_empty((2, groups, channels))
    while True:
        last = splits <= _FAN_IN
        # Two levels for many partials: a single program per channel would read for longer than the first pass took.
        fan_in = splits if last else min(_FAN_IN, max(16, cdiv(splits, _FAN_IN)))
        merged = cdiv(splits, fan_in)
        result = out if last else partials.new_empty((groups, merged, 2, channels))
        args = {"partials": partials, "out": result, "rows": rows, "piece": piece, "C": channels, "fan_in": fan_in}
        args |= {"pivots": pivots if last else None}
        args |= {"mean_stride": groups * channels if last else channels, "split_stride": channels * (1 if last else 2)}
        grid = (groups * merged, cdiv(channels, 32))
        launch(bn_merge_kernel, grid, args, {"BS": 32, "BC": 32}, warps=4, stages=1)
        if last:
            return out
        partials, splits, piece = result, merged, piece * fan_in


def statistics_of_nothing(groups: int, x: Tensor) -> Tensor:
    """What an empty tensor has, ``[2, groups, C]``: a mean of NaN, as in stock, and no deviations."""
    stats = x.new_zeros((2, groups, x.shape[1]), dtype=torch.float32)
    stats[0] = torch.nan
    return stats


def bn_stats(x: Tensor, per_sample: bool = False, into: Tensor | None = None) -> Tensor:
    """See :mod:`fusedres.ops.bn_stats`."""
    layouts = common_layout("bn_stats", {"x": x, "into": into})
    n, channels, h, w = x.shape
    groups = n if per_sample else 1
    if x.numel() == 0:
        stats = statistics_of_nothing(groups, x)
        return stats if per_sample else stats[:, 0]
    layout = layouts["x"]
    block, columns = tile_of(_ELEMENTS, channels, layout.channels_last, widest=128)
    rows = x.numel() // channels // groups
    tiles = cdiv(channels, columns)
    splits, piece = splits_of(rows, block, tiles * groups, _PROGRAMS * multiprocessors(x))
    partials = x.new_empty((groups, splits, 2, channels), dtype=torch.float32)
    pivots = x.new_empty((groups, channels), dtype=torch.float32)
    args = {
        "x": x,
        "into": into,
        "partials": partials,
        "pivots": pivots,
        "rows": rows,
        "piece": piece,
        "C": channels,
        "HW": h * w,
    }
    args |= {"x_pitch": layout.pitch, "into_pitch": layouts["into"].pitch if into is not None else None}
    meta = {"NHWC": layout.channels_last, "BM": block, "BC": columns, "STAGES": 3}
    launch(bn_stats_kernel, (groups * splits, tiles), args, meta, warps=8)
    stats = merge_statistics(partials, rows, piece, pivots)
    return stats if per_sample else stats[:, 0]


register("bn_stats", bn_stats)
