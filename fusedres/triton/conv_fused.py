"""Convolutions in Triton with prologue and epilogue: an implicit GEMM over channels_last tensors.

Rows of the product are pixels of the result, columns its channels, and the sum runs over taps and input channels. The
prologue applies the pending affine and activation to a tile of the input on its way from shared memory to the tensor
cores. The epilogue either takes mean and M2 of the rounded tile, one partial per tile of rows, or applies the join.

Neighbouring programs share a tile of rows, so that the input is read from memory once and from L2 for every further
tile of columns; for taps the loop goes through all of them before the next channels, so that a region is read again
while it is in L2.

Operands come by asynchronous copies of 16 bytes, each with its address, or by tensor descriptor, one copy for a tile,
where they are rectangles: weights always, pixels where each is read once. Either way a tile waits in shared memory, and
the prologue applies in registers what is pending. A program computes one tile, or loops over as many as are its share
and loads the next one's operands while it writes this one's result. Which of them is for the tables to say;
``docs/kernels.md`` has what the compiler makes of each.

Grouped convolutions go to the CUDA kernels (``csrc/cuda/conv_grouped.h``).

Must move, at least: input, weights, residual and result once. ``2 N P Q K C R S`` FLOPs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.conv import ConvGeometry, groups_of, output_size
from ..ops.conv_fused import CONV_FUSED_FPROP, CONV_FUSED_JOIN
from .bn_stats import merge_statistics, statistics_of_nothing
from .launch import Layout, cdiv, described, launch, layout_of, multiprocessors, pixels_of, register, taps_of
from .precision import convolution_precision
from .tiles import activate, load_row
from .tuning import Problem, Tiles, configuration, is_heavy, pose, resident

__all__ = ["conv_fused_fprop", "conv_fused_join", "pending"]


@triton.jit
def pending(value, norm, columns, C, act_param, inside, ACT: tl.constexpr, PADS: tl.constexpr):
    """The prologue: ``act(scale * value + shift)`` of a tile ``[pixels, channels]``, zero where it is padding."""
    if norm is not None or ACT != 0:
        wide = value.to(tl.float32)
        if norm is not None:
            wide = load_row(norm, 2, columns, C, 1.0)[None, :] * wide + load_row(norm, 3, columns, C, 0.0)[None, :]
        wide = activate(wide, act_param, ACT)
        if PADS:
            wide = tl.where(inside[:, None], wide, 0.0)
        value = wide.to(value.dtype)
    return value


@triton.jit
def tiles_of_program(begin, tiles, PERSISTENT: tl.constexpr):
    """Where the tiles of a program end, and how far apart they are: every one behind ``begin``, or that one alone."""
    end = begin + 1
    stride = 1
    if PERSISTENT:
        end = tiles
        stride = tl.num_programs(0)
    return end, stride


@triton.jit(do_not_specialize=["M", "P", "Q", "H", "W"])
def conv_fprop_kernel(
    x,
    norm,
    weight,
    bias,
    out_norm,
    residual,
    res_norm,
    y,
    partials,
    act_param,
    out_act_param,
    M,
    K,
    C,
    H,
    W,
    P,
    Q,
    x_pitch,
    y_pitch,
    residual_pitch,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    ACT: tl.constexpr,
    OUT_ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PERSISTENT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    PADS: tl.constexpr = PAD_H > 0 or PAD_W > 0
    DENSE: tl.constexpr = R * S == 1 and STRIDE_H * STRIDE_W == 1 and not PADS
    tiles = tl.cdiv(K, BN)
    begin = tl.program_id(0)
    end, stride = tiles_of_program(begin, tl.cdiv(M, BM) * tiles, PERSISTENT)
    for tile in tl.range(begin, end, stride, flatten=PERSISTENT):
        first = (tile // tiles) * BM
        m = first + tl.arange(0, BM)
        column = (tile % tiles) * BN
        n = column + tl.arange(0, BN)
        if DENSE:
            pixel = tl.arange(0, BM)
            top = pixel
            left = pixel
            if not DESCRIPTORS:
                base = x + first.to(tl.int64) * x_pitch
        else:
            image = first // (P * Q)
            base = x + image.to(tl.int64) * H * W * x_pitch
            top = ((m // Q) % P) * STRIDE_H - PAD_H
            left = (m % Q) * STRIDE_W - PAD_W
            pixel = ((m // (P * Q) - image) * H + top) * W + left
        accumulator = tl.zeros((BM, BN), tl.float32)
        for step in range(R * S * tl.cdiv(C, BK)):
            tap = step % (R * S)
            channel = (step // (R * S)) * BK
            k = channel + tl.arange(0, BK)
            down = (tap // S) * DILATION_H
            right = (tap % S) * DILATION_W
            inside = m < M
            if PADS:
                inside &= (top + down >= 0) & (top + down < H) & (left + right >= 0) & (left + right < W)
            if DESCRIPTORS and DENSE:
                a = x.load([first, channel])
            else:
                at = base + ((pixel + down * W + right) * x_pitch)[:, None] + k[None, :]
                a = tl.load(at, mask=inside[:, None] & (k < C)[None, :], other=0.0)
            if DESCRIPTORS:
                b = weight.load([tap, column, channel]).reshape(BN, BK).T
            else:
                at = weight + (n * (R * S) + tap)[None, :] * C + k[:, None]
                b = tl.load(at, mask=(n < K)[None, :] & (k < C)[:, None], other=0.0)
            a = pending(a, norm, k, C, act_param, inside, ACT, PADS)
            accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)

        inside = (m < M)[:, None] & (n < K)[None, :]
        local = tl.arange(0, BM)
        result = accumulator
        if bias is not None:
            result += tl.load(bias + n, mask=n < K, other=0.0).to(tl.float32)[None, :]
        if out_norm is not None:
            result = load_row(out_norm, 2, n, K, 1.0)[None, :] * result + load_row(out_norm, 3, n, K, 0.0)[None, :]
        if residual is not None:
            at = residual + first.to(tl.int64) * residual_pitch + (local * residual_pitch)[:, None] + n[None, :]
            side = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            if res_norm is not None:
                side = load_row(res_norm, 2, n, K, 1.0)[None, :] * side + load_row(res_norm, 3, n, K, 0.0)[None, :]
            result += side
        result = activate(result, out_act_param, OUT_ACT).to(y.dtype.element_ty)
        at = y + first.to(tl.int64) * y_pitch + (local * y_pitch)[:, None] + n[None, :]
        tl.store(at, result, mask=inside)
        if partials is not None:
            count = tl.minimum(M - first, BM).to(tl.float32)
            value = result.to(tl.float32)
            mean = tl.sum(tl.where(inside, value, 0.0), 0) / count
            between = tl.where(inside, value - mean[None, :], 0.0)
            at = partials + (tile // tiles).to(tl.int64) * 2 * K + n
            tl.store(at, mean, mask=n < K)
            tl.store(at + K, tl.sum(between * between, 0), mask=n < K)


def channels_last_of(op: str, name: str, x: Tensor) -> Layout:
    """The layout of a tensor that must be channels_last, or a channel slice of one.

    Raises:
        ValueError: where it is neither.
    """
    layout = layout_of(op, name, x)
    if not layout.channels_last:
        raise ValueError(f"{op}: {name} of shape {tuple(x.shape)} must be channels_last")
    return layout


def check_operands(op: str, x: Tensor, weight: Tensor) -> None:
    """Raises ValueError where the weight does not fit the input."""
    if weight.dim() != 4 or weight.shape[1] != x.shape[1] or weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(
            f"{op}: weight of shape {tuple(weight.shape)}, {weight.dtype} on {weight.device} does not fit x of shape "
            f"{tuple(x.shape)}, {x.dtype} on {x.device}"
        )


def is_dense(problem: Problem) -> bool:
    """Whether pixels of the input are rows of the product, one each: ``DENSE`` of the kernels."""
    g = problem.geometry
    return problem.kernel_size == g.stride == (1, 1) and not any(g.padding)


def programs_of(problem: Problem, tiles: Tiles, count: int, x: Tensor) -> int:
    """How many programs compute so many tiles: one each, or as many as run at once."""
    return min(count, multiprocessors(x) * resident(problem, tiles)) if tiles.persistent else count


def geometry_meta(weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> dict[str, int]:
    """The geometry as the kernels take it."""
    names = ("R", "S", "STRIDE_H", "STRIDE_W", "PAD_H", "PAD_W", "DILATION_H", "DILATION_W")
    return dict(zip(names, (*weight.shape[2:], *stride, *padding, *dilation)))


def _run(
    op: str,
    x: Tensor,
    norm: Tensor | None,
    act: int,
    act_param: float,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    into: Tensor | None,
    want_stats: bool = False,
    tiles: Tiles | None = None,
    **epilogue: Any,
) -> tuple[Tensor, Tensor | None]:
    """The launch that both ops share: the result, and the merged statistics."""
    check_operands(op, x, weight)
    (n, channels, h, w), (filters, _, r, s) = x.shape, weight.shape
    size = output_size((h, w), (r, s), ConvGeometry(tuple(stride), tuple(padding), tuple(dilation), 1))
    shape = (n, filters, *size)
    if into is None:
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    else:
        y = into
        if y.shape != shape or y.dtype != x.dtype:
            raise ValueError(f"{op}: into of shape {tuple(y.shape)}, {y.dtype} must have shape {shape} and {x.dtype}")
    rows = n * size[0] * size[1]
    residual = epilogue.get("residual")
    if residual is not None and (residual.shape != shape or residual.dtype != x.dtype):
        raise ValueError(
            f"{op}: residual of shape {tuple(residual.shape)}, {residual.dtype} is added to {shape}, {x.dtype}"
        )
    pitches = {
        "x_pitch": channels_last_of(op, "x", x).pitch,
        "y_pitch": channels_last_of(op, "into", y).pitch,
        "residual_pitch": None if residual is None else channels_last_of(op, "residual", residual).pitch,
    }
    if y.numel() == 0:
        return y, statistics_of_nothing(1, y)[:, 0] if want_stats else None
    geometry = ConvGeometry(tuple(stride), tuple(padding), tuple(dilation), 1)
    problem = pose("fprop", x.dtype, x.shape, filters, (r, s), geometry, norm is not None or act != 0)
    heavy = is_heavy(x.device, (act, epilogue.get("out_act", 0)), residual is not None)
    tiles = tiles or configuration(problem, x.device, heavy)
    blocks = cdiv(rows, tiles.rows)
    partials = None
    if want_stats:
        partials = torch.empty((1, blocks, 2, filters), dtype=torch.float32, device=x.device)
    operands = {"out_norm": None, "residual": None, "res_norm": None, "out_act_param": 0.0} | epilogue
    out_act = operands.pop("out_act", 0)
    args = {"x": x, "norm": norm, "weight": weight.contiguous(memory_format=torch.channels_last), "bias": bias}
    loads = tiles.descriptors and described((args["weight"], channels), (x, pitches["x_pitch"]))
    if loads:
        args["weight"] = taps_of(args["weight"], tiles.columns, tiles.depth)
        if is_dense(problem):
            args["x"] = pixels_of(x, pitches["x_pitch"], tiles.rows, tiles.depth)
    args |= {"y": y, "partials": partials, "act_param": float(act_param), "M": rows, "K": filters, "C": channels}
    args |= {"H": h, "W": w, "P": size[0], "Q": size[1], **pitches, **operands}
    meta = geometry_meta(weight, stride, padding, dilation) | {"ACT": act, "OUT_ACT": out_act}
    meta |= {"PRECISION": convolution_precision(x.dtype), "BM": tiles.rows, "BN": tiles.columns, "BK": tiles.depth}
    meta |= {"DESCRIPTORS": loads, "PERSISTENT": tiles.persistent}
    programs = programs_of(problem, tiles, blocks * cdiv(filters, tiles.columns), x)
    launch(conv_fprop_kernel, (programs,), args, meta, **tiles.options)
    return y, None if partials is None else merge_statistics(partials, rows, tiles.rows)[:, 0]


def conv_fused_fprop(
    x: Tensor,
    norm: Tensor | None,
    act: int,
    act_param: float,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    want_stats: bool,
    into: Tensor | None = None,
    *,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """See :data:`fusedres.ops.conv_fused.CONV_FUSED_FPROP`; ``tiles`` is for measurements."""
    operands = (x, norm, act, act_param, weight, bias, stride, padding, dilation)
    if groups_of(x, weight) != 1:
        return CONV_FUSED_FPROP.overload("cuda")(*operands, want_stats, into)
    y, stats = _run("conv_fused_fprop", *operands, into, want_stats, tiles)
    return y if into is None else x.new_empty(0), x.new_empty(0) if stats is None else stats


def conv_fused_join(
    x: Tensor,
    norm: Tensor | None,
    act: int,
    act_param: float,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    out_norm: Tensor | None,
    residual: Tensor | None,
    res_norm: Tensor | None,
    out_act: int,
    out_act_param: float,
    into: Tensor | None = None,
) -> Tensor:
    """See :data:`fusedres.ops.conv_fused.CONV_FUSED_JOIN`."""
    operands = (x, norm, act, act_param, weight, bias, stride, padding, dilation)
    if groups_of(x, weight) != 1:
        join = (out_norm, residual, res_norm, out_act, out_act_param)
        return CONV_FUSED_JOIN.overload("cuda")(*operands, *join, into)
    epilogue = {"out_norm": out_norm, "residual": residual, "res_norm": None if residual is None else res_norm}
    epilogue |= {"out_act": out_act, "out_act_param": float(out_act_param)}
    y, _ = _run("conv_fused_join", *operands, into, **epilogue)
    return y if into is None else x.new_empty(0)


register("conv_fused_fprop", conv_fused_fprop)
register("conv_fused_join", conv_fused_join)
