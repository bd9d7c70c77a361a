"""A residual block as data, the pending value, and the engine that runs any such block forward and backward.

**A normalised tensor is never stored.** A batch norm followed by an activation is, per channel,
``z = act(scale[c] * y + shift[c])``, with ``y`` the raw output of a convolution. Between two convolutions the engine
carries a :class:`Pending` value: the raw tensor, its affine, its activation, none of it applied yet. Whoever reads the
value next applies it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

from .ops.activations import IDENTITY, Activation

__all__ = ["Act", "Block", "Conv", "Norm", "Step"]


# ---------------------------------------------------------------------------------------------------------------------
# A block as data
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conv:
    """The convolution held by the ``nn.Conv2d`` at ``path`` below the block's module."""

    path: str


@dataclass(frozen=True)
class Norm:
    """The batch norm held by the ``nn.BatchNorm2d`` at ``path``."""

    path: str


@dataclass(frozen=True)
class Act:
    """An elementwise activation."""

    activation: Activation


Step = Union[Conv, Norm, Act]


@dataclass(frozen=True)
class Block:
    """A block: ``act(branch(x) + shortcut(r))``, or ``branch(x)`` where there is no join.

    Args:
        branch: the steps from the input to the join (or to the output), in the order in which they run.
        shortcut: ``None`` for no join, ``()`` for an identity shortcut, otherwise the steps of the projection.
        act: the activation after the join; identity without a join (an activation is then the branch's last step).
        residual: what the shortcut reads: ``"input"``, the block's own input, or ``"argument"``, a second tensor
            that the caller passes.
    """

    branch: tuple[Step, ...]
    shortcut: tuple[Step, ...] | None = None
    act: Activation = IDENTITY
    residual: str = "input"
