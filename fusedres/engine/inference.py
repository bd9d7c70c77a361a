"""Inference: norms, residual and activation inside the convolutions.

On a CPU, where the library's convolutions have them in their epilogues, norms are folded into weights that are packed
and kept. Elsewhere nothing is folded: a norm is in the epilogue of a fused convolution before it, or pending until what
is behind it loads it.
"""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..ops.activations import IDENTITY, Activation
from ..ops.conv import conv_fprop, onednn_refuses, output_size
from ..ops.conv_affine_act import FoldedConv, fold
from ..ops.layout import dense
from ..select import kernels
from .convolution import Operand, read_by
from .pending import Raw, aligned, applied, apply_pending, cast_weights, compute_dtype, ended, norm_rows, pend
from .program import ConvSlot, Link, NormSlot, Operands, Program
from .stock import execute_stock
from .training import forward_block


def infer(program: Program, x: Tensor, residual: Tensor | None, tensors: Operands, folded: dict[int, Any]) -> Tensor:
    dtype = compute_dtype(x)
    k = kernels(x.device.type, dtype, program.backend)
    x = dense(x)
    if len(program.branch) == 1:  # without a convolution there is nothing to fold the join into
        return forward_block(program, x, residual, tensors, k)[0]
    if _activates(program) and asks_for_nan(k, dtype, x):
        if _shrinks_depthwise(program, x, tensors):
            return execute_stock(program, x, residual, tensors)
        if swallows(k, dtype, x, residual):
            return forward_block(program, x, residual, tensors, k)[0]
    branch = program.branch
    if program.shortcut is None:
        return _infer_alone(branch, x, dtype, tensors, folded, k)
    if program.shares:
        x = applied(branch[0], pend(branch[0], x, tensors, k), k)
        branch = (Link(None, IDENTITY, branch[0].conv), *branch[1:])
    side_input = x if residual is None else dense(residual)
    side = infer_chain(program.shortcut, side_input, None, IDENTITY, dtype, tensors, folded, k)
    if program.in_place:
        side = side.to(dtype)
    return infer_chain(branch, x, side, program.act, dtype, tensors, folded, k)


def _infer_alone(
    chain: tuple[Link, ...],
    x: Tensor,
    dtype: torch.dtype,
    tensors: Operands,
    folded: dict[int, Any],
    k: SimpleNamespace,
) -> Tensor:
    """A chain that no join follows. A max pooling takes what is pending before it, but for what the weights take."""
    *before, last = chain
    if last.pool is None:
        return infer_chain(chain, x, None, last.act, dtype, tensors, folded, k)
    if k.folds:
        value = infer_chain((*before, last._replace(pool=None)), x, None, last.act, dtype, tensors, folded, k)
        last = Link(None, IDENTITY, None, pool=last.pool)
    else:
        value = infer_chain((*before, Link(None, IDENTITY, None)), x, None, IDENTITY, dtype, tensors, folded, k)
    return ended(last, pend(last, value, tensors, k), k, False)[0]


def _activates(program: Program) -> bool:
    """Whether an activation follows a convolution: only there does oneDNN make something else of NaN."""
    behind = [*program.branch[1:], *(program.shortcut or ())[1:]]
    return program.act != IDENTITY or any(link.act != IDENTITY for link in behind)


def _shrinks_depthwise(program: Program, x: Tensor, tensors: Operands) -> bool:
    """Whether all there is to fuse is behind one depthwise convolution that makes a small tensor of a large one.

    Then looking through the large one for NaN reads more than the passes over the small one would.
    """
    conv = program.branch[0].conv
    if program.shortcut is not None or len(program.branch) != 2 or conv is None or conv.geometry.groups == 1:
        return False
    weight = tensors[conv.first]
    height, width = output_size(x.shape[2:], weight.shape[2:], conv.geometry)
    return 3 * weight.shape[0] * height * width < x.shape[1] * x.shape[2] * x.shape[3]


def asks_for_nan(k: SimpleNamespace, dtype: torch.dtype, x: Tensor) -> bool:
    """Whether oneDNN's fused convolutions would run on ``x``, which turn NaN into 0 behind a ReLU."""
    if not k.folds or not x.is_contiguous(memory_format=torch.channels_last):
        return False
    return onednn_refuses(x.device.type, dtype) is None


def swallows(k: SimpleNamespace, dtype: torch.dtype, x: Tensor, residual: Tensor | None = None) -> bool:
    """Whether oneDNN's fused convolutions would run on an input that holds NaN."""
    if not asks_for_nan(k, dtype, x):
        return False
    return not all(k.all_finite(dense(t)) for t in (x, residual) if t is not None)


def infer_chain(
    chain: tuple[Link, ...],
    x: Tensor,
    side: Tensor | None,
    act: Activation,
    dtype: torch.dtype,
    tensors: Operands,
    folded: dict[int, Any],
    k: SimpleNamespace,
    into: Tensor | None = None,
) -> Tensor:
    """``act(chain(x) + side)`` with constant norms; perhaps written ``into`` a slice of a buffer, then that is it."""
    if not k.folds:
        return _infer_pending(chain, x, side, act, dtype, cast_weights(chain, tensors, dtype), k, into)
    first = chain[0]
    value = x if first.plain else applied(first, pend(first, x, tensors, k), k)
    for index in range(len(chain) - 1):
        reader = chain[index + 1]
        last = index == len(chain) - 2
        value = value.to(dtype)
        step_act, step_side = (act, side) if last else (reader.act, None)
        if chain[index].conv is not None:
            conv = _folded(chain[index].conv, reader.norm, value, tensors, folded, k)
            if reader.gain is None and (step_side is None or step_side.dtype == dtype):
                value = conv(value, _residual_for(conv, value, step_side), step_act, k.join)
                continue
            value = conv(value, None, IDENTITY, k.join)
        # A gain needs the whole of the convolution's result, and a sum that promotes is none of oneDNN's: a join.
        raw = pend(reader._replace(norm=None), value, tensors, k)
        value = _joined(reader, raw, step_act, step_side, dtype, k)
    return value


