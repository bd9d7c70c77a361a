"""Skip connections that are chosen, learnt or projected, around any branch ``fn``.

The gated ones are highway layers (Srivastava, Greff and Schmidhuber 2015, "Training Very Deep Networks"): gate, branch
and skip meet in :func:`fusedres.ops.gated_join`, one pass forward and one backward. Parameters and ``state_dict`` keys
are those of the formulas written out in plain PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import gated_join

__all__ = ["HighwaySkip", "IdentitySkip", "ProjectionSkip", "SparseSkip"]


def _gate(channels: int, linear: bool, bias: bool) -> nn.Module:
    return nn.Linear(channels, channels, bias=bias) if linear else nn.Conv2d(channels, channels, 1, bias=bias)


def _check_shapes(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.shape != other.shape:
        sides = f"{name} of shape {tuple(value.shape)} and {other_name} of shape {tuple(other.shape)}"
        raise ValueError(f"the two sides of a skip connection must have the same shape, got {sides}")


class HighwaySkip(nn.Module):
    """A gated skip, the highway layer::

        g * fn(x) + (1 - g) * x,   g = sigmoid(gate(x))

    Keys: ``fn``, ``gate``. ``fn`` keeps the shape of its input; ValueError, naming both shapes, where it does not.

    Args:
        fn: the branch.
        channels: of the input.
        linear: the gate is ``nn.Linear`` over the last dimension, for inputs ``[N, C]``, instead of a 1x1 convolution,
            for ``[N, C, H, W]``.
        bias: whether the gate has one.
    """

    def __init__(self, fn: nn.Module, channels: int, *, linear: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.fn = fn
        self.gate = _gate(channels, linear, bias)

    def forward(self, x: Tensor) -> Tensor:
        return gated_join(self.fn(x), self.gate(x), x)


class SparseSkip(nn.Module):
    """A gated skip whose gate is open or shut::

        m * fn(x) + (1 - m) * x,   m = sigmoid(gate(x)) > threshold

    Keys: ``fn``, ``gate``. The comparison has no derivative, so the gate learns nothing (its gradients are ``None``),
    unless ``straight_through`` gives it the gradient that the sigmoid in the mask's place would have.

    Args:
        fn: the branch; it keeps the shape of its input, ValueError, naming both shapes, where it does not.
        channels: of the input.
        threshold: between 0 and 1.
        straight_through: see above.
        linear, bias: as in :class:`HighwaySkip`.
    """

    def __init__(
        self,
        fn: nn.Module,
        channels: int,
        threshold: float = 0.5,
        straight_through: bool = False,
        *,
        linear: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.fn = fn
        self.gate = _gate(channels, linear, bias)
        self.threshold = threshold
        self.straight_through = straight_through

    def forward(self, x: Tensor) -> Tensor:
        # Without a gradient to take from the gate, autograd need not keep anything for it.
        with torch.set_grad_enabled(self.straight_through and torch.is_grad_enabled()):
            logits = self.gate(x)
        return gated_join(self.fn(x), logits, x, threshold=self.threshold, straight_through=self.straight_through)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}, straight_through={self.straight_through}"


class ProjectionSkip(nn.Module):
    """A skip through a projection, ``fn(x) + projection(x)``, for a branch that changes the shape.

    He et al. (2016, "Deep Residual Learning for Image Recognition", eq. 2). Keys: ``fn``, ``projection``. ValueError,
    naming both shapes, where the two disagree.

    Args:
        fn: the branch.
        projection: what makes the input's shape the branch's, for example ``nn.Conv2d(in_channels, out_channels, 1,
            stride)``.
    """

    def __init__(self, fn: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.fn = fn
        self.projection = projection

    def forward(self, x: Tensor) -> Tensor:
        out, side = self.fn(x), self.projection(x)
        _check_shapes("fn(x)", out, "projection(x)", side)
        return out + side


class IdentitySkip(nn.Module):
    """A plain skip, ``fn(x) + x``.

    He et al. (2016, "Deep Residual Learning for Image Recognition", eq. 1). Key: ``fn``. ValueError, naming both
    shapes, where ``fn`` changes the shape.

    Args:
        fn: the branch.
    """

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        out = self.fn(x)
        _check_shapes("fn(x)", out, "x", x)
        return out + x
