"""Squeeze-and-excitation (Hu et al. 2018, "Squeeze-and-Excitation Networks")."""

from __future__ import annotations

from torch import nn

from ..block import Block, SqueezeExcite
from ..ops.activations import RELU
from .base import FusedBlock, ResidualJoin, conv1x1, conv3x3, middle_channels, shortcut_of
from .residual import BOTTLENECK

__all__ = ["SEBlock", "SEBottleneckBlock"]


class SEBlock(FusedBlock):
    """Scales each channel of each sample by a gate that all of its channels decide::

        x * sigmoid(fc2(relu(fc1(mean over H and W of x))))

    (Hu et al. 2018, eq. 2 to 4). The two layers are 1x1 convolutions with biases, as in timm. Keys: ``fc1 fc2``.

    Args:
        channels: of the input and the output.
        reduction: there are ``channels // reduction``, and at least one, between the two layers.
        memory: ``"low"`` recomputes in backward what is cheap to recompute.

    Raises:
        ValueError: where ``reduction`` is less than one.
    """

    def __init__(self, channels: int, reduction: int = 16, *, memory: str = "auto") -> None:
        super().__init__(memory)
        if reduction < 1:
            raise ValueError(f"reduction must be at least 1, got {reduction}")
        hidden = max(channels // reduction, 1)
        self.fc1 = conv1x1(channels, hidden)
        self.fc2 = conv1x1(hidden, channels)
        self._block = Block((SqueezeExcite("fc1", "fc2"),))


class SEBottleneckBlock(ResidualJoin):
    """The bottleneck block with a gate before the addition::

        relu(se(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x))))))))) + downsample(x))

    with 1x1, 3x3 and 1x1 convolutions, ``out_channels // expansion`` channels in the middle, and ``se`` as in
    :class:`SEBlock` (Hu et al. 2018, figure 3). ``downsample`` is the identity (an empty ``nn.Sequential``) where input
    and output agree in shape, otherwise a 1x1 convolution and a batch norm. Keys, those of timm's ``seresnet50``:
    ``conv1 bn1 conv2 bn2 conv3 bn3 se.fc1 se.fc2 downsample.0 downsample.1``; its convolutions, those of ``se`` apart,
    have no bias.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, at least ``expansion``.
        stride: of the 3x3 convolution and of the shortcut.
        reduction: as in :class:`SEBlock`.
        bias: whether the convolutions outside ``se`` have one.
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
        reduction: int = 16,
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
        self.se = SEBlock(out_channels, reduction)
        self.downsample = shortcut_of(in_channels, out_channels, stride, bias=bias, norm=True)
        self._join((*BOTTLENECK, SqueezeExcite("se.fc1", "se.fc2")), "downsample", RELU, drop_path=drop_path)
