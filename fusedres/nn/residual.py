"""The post-activation blocks of He et al. (2016, "Deep Residual Learning for Image Recognition", figure 5)."""

from __future__ import annotations

from torch import nn

from ..block import Act, Conv, Norm
from ..ops.activations import RELU
from .base import ResidualJoin, conv1x1, conv3x3, middle_channels, shortcut_of

__all__ = ["BASIC", "BOTTLENECK", "BottleneckBlock", "ResidualBlock"]

BASIC = (Conv("conv1"), Norm("bn1"), Act(RELU), Conv("conv2"), Norm("bn2"))
BOTTLENECK = (*BASIC, Act(RELU), Conv("conv3"), Norm("bn3"))


class ResidualBlock(ResidualJoin):
    """The basic block::

        relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))

    with 3x3 convolutions. The shortcut is the identity (an empty ``nn.Sequential``) where input and output agree in
    shape, otherwise a 1x1 convolution, without a norm. Keys: ``conv1 bn1 conv2 bn2 shortcut``.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; those of the input if left out.
        stride: of the first convolution and of the shortcut.
        bias: whether the convolutions have one.
        drop_path: the probability with which a sample's branch is dropped in training
            (:class:`~fusedres.nn.StochasticDepth`).
        memory: ``"low"`` recomputes in backward what is cheap to recompute.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        stride: int = 1,
        *,
        bias: bool = True,
        drop_path: float = 0.0,
        memory: str = "auto",
    ) -> None:
        super().__init__(memory)
        out_channels = in_channels if out_channels is None else out_channels
        self.conv1 = conv3x3(in_channels, out_channels, stride, bias)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels, bias=bias)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = shortcut_of(in_channels, out_channels, stride, bias=bias)
        self._join(BASIC, "shortcut", RELU, drop_path=drop_path)


class BottleneckBlock(ResidualJoin):
    """The bottleneck block::

        relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x))

    with 1x1, 3x3 and 1x1 convolutions and ``out_channels // expansion`` channels in the middle. The shortcut is the
    identity (an empty ``nn.Sequential``) where input and output agree in shape, otherwise a 1x1 convolution and a batch
    norm. Keys: ``conv1 bn1 conv2 bn2 conv3 bn3 shortcut.0 shortcut.1``.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, at least ``expansion``.
        stride: of the 3x3 convolution and of the shortcut.
        bias: whether the convolutions have one.
        drop_path: the probability with which a sample's branch is dropped in training
            (:class:`~fusedres.nn.StochasticDepth`).
        memory: ``"low"`` recomputes in backward what is cheap to recompute.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        bias: bool = True,
        drop_path: float = 0.0,
        memory: str = "auto",
    ) -> None:
        super().__init__(memory)
        channels = middle_channels(out_channels, self.expansion)
        self.conv1 = conv1x1(in_channels, channels, bias=bias)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, stride, bias)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv1x1(channels, out_channels, bias=bias)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = shortcut_of(in_channels, out_channels, stride, bias=bias, norm=True)
        self._join(BOTTLENECK, "shortcut", RELU, drop_path=drop_path)
