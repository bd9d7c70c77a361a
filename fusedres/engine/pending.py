"""The pending value: a raw tensor with what is to be applied to it, and the ways to apply it."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.activations import IDENTITY, Activation
from ..ops.bn_join import BN_JOIN
from ..ops.bn_stats import statistics_dtype
from ..ops.dropout import draw_seed
from ..ops.excite import EXCITE, GATES, squeezed
from ..ops.layout import like
from .program import ExciteSlot, GainSlot, Link, MaskSlot, NormSlot, Operands, Program, weight_indices
from .synchronised import GroupStatistics, merge, merge_samples


class Raw(NamedTuple):
    """A raw tensor and what is pending on it.

    Attributes:
        rows: ``(mean, rstd, scale, shift)`` of the norm, ``[4, C]``.
        gain: ``[N, C]``.
        mask: the part of the gain that is by chance, ``[N, 1]`` or ``[N, C]``.
        means: of every sample's channels, ``[N, C]``, where the gain is made from them.
        seed: of the dropout.
        total: how many values per channel all processes have that the norm is synchronised with; a number in float64.
        taken: by the max pooling of the value, see :mod:`fusedres.ops.join_pool`.
    """

    tensor: Tensor
    rows: Tensor | None = None
    gain: Tensor | None = None
    mask: Tensor | None = None
    means: Tensor | None = None
    seed: Tensor | None = None
    total: Tensor | None = None
    taken: Tensor | None = None


class Statistics(NamedTuple):
    """Statistics of a raw tensor.

    Attributes:
        own: mean and M2 of this process's values, ``[2, C]``, or ``[2, N, C]`` of every sample.
        group: those of all processes, where they are merged already.
    """

    own: Tensor
    group: GroupStatistics | None = None


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


def pend(link: Link, tensor: Tensor, tensors: Operands, k: SimpleNamespace, stats: Statistics | None = None) -> Raw:
    """A raw tensor with what ``link`` makes pending on it: statistics are taken, masks and seeds drawn.

    ``stats`` are those that :func:`measure` would take, where they are known.
    """
    stats = measure(link, tensor, k) if stats is None else stats
    rows, total = norm_rows(link.norm, tensor, tensors, k, stats)
    if link.gain is None:
        return Raw(tensor, rows, seed=draw_seed() if link.dropout else None, total=total)
    means = stats.own[0] if link.excites else None
    mask = survivors(tensor, link.gain)
    gain = gain_of(link.gain.excite, rows, means, mask, tensors, tensor, k)
    return Raw(tensor, rows, gain, mask, means, draw_seed() if link.dropout else None, total)


def pend_and_apply(link: Link, tensor: Tensor, tensors: Operands, k: SimpleNamespace) -> tuple[Raw, Tensor | None]:
    """:func:`pend`, and :func:`applied` where one kernel does both."""
    norm = link.norm
    plain = link.gain is None and norm is not None and norm.batch_statistics and norm.group is None
    if k.backend not in BN_JOIN.kernels or not plain or _count(tensor) <= 1:
        return pend(link, tensor, tensors, k), None
    affine_and_buffers = tensors[norm.first : norm.first + 4]
    seed = draw_seed() if link.dropout else None
    ending = (None, None, link.act.code, link.act.param, link.dropout, seed)
    value, rows = k.bn_join(tensor, *affine_and_buffers, norm.momentum, norm.eps, *ending)
    # See norm_rows.
    torch.autograd.graph.increment_version([t for t in affine_and_buffers[2:] if t is not None])
    return Raw(tensor, rows, seed=seed), value


def pend_ends(program: Program, branch: list[Raw], shortcut: list[Raw], tensors: Operands, k: SimpleNamespace) -> None:
    """:func:`pend` for the last raw tensors of both chains, whose norms share one exchange of statistics."""
    ends = [(program.branch[-1], branch), (program.shortcut[-1], shortcut)]
    stats = [measure(link, raws[-1].tensor, k) for link, raws in ends]
    parts = [_part(raws[-1].tensor, each) for (_, raws), each in zip(ends, stats)]
    for (link, raws), each, group in zip(ends, stats, merge(program.branch[-1].norm.group, parts)):
        raws[-1] = pend(link, raws[-1].tensor, tensors, k, each._replace(group=group))


def measure(link: Link, tensor: Tensor, k: SimpleNamespace) -> Statistics | None:
    """What the norm and the squeeze of ``link`` need to know of a raw tensor, in one pass."""
    if not (link.excites or (link.norm is not None and link.norm.batch_statistics)):
        return None
    if tensor.numel() == 0:  # of a process without a part in the batch: it has a part in the exchange
        shape = (2, *tensor.shape[:2]) if link.excites else (2, tensor.shape[1])
        return Statistics(tensor.new_zeros(shape, dtype=statistics_dtype(tensor.dtype)))
    return Statistics(k.bn_stats(tensor, link.excites))


def norm_rows(
    norm: NormSlot | None, raw: Tensor, tensors: Operands, k: SimpleNamespace, stats: Statistics | None
) -> tuple[Tensor | None, Tensor | None]:
    """The rows of a norm, and the count of the group that it is synchronised with."""
    if norm is None:
        return None, None
    affine_and_buffers = tensors[norm.first : norm.first + 4]
    if not norm.batch_statistics:
        return k.bn_norm(None, 1.0, *affine_and_buffers, 0.0, norm.eps), None
    if norm.group is not None:
        group = merge(norm.group, [_part(raw, stats)])[0] if stats.group is None else stats.group
        return _group_rows(norm, raw, affine_and_buffers, k, group), group.count
    count = _count(raw)
    if count <= 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {raw.shape}")
    rows = k.bn_norm(stats.own, count, *affine_and_buffers, norm.momentum, norm.eps)
    # A kernel's write goes by unnoticed; folded weights and autograd's checks rely on the count.
    torch.autograd.graph.increment_version([t for t in affine_and_buffers[2:] if t is not None])
    return rows, None


def _count(raw: Tensor) -> int:
    return raw.numel() // raw.shape[1]


def _part(raw: Tensor, stats: Statistics) -> tuple[Tensor, int]:
    """This process's part in the statistics of a group."""
    count = _count(raw)
    return (stats.own if stats.own.dim() == 2 else merge_samples(stats.own, count)), count


