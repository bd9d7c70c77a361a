"""Blocks of Xie et al. (2017, "Aggregated Residual Transformations for Deep Neural Networks", figure 3c)."""

from __future__ import annotations

from torch import nn

from ..block import Act, Conv, Norm
from ..ops.activations import RELU
from .base import ResidualJoin, conv1x1, conv3x3, shortcut_of
from .residual import BOTTLENECK

__all__ = ["ResNeXtBlock", "ResNeXtBottleneckBlock"]

_PREACT = (
    Norm("bn1"),
    Act(RELU),
    Conv("conv1"),
    Norm("bn2"),
    Act(RELU),
    Conv("conv2"),
    Conv("conv3"),
)


class ResNeXtBlock(ResidualJoin):
    """A pre-activation bottleneck with a grouped convolution in the middle::

        conv3(conv2(relu(bn2(conv1(relu(bn1(x))))))) + shortcut(x)

    with 1x1, grouped 3x3 and 1x1 convolutions, and nothing between the last two. The middle has ``cardinality * width``
    channels. The shortcut is the identity (an empty ``nn.Sequential``) where input and output agree in shape, otherwise
    a 1x1 convolution, without a norm. Keys: ``bn1 conv1 conv2 bn2 conv3 shortcut``.

    The paper's own block, with its norms and activations behind the convolutions, is :class:`ResNeXtBottleneckBlock`.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: of the 3x3 convolution and of the shortcut.
        cardinality: the number of groups.
        width: channels of a group.
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
        cardinality: int = 32,
        width: int = 4,
        *,
        bias: bool = True,
        drop_path: float = 0.0,
        memory: str = "auto",
    ) -> None:
        super().__init__(memory)
        channels = cardinality * width
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv1x1(in_channels, channels, bias=bias)
        self.conv2 = conv3x3(channels, channels, stride, bias, groups=cardinality)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv1x1(channels, out_channels, bias=bias)
        self.shortcut = shortcut_of(in_channels, out_channels, stride, bias=bias)
        self._join(_PREACT, "shortcut", drop_path=drop_path, in_place=False)


class ResNeXtBottleneckBlock(ResidualJoin):
    """The paper's block, a post-activation bottleneck with a grouped convolution in the middle::

        relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + downsample(x))

    with 1x1, grouped 3x3 and 1x1 convolutions and ``cardinality * width`` channels in the middle. ``downsample`` is the
    identity (an empty ``nn.Sequential``) where input and output agree in shape, otherwise a 1x1 convolution and a batch
    norm. Keys, those of torchvision's ``Bottleneck``: ``conv1 bn1 conv2 bn2 conv3 bn3 downsample.0 downsample.1``; its
    convolutions have no bias.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: of the 3x3 convolution and of the shortcut.
        cardinality: the number of groups.
        width: channels of a group, in this block: a ResNeXt-50 32x4d has 4, 8, 16 and 32 in its four stages.
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
        cardinality: int = 32,
        width: int = 4,
        *,
        bias: bool = True,
        drop_path: float = 0.0,
        memory: str = "auto",
    ) -> None:
        super().__init__(memory)
        channels = cardinality * width
        self.conv1 = conv1x1(in_channels, channels, bias=bias)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, stride, bias, groups=cardinality)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv1x1(channels, out_channels, bias=bias)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = shortcut_of(in_channels, out_channels, stride, bias=bias, norm=True)
        self._join(BOTTLENECK, "downsample", RELU, drop_path=drop_path)
