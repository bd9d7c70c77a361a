"""A batch norm whose statistics are those of all processes of a group, as ``nn.SyncBatchNorm``'s are.

Every process takes (n, mean, M2) of its own values; they are gathered, and every process merges them in the order of
the ranks, by Chan's formula (Chan, Golub and LeVeque 1979, eq. 2.1, for all parts at once), in float64:

.. math::
    n = \\sum_p n_p \\qquad mean = \\frac1n \\sum_p n_p\\, mean_p \\qquad
    M2 = \\sum_p M2_p + n_p\\, (mean_p - mean)^2

So all have the same bits, whatever each one's share of the batch, which may be empty. In backward, the gradient of a
value has the terms :math:`\\sum g / n` and :math:`\\sum g \\hat y / n` over all processes; one all-reduce adds those
sums up. Gradients of parameters stay those of the process, for whoever averages them (DDP) to average.

Nothing here waits for the device: counts stay tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["GroupStatistics", "group_of", "merge", "merge_samples", "summed"]


_AVAILABLE = dist.is_available()


class GroupStatistics(NamedTuple):
    """Statistics of the values of all processes of a group.

    Attributes:
        values: mean and M2, ``[2, C]``, in float64.
        count: of values per channel, a number in float64.
    """

    values: Tensor
    count: Tensor


def group_of(process_group: Any | None) -> Any | None:
    """The processes with which a norm in training shares its statistics, ``None`` where there is no other.

    Args:
        process_group: the module's; ``None`` is everyone.
    """
    if not (_AVAILABLE and dist.is_initialized()):
        return None
    group = process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def merge(group: Any, parts: Sequence[tuple[Tensor, int]]) -> list[GroupStatistics]:
    """The group's statistics of several tensors, in one exchange.

    Args:
        parts: for each tensor this process's mean and M2, ``[2, C]``, and how many values they are of.
    """
    own = torch.cat([t for stats, n in parts for t in (stats.new_full((1,), n, dtype=torch.float64), stats.flatten())])
    gathered = own.new_empty((dist.get_world_size(group), len(own)))
    try:
        dist.all_gather(list(gathered.unbind(0)), own, group)
    except RuntimeError as error:
        raise _failure("gather the statistics", group) from error
    merged = []
    for each in gathered.split([1 + stats.numel() for stats, _ in parts], 1):
        counts, (means, m2s) = each[:, :1], each[:, 1:].chunk(2, 1)
        merged.append(GroupStatistics(_chan(counts, means, m2s), counts.sum()))
    return merged


def merge_samples(stats: Tensor, count: int) -> Tensor:
    """From statistics of every sample, ``[2, N, C]``, to those of all, ``[2, C]``; ``count`` values in all."""
    means, m2s = stats.double().unbind(0)
    return _chan(means.new_full((len(means), 1), count / max(1, len(means))), means, m2s)


def summed(sums: Tensor, group: Any, share: Tensor) -> Tensor:
    """The sums of all processes, times this one's ``share`` of the values.

    So that divided by its own count they are what the group's sums are divided by the group's.
    """
    total = sums.double()
    try:
        dist.all_reduce(total, group=group)
    except RuntimeError as error:
        raise _failure("add up the gradients", group) from error
    return (total * share).to(sums.dtype)


def _chan(counts: Tensor, means: Tensor, m2s: Tensor) -> Tensor:
    """Mean and M2 of all rows, from those of each; no value at all has a mean of 0."""
    mean = (counts * means).sum(0) / counts.sum().clamp(min=1)
    # Rows of no values have neither mean nor M2, and infinite means no deviation: a NaN, as in stock PyTorch.
    return torch.stack((mean, (m2s + counts * (means - mean).square()).sum(0)))


def _failure(what: str, group: Any) -> RuntimeError:
    size = dist.get_world_size(group)
    return RuntimeError(
        f"synchronised batch norm: could not {what} of the {size} processes of its group; one of them has ended, hangs "
        "or runs another block"
    )
