"""The activations that every backend knows: one short list, one integer code each.

An activation is elementwise, ``z -> act(z)``, and needs only ``z`` for its derivative, so that a backward pass can
recompute it from the raw tensor and never has to store its result. ``csrc/common/activations.h`` holds the same list
for the compiled kernels; ``tests/ops/test_activations.py`` compares the two, code by code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "IDENTITY", "RELU", "Activation", "activation"]


@dataclass(frozen=True)
class Activation:
    """An elementwise activation.

    Args:
        name: a key of :data:`ACTIVATIONS`.
        param: the slope of ``leaky_relu``; unused by the others.

    Raises:
        ValueError: for a name that is not in the list.
    """

    name: str
    param: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in ACTIVATIONS:
            raise ValueError(f"act: unknown activation {self.name!r}; known: {', '.join(ACTIVATIONS)}")
        # The engine reads the code several times per call, so it is looked up once.
        object.__setattr__(self, "code", ACTIVATIONS[self.name].code)
        object.__setattr__(self, "spelled", f"{self.name}:{self.param!r}")

    code: int = field(default=-1, compare=False)
    spelled: str = field(default="", compare=False, repr=False)
    """Both arguments in a word, for where numbers could be taken for variables; see :meth:`from_spelled`."""

    @staticmethod
    def from_spelled(spelled: str) -> Activation:
        name, _, param = spelled.partition(":")
        return Activation(name, float(param))

    def __call__(self, z: Tensor) -> Tensor:
        return ACTIVATIONS[self.name].forward(z, self.param)

    def derivative(self, z: Tensor) -> Tensor:
        """``act'(z)``, with stock PyTorch's choice of subgradient at the kinks."""
        return ACTIVATIONS[self.name].derivative(z, self.param)

    def __str__(self) -> str:
        return f"{self.name}({self.param:g})" if self.name == "leaky_relu" else self.name


@dataclass(frozen=True)
class _Formula:
    code: int
    forward: Callable[[Tensor, float], Tensor]
    derivative: Callable[[Tensor, float], Tensor]


def _silu_derivative(z: Tensor, _: float) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def _hardswish_derivative(z: Tensor, _: float) -> Tensor:
    inner = torch.where(z < 3, z / 3 + 0.5, torch.ones_like(z))
    return torch.where(z <= -3, torch.zeros_like(z), inner)


def _gelu_derivative(z: Tensor, _: float) -> Tensor:
    cdf = 0.5 * (1 + torch.erf(z * 0.7071067811865476))
    pdf = torch.exp(-0.5 * z * z) * 0.3989422804014327
    return cdf + z * pdf


# ``~(z <= 0)`` rather than ``z > 0``: stock PyTorch lets the gradient of a NaN through, and so do we.
ACTIVATIONS: dict[str, _Formula] = {
    "identity": _Formula(0, lambda z, _: z, lambda z, _: torch.ones_like(z)),
    "relu": _Formula(1, lambda z, _: torch.relu(z), lambda z, _: (~(z <= 0)).to(z.dtype)),
    "relu6": _Formula(2, lambda z, _: F.relu6(z), lambda z, _: (~((z <= 0) | (z >= 6))).to(z.dtype)),
    "leaky_relu": _Formula(
        3, lambda z, a: F.leaky_relu(z, a), lambda z, a: torch.where(z > 0, torch.ones_like(z), torch.full_like(z, a))
    ),
    "silu": _Formula(4, lambda z, _: F.silu(z), _silu_derivative),
    "hardswish": _Formula(5, lambda z, _: F.hardswish(z), _hardswish_derivative),
    "gelu": _Formula(6, lambda z, _: F.gelu(z), _gelu_derivative),
}

IDENTITY = Activation("identity")
RELU = Activation("relu")


def activation(act: str | Activation) -> Activation:
    """``act`` as an :class:`Activation`, from its name or itself.

    Raises:
        TypeError: for anything else.
        ValueError: for an unknown name.
    """
    if isinstance(act, Activation):
        return act
    if isinstance(act, str):
        return Activation(act)
    raise TypeError(f"act must be a name or an Activation, got {type(act).__name__}")
