"""Inference: norms, residual and activation inside the convolutions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..ops.activations import IDENTITY, Activation
from ..ops.conv import onednn_refuses, output_size
from ..ops.conv_affine_act import FoldedConv, fold
from ..ops.layout import dense
from ..select import kernels
from .pending import aligned, applied, apply_pending, compute_dtype, pend
from .program import ConvSlot, Link, NormSlot, Operands, Program
from .stock import execute_stock
from .training import forward_block


def infer(program: Program, x: Tensor, residual: Tensor | None, tensors: Operands, folded: dict[int, Any]) -> Tensor:
    dtype = compute_dtype(x)
    k = kernels(x.device.type, dtype, program.backend)
    x = dense(x)
    if len(program.branch) == 1:  # without a convolution there is nothing to fold the join into
        return forward_block(program, x, residual, tensors, k)[0]
    if _activates(program) and asks_for_nan(x, dtype):
        if _shrinks_depthwise(program, x, tensors):
            return execute_stock(program, x, residual, tensors)
        if swallows(k, dtype, x, residual):
            return forward_block(program, x, residual, tensors, k)[0]
    branch = program.branch
    if program.shortcut is None:
        return infer_chain(branch, x, None, branch[-1].act, dtype, tensors, folded, k)
    if program.shares:
        x = applied(branch[0], pend(branch[0], x, tensors, k), k)
        branch = (Link(None, IDENTITY, branch[0].conv), *branch[1:])
    side_input = x if residual is None else dense(residual)
    side = infer_chain(program.shortcut, side_input, None, IDENTITY, dtype, tensors, folded, k)
    if program.in_place:
        side = side.to(dtype)
    return infer_chain(branch, x, side, program.act, dtype, tensors, folded, k)


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


def asks_for_nan(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether oneDNN's fused convolutions would run on ``x``, which turn NaN into 0 behind a ReLU."""
    return x.is_contiguous(memory_format=torch.channels_last) and onednn_refuses(x.device.type, dtype) is None


def swallows(k: SimpleNamespace, dtype: torch.dtype, x: Tensor, residual: Tensor | None = None) -> bool:
    """Whether oneDNN's fused convolutions would run on an input that holds NaN."""
    if not asks_for_nan(x, dtype):
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
) -> Tensor:
    """``act(chain(x) + side)`` with constant norms."""
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
        y, other = aligned(raw.tensor, step_side)
        of_sum = kernels(x.device.type, y.dtype, "auto") if y.dtype != dtype else k
        value = apply_pending(reader, raw._replace(tensor=y), step_act, of_sum, other, None)
    return value


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
        rows = None if norm is None else k.bn_norm(None, 1.0, *affine, 0.0, norm.eps)
        # The operands and their memory are held on to, so that nothing else can come to lie at their addresses.
        held = [(t, t.detach()) for t in operands if t is not None]
        entry = cache[conv.first] = (key, fold(weight, bias, rows, conv.geometry, x), held)
    return entry[1]


def _identity_of(tensors: tuple[Tensor | None, ...], k: SimpleNamespace) -> tuple[Any, ...] | None:
    """What changes when a tensor is replaced or written to; ``None`` where PyTorch does not count writes.

    The count misses writes through ``.data``, for which there is a sample of the values.
    """
    present = [t for t in tensors if t is not None]
    if any(t.is_inference() for t in present):
        return None
    return k.fingerprint(present), *((t.data_ptr(), t._version) for t in present)
