"""The pending value: a raw tensor with what is to be applied to it, and the ways to apply it."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.activations import Activation
from ..ops.bn_join import BN_JOIN
from ..ops.bn_stats import statistics_dtype
from ..ops.conv import conv_fprop
from ..ops.dropout import draw_seed
from ..ops.layout import like
from .program import GATES, ExciteSlot, Link, NormSlot, Operands, weight_indices


class Raw(NamedTuple):
    """A raw tensor and what is pending on it.

    Attributes:
        rows: ``(mean, rstd, scale, shift)`` of the norm, ``[4, C]``.
        gain: ``[N, C]``.
        mask: stochastic depth's part of the gain, ``[N, 1]``.
        means: of every sample's channels, ``[N, C]``, where the gain is made from them.
        seed: of the dropout.
    """

    tensor: Tensor
    rows: Tensor | None = None
    gain: Tensor | None = None
    mask: Tensor | None = None
    means: Tensor | None = None
    seed: Tensor | None = None


def compute_dtype(x: Tensor) -> torch.dtype:
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def cast_weights(links: tuple[Link, ...], tensors: Operands, dtype: torch.dtype) -> Operands:
    """The operands with the convolutions' in ``dtype``, as autocast would have them."""
    indices = weight_indices(links)
    if all(tensors[i] is None or tensors[i].dtype == dtype for i in indices):
        return tensors
    result = list(tensors)
    for i in indices:
        t = result[i]
        result[i] = None if t is None else t.to(dtype)
    return result


