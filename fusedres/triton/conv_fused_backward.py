"""The gradients of a fused convolution in Triton: implicit GEMMs whose operands pass through the norms' affines.

dgrad: rows are pixels, columns input channels, the sum runs over taps and filters. The prologue makes the output's
gradient from ``g`` and ``y``; the epilogue adds the skip's gradient, masks, and takes the sums of the norm before, one
partial per tile of rows. A 1x1 convolution with a stride scatters: its rows are pixels of the output, the others get
zero. Larger kernels gather, and only with stride 1: with a stride most taps would meet nothing.

wgrad: rows are filters, columns input channels of one tap, the sum runs over pixels and is split, so that the device is
full; the parts are added in order. Both operands have a prologue. Grouped convolutions go to the CUDA kernels.

By tensor descriptor, where the tables say so, come weights, the gradient's and the raw output's rows where a tile is a
rectangle of them (in dgrad with 1x1 kernels, in wgrad always), and in wgrad the input of a dense 1x1 convolution.

Must move, at least: dgrad reads ``g``, ``y``, the weights and ``x``, writes ``dx``; wgrad reads ``g``, ``y`` and ``x``,
writes ``dW``. ``2 N P Q K C R S`` FLOPs each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.conv import ConvGeometry, groups_of
from ..ops.conv_fused_backward import CONV_FUSED_DGRAD, CONV_FUSED_WGRAD
from .conv_fused import (
    channels_last_of,
    check_operands,
    geometry_meta,
    is_dense,
    pending,
    programs_of,
    tiles_of_program,
)
from .join_backward import sum_partials
from .launch import cdiv, described, launch, multiprocessors, pixels_of, register, splits_of, taps_of
from .precision import convolution_precision
from .tiles import activation_gradient, load_row
from .tuning import Tiles, configuration, is_heavy, pose

__all__ = ["bn_grad_rows", "conv_fused_dgrad", "conv_fused_wgrad"]

_PROGRAMS = 4  # of wgrad, per multiprocessor


# ---------------------------------------------------------------------------------------------------------------------
# The rows of a norm's input gradient
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def bn_grad_rows_kernel(norm, sums, out, per_count, C, BC: tl.constexpr):
    columns = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = columns < C
    scale = load_row(norm, 2, columns, C, 1.0)
    slope = tl.zeros((BC,), tl.float32)
    offset = tl.zeros((BC,), tl.float32)
    if sums is not None:
        slope = scale * load_row(norm, 1, columns, C, 1.0) * (load_row(sums, 1, columns, C, 0.0) * per_count)
        offset = scale * (load_row(sums, 0, columns, C, 0.0) * per_count)
    tl.store(out + columns, scale, mask=inside)
    tl.store(out + C + columns, slope, mask=inside)
    tl.store(out + 2 * C + columns, load_row(norm, 0, columns, C, 0.0), mask=inside)
    tl.store(out + 3 * C + columns, offset, mask=inside)


def bn_grad_rows(norm: Tensor, sums: Tensor | None, count: float) -> Tensor:
    """See :data:`fusedres.ops.conv_fused_backward.BN_GRAD_ROWS`."""
    out = torch.empty_like(norm)
    args = {"norm": norm, "sums": None if sums is None else sums.contiguous(), "out": out}
    args |= {"per_count": 1.0 / count, "C": norm.shape[1]}
    launch(bn_grad_rows_kernel, (cdiv(norm.shape[1], 128),), args, {"BC": 128}, stages=1)
    return out


@triton.jit
def output_gradient(g, y, grad_rows, columns, K, inside):
    """The prologue: ``scale * g - slope * (y - mean) - offset`` of a tile ``[pixels, filters]``, zero outside."""
    if grad_rows is not None:
        scale, slope = load_row(grad_rows, 0, columns, K, 0.0), load_row(grad_rows, 1, columns, K, 0.0)
        mean, offset = load_row(grad_rows, 2, columns, K, 0.0), load_row(grad_rows, 3, columns, K, 0.0)
        between = y.to(tl.float32) - mean[None, :]
        wide = scale[None, :] * g.to(tl.float32) - slope[None, :] * between - offset[None, :]
        g = tl.where(inside[:, None], wide, 0.0).to(g.dtype)
    return g


# ---------------------------------------------------------------------------------------------------------------------
# dgrad
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["M", "P", "Q", "H", "W"])
def conv_dgrad_kernel(
    g,
    y,
    grad_rows,
    weight,
    x,
    norm,
    addend,
    dx,
    partials,
    act_param,
    M,
    K,
    C,
    H,
    W,
    P,
    Q,
    g_pitch,
    y_pitch,
    x_pitch,
    addend_pitch,
    dx_pitch,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PERSISTENT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Rows ``M`` are the pixels of the output for a 1x1 kernel, of the input for others, which have stride 1."""
    SCATTERS: tl.constexpr = STRIDE_H * STRIDE_W > 1
    GATHERS: tl.constexpr = R * S > 1
    tiles = tl.cdiv(C, BN)
    begin = tl.program_id(0)
    end, stride = tiles_of_program(begin, tl.cdiv(M, BM) * tiles, PERSISTENT)
    for tile in tl.range(begin, end, stride, flatten=PERSISTENT):
        first = (tile // tiles) * BM
        local = tl.arange(0, BM)
        m = first + local
        column = (tile % tiles) * BN
        n = column + tl.arange(0, BN)
        # Offsets within the tile in 32 bits, from the first pixel of the tile, or of its image.
        source_base = first.to(tl.int64)
        target_base = first.to(tl.int64)
        source = local
        target = local
        top = local
        left = local
        if GATHERS:
            image = first // (H * W)
            source_base = image.to(tl.int64) * P * Q
            top = (m // W) % H + PAD_H
            left = m % W + PAD_W
            source = ((m // (H * W) - image) * P + top) * Q + left
        if SCATTERS:
            image = first // (P * Q)
            target_base = image.to(tl.int64) * H * W
            target = ((m // (P * Q) - image) * H + ((m // Q) % P) * STRIDE_H) * W + (m % Q) * STRIDE_W
        accumulator = tl.zeros((BM, BN), tl.float32)
        for step in range(R * S * tl.cdiv(K, BK)):
            tap = step % (R * S)
            filters = (step // (R * S)) * BK
            k = filters + tl.arange(0, BK)
            up = (tap // S) * DILATION_H
            back = (tap % S) * DILATION_W
            inside = m < M
            if GATHERS:
                inside &= (top - up >= 0) & (top - up < P) & (left - back >= 0) & (left - back < Q)
            if DESCRIPTORS and not GATHERS:
                a = g.load([first, filters])
                raw = a
                if grad_rows is not None:
                    raw = y.load([first, filters])
            else:
                pixel = source - up * Q - back
                mask = inside[:, None] & (k < K)[None, :]
                a = tl.load(g + source_base * g_pitch + (pixel * g_pitch)[:, None] + k[None, :], mask=mask, other=0.0)
                raw = a
                if grad_rows is not None:
                    at = y + source_base * y_pitch + (pixel * y_pitch)[:, None] + k[None, :]
                    raw = tl.load(at, mask=mask, other=0.0)
            if DESCRIPTORS:
                b = weight.load([tap, filters, column]).reshape(BK, BN)
            else:
                at = weight + (k * (R * S) + tap)[:, None] * C + n[None, :]
                b = tl.load(at, mask=(k < K)[:, None] & (n < C)[None, :], other=0.0)
            a = output_gradient(a, raw, grad_rows, k, K, inside)
            accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)

        inside = (m < M)[:, None] & (n < C)[None, :]
        result = accumulator
        if addend is not None:
            at = addend + target_base * addend_pitch + (target * addend_pitch)[:, None] + n[None, :]
            result += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if norm is not None or ACT != 0:
            at = x + target_base * x_pitch + (target * x_pitch)[:, None] + n[None, :]
            value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            z = load_row(norm, 2, n, C, 1.0)[None, :] * value + load_row(norm, 3, n, C, 0.0)[None, :]
            result = activation_gradient(z, result, act_param, ACT)
        rounded = result.to(dx.dtype.element_ty)
        at = dx + target_base * dx_pitch + (target * dx_pitch)[:, None] + n[None, :]
        tl.store(at, rounded, mask=inside)
        if partials is not None:
            masked = tl.where(inside, rounded.to(tl.float32), 0.0)
            normalised = (value - load_row(norm, 0, n, C, 0.0)[None, :]) * load_row(norm, 1, n, C, 1.0)[None, :]
            at = partials + (tile // tiles).to(tl.int64) * 2 * C + n
            tl.store(at, tl.sum(masked, 0), mask=n < C)
            tl.store(at + C, tl.sum(masked * normalised, 0), mask=n < C)


def conv_fused_dgrad(
    g: Tensor,
    y: Tensor | None,
    grad_rows: Tensor | None,
    weight: Tensor,
    x: Tensor,
    norm: Tensor | None,
    act: int,
    act_param: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    addend: Tensor | None = None,
    into: Tensor | None = None,
    *,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """See :data:`fusedres.ops.conv_fused_backward.CONV_FUSED_DGRAD`; ``tiles`` is for measurements.

    Raises:
        ValueError: for a stride with a kernel larger than 1x1, with padding, or with a pending addend.
    """
    op = "conv_fused_dgrad"
    if groups_of(x, weight) != 1:
        operands = (g, y, grad_rows, weight, x, norm, act, act_param, stride, padding, dilation)
        return CONV_FUSED_DGRAD.overload("cuda")(*operands, addend, into)
    check_operands(op, x, weight)
    (n, channels, h, w), (filters, _, r, s), (_, _, p, q) = x.shape, weight.shape, g.shape
    strided = tuple(stride) != (1, 1)
    if strided and ((r, s) != (1, 1) or any(padding)):
        raise ValueError(f"{op}: stride {tuple(stride)} needs a 1x1 kernel without padding, not {r}x{s}")
    if strided and addend is not None and (norm is not None or act != 0):
        raise ValueError(f"{op}: stride {tuple(stride)} takes no addend where x is pending")
    if (r, s) == (1, 1) and any(padding):
        raise ValueError(f"{op}: a 1x1 kernel takes no padding here, got {tuple(padding)}")
    dx = _target(x, addend, into, strided)
    sums = x.new_zeros((2, channels), dtype=torch.float32) if norm is not None else x.new_empty(0)
    if g.numel() == 0:
        if addend is not None and not strided:
            dx.copy_(addend)
        return dx if into is None else x.new_empty(0), sums
    geometry = ConvGeometry(tuple(stride), tuple(padding), tuple(dilation), 1)
    problem = pose("dgrad", x.dtype, x.shape, filters, (r, s), geometry, grad_rows is not None)
    tiles = tiles or configuration(problem, x.device, is_heavy(x.device, (act,), addend is not None))
    rows = n * p * q if (r, s) == (1, 1) else n * h * w
    blocks = cdiv(rows, tiles.rows)
    partials = None
    if norm is not None:
        partials = torch.empty((1, blocks, 2, channels), dtype=torch.float32, device=x.device)
    operands = {"g": g, "y": y if grad_rows is not None else None, "x": x, "addend": dx if strided else addend}
    if strided and addend is None:
        operands["addend"] = None
    operands["dx"] = dx
    pitches = {
        f"{name}_pitch": None if t is None else channels_last_of(op, name, t).pitch for name, t in operands.items()
    }
    args = {**operands, "grad_rows": grad_rows, "norm": norm, "partials": partials, "act_param": float(act_param)}
    args |= {"weight": weight.contiguous(memory_format=torch.channels_last)}
    sources = [name for name in ("g", "y") if args[name] is not None]
    loads = tiles.descriptors and described(
        (args["weight"], channels), *((args[name], pitches[f"{name}_pitch"]) for name in sources)
    )
    if loads:
        args["weight"] = taps_of(args["weight"], tiles.depth, tiles.columns)
        for name in sources if (r, s) == (1, 1) else ():
            args[name] = pixels_of(args[name], pitches[f"{name}_pitch"], tiles.rows, tiles.depth)
    args |= {"M": rows, "K": filters, "C": channels, "H": h, "W": w, "P": p, "Q": q, **pitches}
    meta = geometry_meta(weight, stride, padding, dilation) | {"ACT": act, "PRECISION": convolution_precision(x.dtype)}
    meta |= {"BM": tiles.rows, "BN": tiles.columns, "BK": tiles.depth}
    meta |= {"DESCRIPTORS": loads, "PERSISTENT": tiles.persistent}
    programs = programs_of(problem, tiles, blocks * cdiv(channels, tiles.columns), x)
    launch(conv_dgrad_kernel, (programs,), args, meta, **tiles.options)
    if partials is not None:
        sums = sum_partials(partials)[:, 0]
    return dx if into is None else x.new_empty(0), sums


def _target(x: Tensor, addend: Tensor | None, into: Tensor | None, strided: bool) -> Tensor:
    """Where dgrad writes; for a strided convolution what stays of it is there already."""
    dx = torch.empty_like(x, memory_format=torch.channels_last) if into is None else into
    if strided and addend is None:
        dx.zero_()
    elif strided and addend is not dx:
        dx.copy_(addend)
    return dx


# ---------------------------------------------------------------------------------------------------------------------
# wgrad
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["M", "piece", "P", "Q", "H", "W"])
def conv_wgrad_kernel(
    g,
    y,
    grad_rows,
    x,
    norm,
    partials,
    act_param,
    M,
    piece,
    K,
    C,
    H,
    W,
    P,
    Q,
    g_pitch,
    y_pitch,
    x_pitch,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Partials ``[split, K, R, S, C]``, each of ``piece`` of the ``M`` pixels of the output."""
    PADS: tl.constexpr = PAD_H > 0 or PAD_W > 0
    DENSE: tl.constexpr = R * S == 1 and STRIDE_H * STRIDE_W == 1 and not PADS
    tiles = tl.cdiv(C, BN)
    tile = tl.program_id(0)
    column = (tile % tiles) * BN
    n = column + tl.arange(0, BN)
    tap = (tile // tiles) % (R * S)
    filters = (tile // (tiles * R * S)) * BM
    k = filters + tl.arange(0, BM)
    down = (tap // S) * DILATION_H - PAD_H
    right = (tap % S) * DILATION_W - PAD_W
    first = tl.program_id(1) * piece
    end = tl.minimum(first + piece, M)
    # Offsets within the piece in 32 bits: the launcher keeps it short enough.
    if not DESCRIPTORS:
        g_base = g + first.to(tl.int64) * g_pitch
        if grad_rows is not None:
            y_base = y + first.to(tl.int64) * y_pitch
    image = first // (P * Q)
    if not (DESCRIPTORS and DENSE):
        x_base = x + (first.to(tl.int64) if DENSE else image.to(tl.int64) * H * W) * x_pitch
    accumulator = tl.zeros((BM, BN), tl.float32)
    for start in range(first, end, BK):
        m = start + tl.arange(0, BK)
        inside = m < end
        local = m - first
        if DESCRIPTORS:
            a = g.load([start, filters])
            raw = a
            if grad_rows is not None:
                raw = y.load([start, filters])
        else:
            mask = inside[:, None] & (k < K)[None, :]
            a = tl.load(g_base + (local * g_pitch)[:, None] + k[None, :], mask=mask, other=0.0)
            raw = a
            if grad_rows is not None:
                raw = tl.load(y_base + (local * y_pitch)[:, None] + k[None, :], mask=mask, other=0.0)
        covered = inside
        if DENSE:
            pixel = local
        else:
            top = ((m // Q) % P) * STRIDE_H + down
            left = (m % Q) * STRIDE_W + right
            pixel = ((m // (P * Q) - image) * H + top) * W + left
            if PADS:
                covered &= (top >= 0) & (top < H) & (left >= 0) & (left < W)
        if DESCRIPTORS and DENSE:
            b = x.load([start, column])
        else:
            at = x_base + (pixel * x_pitch)[:, None] + n[None, :]
            b = tl.load(at, mask=covered[:, None] & (n < C)[None, :], other=0.0)
        a = output_gradient(a, raw, grad_rows, k, K, inside)
        b = pending(b, norm, n, C, act_param, covered, ACT, PADS)
        accumulator = tl.dot(tl.trans(a), b, accumulator, input_precision=PRECISION)
    at = partials + tl.program_id(1).to(tl.int64) * (K * R * S * C) + (k * (R * S) + tap)[:, None] * C + n[None, :]
    tl.store(at, accumulator, mask=(k < K)[:, None] & (n < C)[None, :])


@triton.jit(do_not_specialize=["splits"])
def wgrad_sum_kernel(partials, out, splits, length, BC: tl.constexpr):
    """Adds the splits in order and rounds once."""
    columns = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = columns < length
    total = tl.zeros((BC,), tl.float32)
    at = partials + columns
    for _ in range(splits):
        total += tl.load(at, mask=inside, other=0.0)
        at += length
    tl.store(out + columns, total.to(out.dtype.element_ty), mask=inside)


def conv_fused_wgrad(
    g: Tensor,
    y: Tensor | None,
    grad_rows: Tensor | None,
    x: Tensor,
    norm: Tensor | None,
    act: int,
    act_param: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    out: Tensor,
    *,
    tiles: Tiles | None = None,
) -> None:
    """See :data:`fusedres.ops.conv_fused_backward.CONV_FUSED_WGRAD`; ``tiles`` is for measurements."""
    op = "conv_fused_wgrad"
    if groups_of(x, out) != 1:
        operands = (g, y, grad_rows, x, norm, act, act_param, stride, padding, dilation)
        CONV_FUSED_WGRAD.overload("cuda")(*operands, out)
        return
    (n, channels, h, w), (filters, _, r, s), (_, _, p, q) = x.shape, out.shape, g.shape
    rows = n * p * q
    if rows == 0:
        out.zero_()
        return
    geometry = ConvGeometry(tuple(stride), tuple(padding), tuple(dilation), 1)
    pends = grad_rows is not None or norm is not None or act != 0
    problem = pose("wgrad", x.dtype, x.shape, filters, (r, s), geometry, pends)
    tiles = tiles or configuration(problem, x.device, is_heavy(x.device, (act,), False))
    operands = {"g": g, "y": y if grad_rows is not None else None, "x": x}
    pitches = {
        f"{name}_pitch": None if t is None else channels_last_of(op, name, t).pitch for name, t in operands.items()
    }
    count = cdiv(filters, tiles.rows) * r * s * cdiv(channels, tiles.columns)
    widest = max(pitch or 0 for pitch in pitches.values())
    reach = rows * widest * cdiv(h * w, p * q) + 2 * h * w * widest  # elements that the offsets of one piece span
    splits, piece = splits_of(
        rows, tiles.depth, 1, max(cdiv(_PROGRAMS * multiprocessors(x), count), cdiv(reach, 2**30))
    )
    partials = torch.empty((splits, filters, r, s, channels), dtype=torch.float32, device=x.device)
    args = {**operands, "grad_rows": grad_rows, "norm": norm, "partials": partials, "act_param": float(act_param)}
    args |= {"M": rows, "piece": piece, "K": filters, "C": channels, "H": h, "W": w, "P": p, "Q": q, **pitches}
    meta = geometry_meta(out, stride, padding, dilation) | {"ACT": act, "PRECISION": convolution_precision(x.dtype)}
    present = [name for name, t in operands.items() if t is not None]
    loads = tiles.descriptors and described(*((operands[name], pitches[f"{name}_pitch"]) for name in present))
    if loads:
        for name in present if is_dense(problem) else present[:-1]:
            columns = tiles.columns if name == "x" else tiles.rows
            args[name] = pixels_of(operands[name], pitches[f"{name}_pitch"], tiles.depth, columns)
    meta |= {"DESCRIPTORS": loads, "BM": tiles.rows, "BN": tiles.columns, "BK": tiles.depth}
    launch(conv_wgrad_kernel, (count, splits), args, meta, **tiles.options)
    length = filters * r * s * channels
    direct = out.is_contiguous(memory_format=torch.channels_last)
    target = out if direct else torch.empty_like(out, memory_format=torch.channels_last)
    sums = {"partials": partials, "out": target, "splits": splits, "length": length}
    launch(wgrad_sum_kernel, (cdiv(length, 1024),), sums, {"BC": 1024}, stages=1)
    if not direct:
        out.copy_(target)


register("bn_grad_rows", bn_grad_rows)
register("conv_fused_dgrad", conv_fused_dgrad)
register("conv_fused_wgrad", conv_fused_wgrad)