def _group_rows(
    norm: NormSlot, raw: Tensor, affine_and_buffers: Operands, k: SimpleNamespace, group: GroupStatistics
) -> Tensor:
    """The rows from a group's statistics; running statistics are updated here, since the op's count is no tensor."""
    (mean, m2), (gamma, beta, running_mean, running_var) = group.values, affine_and_buffers
    for running, value in ((running_mean, mean), (running_var, m2 / (group.count - 1))):
        if running is not None:
            running.copy_((1 - norm.momentum) * running.double() + norm.momentum * value)
    as_of_one = torch.stack((mean, m2 / group.count)).to(statistics_dtype(raw.dtype))
    return k.bn_norm(as_of_one, 1.0, gamma, beta, None, None, 0.0, norm.eps)


def survivors(x: Tensor, slot: GainSlot) -> Tensor | None:
    """The factors by chance, ``[N, 1]`` or ``[N, C]``: stochastic depth's, or what a module of the user's draws."""
    if slot.mask is not None:
        return _drawn(x, slot.mask)
    if not slot.drop_path:
        return None
    # As torchvision's and timm's modules draw it.
    kept = torch.empty((x.shape[0], 1), dtype=x.dtype, device=x.device).bernoulli_(1 - slot.drop_path)
    return kept.to(statistics_dtype(x.dtype)) / (1 - slot.drop_path if slot.drop_path < 1 else 1)


def _drawn(x: Tensor, slot: MaskSlot) -> Tensor:
    ones = torch.ones((x.shape[0], x.shape[1] if slot.channels else 1, 1, 1), dtype=x.dtype, device=x.device)
    wide = statistics_dtype(x.dtype)
    factors = slot.drawn(ones).flatten(1).to(wide)
    # Of ones the number is left rounded to x's dtype, by the same error in every value; of x the product is rounded.
    rounded = _rounded(slot.number, x.dtype)
    return factors * (slot.number / rounded) if rounded and wide != x.dtype else factors


def _rounded(number: float, dtype: torch.dtype) -> float:
    """A normal number of ``dtype``, to the nearest even; without a tensor, whose value not everything may read."""
    mantissa, exponent = math.frexp(number)
    bits = 1 - round(math.log2(torch.finfo(dtype).eps))
    return math.ldexp(round(math.ldexp(mantissa, bits)), exponent - bits)


def gain_of(
    excite: ExciteSlot | None,
    rows: Tensor | None,
    means: Tensor | None,
    mask: Tensor | None,
    tensors: Operands,
    raw: Tensor,
    k: SimpleNamespace,
) -> Tensor:
    if excite is None:
        return mask.expand(raw.shape[:2]).contiguous()
    if k.backend in EXCITE.kernels:
        operands = tensors[excite.first : excite.first + 4]
        return k.excite(means, rows, *operands, excite.act.code, excite.act.param, excite.gate, mask)
    gate = excitation(excite, squeezed(rows, means), tensors[excite.first : excite.first + 4]).to(means.dtype)
    return gate if mask is None else gate * mask


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


def ended(link: Link, raw: Raw, k: SimpleNamespace, record: bool) -> tuple[Tensor, Raw]:
    """The value with which a block without a join ends, and ``raw`` with what backward wants to know if ``record``."""
    if link.pool is None:
        return applied(link, raw, k), raw
    pending = (raw.tensor, raw.rows, link.act.code, link.act.param)
    if raw.gain is not None or raw.seed is not None:
        pending = (apply_pending(link, raw, link.act, k), None, IDENTITY.code, IDENTITY.param)
    out, taken = k.join_pool(*pending, *link.pool, record)
    return out, raw._replace(taken=taken) if record else raw