def _joined(
    link: Link, raw: Raw, act: Activation, side: Tensor | None, dtype: torch.dtype, k: SimpleNamespace
) -> Tensor:
    """``act(value(raw) + side)`` by a pass of its own."""
    y, other = aligned(raw.tensor, side)
    of_sum = kernels(y.device.type, y.dtype, "auto") if y.dtype != dtype else k
    return apply_pending(link, raw._replace(tensor=y), act, of_sum, other, None)


def _infer_pending(
    chain: tuple[Link, ...],
    x: Tensor,
    side: Tensor | None,
    act: Activation,
    dtype: torch.dtype,
    tensors: Operands,
    k: SimpleNamespace,
    into: Tensor | None,
) -> Tensor:
    """:func:`infer_chain` without folding: fused convolutions take what is pending before and behind them."""
    link, raw = chain[0], pend(chain[0], x, tensors, k)
    for index, reader in enumerate(chain[1:], 1):
        last = index == len(chain) - 1
        behind, beside = (act, side) if last else (reader.act, None)
        if link.conv is None:
            link, raw = reader, pend(reader, applied(link, raw, k), tensors, k)
            continue
        takes_all = reader.gain is None and (beside is None or beside.dtype == dtype)
        epilogue = takes_all and not (reader.norm is None and behind == IDENTITY and beside is None)
        weight, bias = tensors[link.conv.first : link.conv.first + 2]
        operand, fused = read_by(link, raw, None, weight, epilogue, k)
        if fused and takes_all:
            rows, _ = norm_rows(reader.norm, operand.tensor, tensors, k, None)
            room = into if last and into is not None and into.dtype == dtype else None
            value = _fused(link.conv, operand, weight, bias, rows, beside, behind, room, k)
            if last:
                return value
            link, raw = Link(None, IDENTITY, reader.conv), Raw(value)
        else:
            y = (
                _fused(link.conv, operand, weight, bias, None, None, IDENTITY, None, k)
                if fused
                else conv_fprop(operand.tensor, weight, bias, link.conv.geometry)
            )
            link, raw = reader, pend(reader, y, tensors, k)
    return raw.tensor if link.plain and act == IDENTITY and side is None else _joined(link, raw, act, side, dtype, k)


def _fused(
    conv: ConvSlot,
    operand: Operand,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    side: Tensor | None,
    act: Activation,
    into: Tensor | None,
    k: SimpleNamespace,
) -> Tensor:
    """One convolution with prologue and epilogue."""
    g = conv.geometry
    side = None if side is None else side.contiguous(memory_format=torch.channels_last)
    join = (rows, side, None, act.code, act.param)
    out = k.conv_fused_join(*operand, weight, bias, g.stride, g.padding, g.dilation, *join, into)
    return out if into is None else into


def _residual_for(conv: FoldedConv, value: Tensor, side: Tensor | None) -> Tensor | None:
    """``side`` in the layout of the convolution's result, which is the layout of its input."""
    if side is None:
        return None
    last = value.is_contiguous(memory_format=torch.channels_last)
    return side.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _folded(
    conv: ConvSlot, norm: NormSlot | None, x: Tensor, tensors: Operands, cache: dict[int, Any], k: SimpleNamespace
) -> FoldedConv:
    """The convolution with its norm folded in, made again whenever an operand, the dtype or the layout has changed."""
    weight, bias = tensors[conv.first : conv.first + 2]
    affine = () if norm is None else tuple(tensors[norm.first : norm.first + 4])
    last = x.is_contiguous(memory_format=torch.channels_last)
    operands = (weight, bias, *affine)
    key = (_identity_of(operands, k), x.dtype, last, norm.eps if norm else None, conv.geometry)
    entry = cache.get(conv.first)
    if entry is None or entry[0] != key or key[0] is None:
        with _folding:
            entry = cache.get(conv.first)  # another thread may have come first
            if entry is None or entry[0] != key or key[0] is None:
                rows = None if norm is None else k.bn_norm(None, 1.0, *affine, 0.0, norm.eps)
                # The operands' memory is held on to, so that nothing else can come to lie at their addresses.
                held = [t.detach() for t in operands if t is not None]
                entry = cache[conv.first] = (key, fold(weight, bias, rows, conv.geometry, x), held)
    return entry[1]


# However many threads infer, a weight is folded and packed once.
_folding = threading.Lock()


def _renew_lock() -> None:
    """In the child of a fork there is nobody to release a lock that another thread held."""
    global _folding
    _folding = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def _identity_of(tensors: tuple[Tensor | None, ...], k: SimpleNamespace) -> tuple[Any, ...] | None:
    """What changes when a tensor is replaced or written to; ``None`` where PyTorch does not count writes.

    The count misses writes through ``.data``, for which there is a sample of the values.
    """
    present: list[Tensor] = []
    identity: list[Any] = []
    for t in tensors:
        if t is None:
            continue
        try:
            identity += (t.data_ptr(), t._version)
        except RuntimeError:  # a tensor made in inference mode
            return None
        present.append(t)
    return k.fingerprint(present), *identity