def aligned(y: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both sides of a join in the dtype in which stock PyTorch adds them, and in ``y``'s layout."""
    if residual is None:
        return y, None
    if residual.dtype != y.dtype:
        y = y.to(torch.promote_types(y.dtype, residual.dtype))
    return y, like(residual, y)


def pend(link: Link, tensor: Tensor, tensors: Operands, k: SimpleNamespace, rows: Tensor | None = None) -> Raw:
    """A raw tensor with what ``link`` makes pending on it: statistics are taken, masks and seeds drawn.

    ``rows`` are those of the norm where they are known.
    """
    if link.gain is None:
        rows = norm_rows(link.norm, tensor, tensors, k) if rows is None else rows
        return Raw(tensor, rows, seed=draw_seed() if link.dropout else None)
    means = None
    if link.gain.excite is None:
        rows = norm_rows(link.norm, tensor, tensors, k) if rows is None else rows
    else:  # one pass for the batch's statistics and the squeeze
        stats = k.bn_stats(tensor, True)
        means, rows = stats[0], norm_rows(link.norm, tensor, tensors, k, stats)
    mask = survivors(tensor, link.gain.drop_path)
    gain = gain_of(link.gain.excite, rows, means, mask, tensors, tensor)
    return Raw(tensor, rows, gain, mask, means, draw_seed() if link.dropout else None)


def norm_rows(
    norm: NormSlot | None, raw: Tensor, tensors: Operands, k: SimpleNamespace, stats: Tensor | None = None
) -> Tensor | None:
    if norm is None:
        return None
    affine_and_buffers = tensors[norm.first : norm.first + 4]
    if not norm.batch_statistics:
        return k.bn_norm(None, 1.0, *affine_and_buffers, 0.0, norm.eps)
    count = _values_per_channel(raw)
    stats = k.bn_stats(raw) if stats is None else stats
    rows = k.bn_norm(stats, float(count), *affine_and_buffers, norm.momentum, norm.eps)
    _count_writes(affine_and_buffers[2:])
    return rows


def _values_per_channel(raw: Tensor) -> int:
    count = raw.numel() // raw.shape[1]
    if count <= 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {raw.shape}")
    return count


def _count_writes(buffers: Sequence[Tensor | None]) -> None:
    """A kernel's write goes by unnoticed; folded weights and autograd's checks rely on the count."""
    torch.autograd.graph.increment_version([t for t in buffers if t is not None])


def pend_and_apply(link: Link, tensor: Tensor, tensors: Operands, k: SimpleNamespace) -> tuple[Raw, Tensor | None]:
    """:func:`pend`, and :func:`applied` where one kernel does both."""
    norm = link.norm
    if k.backend not in BN_JOIN.kernels or link.gain is not None or norm is None or not norm.batch_statistics:
        return pend(link, tensor, tensors, k), None
    _values_per_channel(tensor)
    affine_and_buffers = tensors[norm.first : norm.first + 4]
    seed = draw_seed() if link.dropout else None
    ending = (None, None, link.act.code, link.act.param, link.dropout, seed)
    value, rows = k.bn_join(tensor, *affine_and_buffers, norm.momentum, norm.eps, *ending)
    _count_writes(affine_and_buffers[2:])
    return Raw(tensor, rows, seed=seed), value


def survivors(x: Tensor, drop_path: float) -> Tensor | None:
    """Stochastic depth's mask, ``[N, 1]``, drawn as torchvision's and timm's modules draw it."""
    if not drop_path:
        return None
    kept = torch.empty((x.shape[0], 1), dtype=x.dtype, device=x.device).bernoulli_(1 - drop_path)
    return kept.to(statistics_dtype(x.dtype)) / (1 - drop_path if drop_path < 1 else 1)


def gain_of(
    excite: ExciteSlot | None,
    rows: Tensor | None,
    means: Tensor | None,
    mask: Tensor | None,
    tensors: Operands,
    raw: Tensor,
) -> Tensor:
    if excite is None:
        return mask.expand(raw.shape[:2]).contiguous()
    gate = excitation(excite, squeezed(rows, means), tensors[excite.first : excite.first + 4]).to(means.dtype)
    return gate if mask is None else gate * mask


def squeezed(rows: Tensor | None, means: Tensor) -> Tensor:
    """The mean of a batch-normalised tensor is the affine of the raw tensor's mean."""
    return means if rows is None else torch.addcmul(rows[3], rows[2], means)


def excitation(slot: ExciteSlot, squeeze: Tensor, tensors: Operands) -> Tensor:
    w1, b1, w2, b2 = tensors
    hidden = slot.act(F.linear(squeeze.to(w1.dtype), w1.flatten(1), b1))
    return GATES[slot.gate](F.linear(hidden, w2.flatten(1), b2))


def apply_pending(link: Link, raw: Raw, act: Activation, k: SimpleNamespace, *side: Tensor | None) -> Tensor:
    """``dropout(act(gain * norm(raw) + side))``; a side is a tensor and the rows of its norm."""
    residual, res_rows = side or (None, None)
    if raw.gain is None and raw.seed is None:
        return k.join(raw.tensor, raw.rows, residual, res_rows, act.code, act.param)
    return k.join(raw.tensor, raw.rows, residual, res_rows, act.code, act.param, raw.gain, link.dropout, raw.seed)


def applied(link: Link, raw: Raw, k: SimpleNamespace) -> Tensor:
    """The pending value, applied."""
    return raw.tensor if link.plain else apply_pending(link, raw, link.act, k)


def next_raw(link: Link, value: Tensor, tensors: Operands) -> Tensor:
    """What ``link`` makes of its value: the raw tensor of the next link."""
    if link.conv is None:
        return value
    weight, bias = tensors[link.conv.first : link.conv.first + 2]
    return conv_fprop(value.to(weight.dtype), weight, bias, link.conv.geometry)


def run_chain(
    chain: tuple[Link, ...], first: Raw, value: Tensor | None, tensors: Operands, k: SimpleNamespace
) -> list[Raw]:
    """The raw tensors of a chain, each with what is pending on it; ``value`` is the first one's, if it is there yet."""
    raws = [first]
    for link, reader in zip(chain, chain[1:]):
        value = applied(link, raws[-1], k) if value is None else value
        made = next_raw(link, value, tensors)
        # The last value is not applied here: what is added to it, and the activation behind that, are the block's.
        if reader is chain[-1]:
            raw, value = pend(reader, made, tensors, k), None
        else:
            raw, value = pend_and_apply(reader, made, tensors, k)
        raws.append(raw)
    return raws
