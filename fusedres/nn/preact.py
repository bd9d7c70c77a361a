"""The pre-activation blocks of He et al. (2016, "Identity Mappings in Deep Residual Networks", figure 4e).

Norm and activation come before each convolution and nothing follows the addition, so that a signal passes from any
block to any other along the shortcuts alone (their eq. 4).
"""

from __future__ import annotations

from torch import nn

from ..block import Act, Conv, Norm
from ..ops.activations import RELU
from .base import ResidualJoin, conv1x1, conv3x3, middle_channels, shortcut_of

__all__ = ["PreActBottleneckBlock", "PreActResidualBlock"]

_BASIC = (Norm("bn1"), Act(RELU), Conv("conv1"), Norm("bn2"), Act(RELU), Conv("conv2"))
_BOTTLENECK = (*_BASIC, Norm("bn3"), Act(RELU), Conv("conv3"))


def _check_residual(residual: str) -> None:
    if residual not in ("input", "pending"):
        raise ValueError(f"residual must be 'input' or 'pending', got {residual!r}")


class PreActResidualBlock(ResidualJoin):
    """The basic block with pre-activation::

        conv2(relu(bn2(conv1(relu(bn1(x)))))) + shortcut(x)

    with 3x3 convolutions. The shortcut is the identity (an empty ``nn.Sequential``) where input and output agree in
    shape, otherwise a 1x1 convolution, without a norm. Keys: ``bn1 conv1 bn2 conv2 shortcut``.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; those of the input if left out.
        stride: of the first convolution and of the shortcut.
        bias: whether the convolutions have one.
        residual: what a projection reads: ``"input"``, the block's input ``x``; or ``"pending"``, ``relu(bn1(x))``, as
            in the paper's own networks. The identity always reads ``x``.
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
        residual: str = "input",
        drop_path: float = 0.0,
        memory: str = "auto",
    ) -> None:
        super().__init__(memory)
        _check_residual(residual)
        out_channels = in_channels if out_channels is None else out_channels
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, stride, bias)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels, bias=bias)
        self.shortcut = shortcut_of(in_channels, out_channels, stride, bias=bias)
        self._join(_BASIC, "shortcut", drop_path=drop_path, residual=residual)


class PreActBottleneckBlock(ResidualJoin):
    """The bottleneck block with pre-activation::

        conv3(relu(bn3(conv2(relu(bn2(conv1(relu(bn1(x))))))))) + shortcut(x)

    with 1x1, 3x3 and 1x1 convolutions and ``out_channels // expansion`` channels in the middle. The shortcut is the
    identity (an empty ``nn.Sequential``) where input and output agree in shape, otherwise a 1x1 convolution, without a
    norm. Keys: ``bn1 conv1 bn2 conv2 bn3 conv3 shortcut``.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, at least ``expansion``.
        stride: of the 3x3 convolution and of the shortcut.
        bias: whether the convolutions have one.
        residual: what a projection reads: ``"input"``, the block's input ``x``; or ``"pending"``, ``relu(bn1(x))``, as
            in the paper's own networks. The identity always reads ``x``.
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
        residual: str = "input",
        drop_path: float = 0.0,
        memory: str = "auto",
    ) -> None:
        super().__init__(memory)
        _check_residual(residual)
        channels = middle_channels(out_channels, self.expansion)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv1x1(in_channels, channels, bias=bias)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, stride, bias)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv3 = conv1x1(channels, out_channels, bias=bias)
        self.shortcut = shortcut_of(in_channels, out_channels, stride, bias=bias)
        self._join(_BOTTLENECK, "shortcut", drop_path=drop_path, residual=residual)
