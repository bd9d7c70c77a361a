"""A link's convolution: what it reads, what it makes, and which passes run inside it.

A backend may have convolutions that apply a pending input while they load it and take the statistics of what they make
(:mod:`fusedres.ops.conv_fused`), and gradients of that kind (:mod:`fusedres.ops.conv_fused_backward`). Whether one is
called is decided here, per link and pass, and only where there is something to fuse; the vendor's convolution runs the
rest, between passes over memory. Any mixture gives the same numbers.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.activations import IDENTITY
from ..ops.conv import conv_fprop
from .pending import Raw, Statistics, applied, pend
from .program import Link, Operands

__all__ = ["UNFUSED", "Fusion", "Operand", "convolved", "fusion_of", "measures", "read_by", "run_chain"]

Chain = tuple[Link, ...]


class Operand(NamedTuple):
    """What a fused convolution reads: a tensor, and what it applies to that."""

    tensor: Tensor
    rows: Tensor | None = None
    act: int = IDENTITY.code
    act_param: float = IDENTITY.param


def pending_operand(link: Link, raw: Raw) -> Operand:
    return Operand(raw.tensor, raw.rows, link.act.code, link.act.param)


def absorbs(link: Link, raw: Raw, weight: Tensor) -> bool:
    """Whether a fused convolution can apply what is pending on its input: a norm and an activation, nothing else."""
    return link.gain is None and not link.dropout and raw.tensor.dtype == weight.dtype


def measures(reader: Link) -> bool:
    """Whether a link wants the statistics of its raw tensor, per channel, from the pass that makes it."""
    # An excitation needs them per sample.
    return reader.norm is not None and reader.norm.batch_statistics and not reader.excites


# ---------------------------------------------------------------------------------------------------------------------
# Forward
# ---------------------------------------------------------------------------------------------------------------------


def read_by(
    link: Link, raw: Raw, value: Tensor | None, weight: Tensor, epilogue: bool, k: SimpleNamespace
) -> tuple[Operand, bool]:
    """What a link's convolution reads, and whether it is a fused one.

    Args:
        value: the pending value, if it is there yet.
        epilogue: whether there is something to fuse behind the convolution.
    """
    has_fused, g = k.fuses is not None, link.conv.geometry
    pending = has_fused and value is None and not link.plain and absorbs(link, raw, weight)
    if pending and k.fuses("fprop", raw.tensor, weight, g, True):
        return pending_operand(link, raw), True
    value = (applied(link, raw, k) if value is None else value).to(weight.dtype)
    return Operand(value), has_fused and epilogue and k.fuses("fprop", value, weight, g, False)


def convolved(
    link: Link,
    raw: Raw,
    value: Tensor | None,
    tensors: Operands,
    k: SimpleNamespace,
    measured: bool,
    again: bool = False,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The raw tensor that ``link`` makes, and its statistics where the convolution takes them.

    Args:
        value: the pending value, if it is there yet.
        measured: whether the statistics are wanted.
        again: whether this is done again in backward, the same way and without statistics.
        into: where a fused convolution writes the result, a slice of a buffer.
    """
    if link.conv is None:
        return applied(link, raw, k) if value is None else value, None
    weight, bias = tensors[link.conv.first : link.conv.first + 2]
    g = link.conv.geometry
    if k.fuses is None:  # a call less
        value = applied(link, raw, k) if value is None else value
        return conv_fprop(value.to(weight.dtype), weight, bias, g), None
    operand, fused = read_by(link, raw, value, weight, measured, k)
    if not fused:
        return conv_fprop(operand.tensor, weight, bias, g), None
    wanted = measured and not again
    y, stats = k.conv_fused_fprop(*operand, weight, bias, g.stride, g.padding, g.dilation, wanted, into)
    return y if into is None else into, stats if wanted else None


def run_chain(
    chain: Chain,
    first: Raw,
    value: Tensor | None,
    tensors: Operands,
    k: SimpleNamespace,
    pends_last: bool = True,
) -> list[Raw]:
    """The raw tensors of a chain, each with what is pending on it; ``value`` is the first one's, if it is there yet.

    Without ``pends_last`` the last one is left as it is, for :func:`fusedres.engine.pending.pend_ends`.
    """
    raws = [first]
    for index, (link, reader) in enumerate(zip(chain, chain[1:])):
        pends = pends_last or index < len(chain) - 2
        tensor, stats = convolved(link, raws[-1], value, tensors, k, pends and measures(reader))
        known = None if stats is None else Statistics(stats)
        raws.append(pend(reader, tensor, tensors, k, known) if pends else Raw(tensor))
        value = None
    return raws


# ---------------------------------------------------------------------------------------------------------------------
# Backward
# ---------------------------------------------------------------------------------------------------------------------


class Fusion(NamedTuple):
    """How a link's convolution runs backward.

    Attributes:
        pends: whether the gradient of what it made may stay pending: whoever reads it applies the norm's formula.
        dgrad: whether the data gradient is a fused one.
        wgrad: whether the weight gradient is.
        absorbs: whether they apply what is pending on the input, and its backward.
    """

    pends: bool = False
    dgrad: bool = False
    wgrad: bool = False
    absorbs: bool = False


UNFUSED = Fusion()


def fusion_of(
    link: Link,
    raw: Raw,
    reader: Link,
    made: Tensor | None,
    weight: Tensor,
    needs_input: bool,
    needs_weight: bool,
    k: SimpleNamespace,
) -> Fusion:
    """The decision for a link with a convolution.

    Args:
        raw: what it reads.
        reader: the link behind, and ``made`` its raw tensor, ``None`` where nothing of it is looked at again.
    """
    x, g = raw.tensor, link.conv.geometry
    takes = absorbs(link, raw, weight)
    if made is not None and _stays_pending(reader, made, weight):
        dgrad = needs_input and k.fuses("dgrad", x, weight, g, True)
        wgrad = needs_weight and k.fuses("wgrad", x, weight, g, True)
        if (dgrad, wgrad) == (needs_input, needs_weight):
            return Fusion(True, dgrad, wgrad, takes)
    if link.plain or not takes:
        return UNFUSED  # a gradient that is there, of a value that is there: nothing to fuse
    dgrad = needs_input and k.fuses("dgrad", x, weight, g, False)
    wgrad = needs_weight and k.fuses("wgrad", x, weight, g, True)
    return Fusion(False, dgrad, wgrad, True)


def _stays_pending(reader: Link, made: Tensor, weight: Tensor) -> bool:
    """Whether the gradient of a raw tensor can be left to whoever reads it: its norm's formula, and no gain's."""
    channels_last = made.is_contiguous(memory_format=torch.channels_last) or made.stride(1) == 1
    return reader.norm is not None and reader.gain is None and made.dtype == weight.dtype and channels_last
