"""A block bound to its operands: slots that say where in one flat list its parameters and buffers lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import ReferenceType

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.activations import IDENTITY, Activation
from ..ops.conv import ConvGeometry
from ..ops.join_pool import PoolWindow


class ConvSlot(NamedTuple):
    """A convolution whose weight and bias are ``tensors[first]`` and ``tensors[first + 1]``."""

    first: int
    geometry: ConvGeometry


class NormSlot(NamedTuple):
    """A batch norm whose gamma, beta, running_mean and running_var are the four tensors from ``tensors[first]`` on.

    Attributes:
        batch_statistics: whether it normalises with the statistics of the batch, or with the running ones.
        momentum: the weight of the batch in the running statistics.
        group: the processes whose batches are one batch to it, or ``None``; only with batch statistics.
        promotes: whether stock's result has the dtype that the input and the four tensors have in common.
    """

    first: int
    batch_statistics: bool
    momentum: float
    eps: float
    group: Any = None
    promotes: bool = False


class ExciteSlot(NamedTuple):
    """Two dense layers from squeeze to gate; weight and bias of each are the four tensors from ``tensors[first]`` on.

    Attributes:
        act: between the layers.
        gate: behind them, a key of :data:`fusedres.ops.excite.GATES`.
    """

    first: int
    act: Activation
    gate: str


class MaskSlot(NamedTuple):
    """Factors that stock PyTorch's own code draws, when it is called on ones.

    Attributes:
        module: a reference to the module that draws them, so that what is kept by program keeps no module.
        p: the probability where there is no such module but ``F.dropout2d``.
        channels: whether there is a factor per sample and channel, rather than one per sample.
        number: that the module multiplies by apart from its mask; see :class:`fusedres.mask.Mask`.
    """

    module: ReferenceType | None
    p: float
    channels: bool
    number: float

    def drawn(self, x: Tensor) -> Tensor:
        """``x`` times the factors."""
        return F.dropout2d(x, self.p, True) if self.module is None else self.module()(x)


class GainSlot(NamedTuple):
    """A multiplier per sample and channel.

    Attributes:
        excite: makes it from the mean over height and width, or ``None``.
        drop_path: the probability with which a sample is dropped; what survives is scaled by ``1 / (1 - drop_path)``.
        mask: other factors by chance, or ``None``; per sample alone where there is an excitation.
    """

    excite: ExciteSlot | None
    drop_path: float
    mask: MaskSlot | None = None

    @property
    def by_chance(self) -> bool:
        return bool(self.drop_path) or self.mask is not None


class Link(NamedTuple):
    """A pending value and its reader: ``conv(dropout(act(gain * norm(raw))))``.

    The last link of a chain has no convolution. Nor has one before a gain of the next link's: there the value itself is
    the next raw tensor, which is never kept but recomputed. The last link of a block without a join may have a max
    pooling in the convolution's place.
    """

    norm: NormSlot | None
    act: Activation
    conv: ConvSlot | None
    gain: GainSlot | None = None
    dropout: float = 0.0
    pool: PoolWindow | None = None

    @property
    def plain(self) -> bool:
        """Whether the raw tensor is the value itself."""
        pends = self.norm is not None or self.act != IDENTITY or self.gain is not None or self.dropout
        return not pends and self.pool is None

    @property
    def excites(self) -> bool:
        """Whether the gain is made from the raw tensor's means."""
        return self.gain is not None and self.gain.excite is not None


IDENTITY_SHORTCUT = (Link(None, IDENTITY, None),)

Operands = Sequence[Tensor | None]


class Program(NamedTuple):
    """A block bound to the slots of its operands, which lie in one flat list beside it.

    Attributes:
        act: the activation behind the join.
        shares: whether the shortcut reads the branch's first pending value, not the input.
        in_place: whether the join keeps the branch's dtype, as ``+=`` does, or takes the common one.
        memory: ``"low"`` drops the last raw tensor of a chain where a 1x1 convolution made it, and recomputes it.
        backend: forced, or ``"auto"``.
    """

    branch: tuple[Link, ...]
    shortcut: tuple[Link, ...] | None
    act: Activation
    in_place: bool = False
    memory: str = "auto"
    backend: str = "auto"
    shares: bool = False

    @property
    def links(self) -> tuple[Link, ...]:
        return self.branch if self.shortcut is None else self.branch + self.shortcut

    @property
    def constant(self) -> bool:
        """Whether the result depends on nothing but the input and the parameters: no batch statistics, no chance."""
        return is_constant(self.links)

    @property
    def exchanges_once(self) -> bool:
        """Whether the norms at the ends of both chains are synchronised over the same processes."""
        if self.shortcut is None or min(len(self.branch), len(self.shortcut)) < 2:
            return False
        ends = self.branch[-1].norm, self.shortcut[-1].norm
        return None not in ends and ends[0].group is not None and ends[0].group == ends[1].group


def promoting_norm(program: Program) -> NormSlot | None:
    """The norm that makes the dtype of a block's result another than that of the convolutions, if there is one."""
    found = _promoting(program.branch)
    if found is not None or program.shortcut is None or program.in_place:
        return found
    first = program.branch[0].norm
    if program.shares and len(program.shortcut) == 1 and first is not None and first.promotes:
        return first
    return _promoting(program.shortcut)


def _promoting(chain: tuple[Link, ...]) -> NormSlot | None:
    """The last norm that promotes behind a chain's last convolution."""
    for link in reversed(chain):
        if link.conv is not None:
            return None
        if link.norm is not None and link.norm.promotes:
            return link.norm
    return None


def is_constant(links: tuple[Link, ...]) -> bool:
    """Whether nothing but the input and the parameters counts: no batch statistics, no chance."""
    for link in links:
        norm, gain = link.norm, link.gain
        if (norm is not None and norm.batch_statistics) or link.dropout or (gain is not None and gain.by_chance):
            return False
    return True


def needs_gradient(tensors: Operands) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def weight_indices(links: tuple[Link, ...]) -> list[int]:
    """Where the weights and biases of convolutions and excitations lie."""
    indices: list[int] = []
    for link in links:
        if link.conv is not None:
            indices += (link.conv.first, link.conv.first + 1)
        if link.gain is not None and link.gain.excite is not None:
            indices += range(link.gain.excite.first, link.gain.excite.first + 4)
    return indices


def is_synchronised(links: tuple[Link, ...]) -> bool:
    """Whether the statistics of a norm are those of several processes."""
    return any(link.norm is not None and link.norm.group is not None for link in links)
