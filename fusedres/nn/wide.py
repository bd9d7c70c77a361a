"""The block of Zagoruyko and Komodakis (2016, "Wide Residual Networks", figure 1d)."""

from __future__ import annotations

from torch import nn

from ..block import Act, Conv, Dropout, Norm
from ..ops.activations import RELU
from .base import ResidualJoin, conv3x3, shortcut_of

__all__ = ["WideResidualBlock"]

_WIDE = (
    Norm("bn1"),
    Act(RELU),
    Conv("conv1"),
    Norm("bn2"),
    Act(RELU),
    Dropout("dropout"),
    Conv("conv2"),
)


class WideResidualBlock(ResidualJoin):
    """The pre-activation block with dropout between its convolutions::

        conv2(dropout(relu(bn2(conv1(relu(bn1(x))))))) + shortcut(x)

    with 3x3 convolutions. The shortcut is the identity (an empty ``nn.Sequential``) where input and output agree in
    shape, otherwise a 1x1 convolution, without a norm. Keys: ``bn1 conv1 bn2 conv2 shortcut``; ``dropout`` has none.

    The mask of the dropout comes from a counter (:mod:`fusedres.ops.dropout`) and is not stored; PyTorch's own mask for
    the same seed is another one, with the same distribution.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: of the first convolution and of the shortcut.
        dropout: the probability with which an element is dropped in training.
        bias: whether the convolutions have one.
        drop_path: the probability with which a sample's branch is dropped in training
            (:class:`~fusedres.nn.StochasticDepth`).
        memory: ``"low"`` recomputes in backward what is cheap to recompute.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        dropout: float = 0.0,
        *,
        bias: bool = True,
        drop_path: float = 0.0,
        memory: str = "auto",
    ) -> None:
        super().__init__(memory)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, stride, bias)
        self.dropout = nn.Dropout(dropout)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels, bias=bias)
        self.shortcut = shortcut_of(in_channels, out_channels, stride, bias=bias)
        self._join(_WIDE, "shortcut", drop_path=drop_path, in_place=False)
