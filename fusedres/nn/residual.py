"""The post-activation blocks of He et al. (2016, "Deep Residual Learning for Image Recognition", figure 5).

Each block has the parameters and ``state_dict`` keys of the plain PyTorch block that its docstring spells out, so that
a checkpoint of one loads into the other. Its forward is one call into the engine, its backward one autograd node; the
modules inside hold parameters and settings, and are not called.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..block import Act, Block, Conv, Norm, run
from ..ops.activations import RELU

__all__ = ["BottleneckBlock", "ResidualBlock"]

_BASIC = (Conv("conv1"), Norm("bn1"), Act(RELU), Conv("conv2"), Norm("bn2"))
_BOTTLENECK = (*_BASIC, Act(RELU), Conv("conv3"), Norm("bn3"))
_SHORTCUTS = {"identity": (), "conv": (Conv("shortcut"),), "conv_norm": (Conv("shortcut.0"), Norm("shortcut.1"))}


def _block(branch: tuple, shortcut: str) -> Block:
    return Block(branch, _SHORTCUTS[shortcut], RELU, in_place=True)


class ResidualBlock(nn.Module):
    """The basic block::

        relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))

    with 3x3 convolutions. The shortcut is the identity (an empty ``nn.Sequential``) where input and output agree in
    shape, otherwise a 1x1 convolution, without a norm. Keys: ``conv1 bn1 conv2 bn2 shortcut``.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; those of the input if left out.
        stride: of the first convolution and of the shortcut.
        bias: whether the convolutions have one.
        memory: ``"low"`` recomputes in backward what is cheap to recompute.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        stride: int = 1,
        *,
        bias: bool = True,
        memory: str = "auto",
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        self.memory = memory
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=bias)
        self.bn2 = nn.BatchNorm2d(out_channels)
        projects = stride != 1 or in_channels != out_channels
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=bias) if projects else nn.Sequential()
        self._block = _block(_BASIC, "conv" if projects else "identity")

    def forward(self, x: Tensor) -> Tensor:
        return run(self._block, self, x, memory=self.memory)


class BottleneckBlock(nn.Module):
    """The bottleneck block::

        relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x))

    with 1x1, 3x3 and 1x1 convolutions and ``out_channels // expansion`` channels in the middle. The shortcut is the
    identity (an empty ``nn.Sequential``) where input and output agree in shape, otherwise a 1x1 convolution and a batch
    norm. Keys: ``conv1 bn1 conv2 bn2 conv3 bn3 shortcut.0 shortcut.1``.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: of the 3x3 convolution and of the shortcut.
        bias: whether the convolutions have one.
        memory: ``"low"`` recomputes in backward what is cheap to recompute.
    """

    expansion = 4

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, *, bias: bool = True, memory: str = "auto"
    ) -> None:
        super().__init__()
        channels = out_channels // self.expansion
        self.memory = memory
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=bias)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=bias)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=bias)
        self.bn3 = nn.BatchNorm2d(out_channels)
        projects = stride != 1 or in_channels != out_channels
        self.shortcut = nn.Sequential()
        if projects:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=bias), nn.BatchNorm2d(out_channels)
            )
        self._block = _block(_BOTTLENECK, "conv_norm" if projects else "identity")

    def forward(self, x: Tensor) -> Tensor:
        return run(self._block, self, x, memory=self.memory)
