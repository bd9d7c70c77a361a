"""ResNets and plain networks for small images, as He et al. (2016, section 4.2) train them on CIFAR-10.

Three stages of ``n`` basic blocks with 16, 32 and 64 channels, ``6n + 2`` layers in all. The shortcut has no parameters
(their option A): where the shape changes it takes every second pixel and pads the missing channels with zeros. So a
plain network, which is the same without the shortcuts, has the same parameters and keys.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.init import init_weights
from .build import built

__all__ = ["CifarBlock", "CifarResNet", "PaddedShortcut", "PlainBlock", "cifar_resnet", "plain"]


class PaddedShortcut(nn.Module):
    """Every second pixel, and zeros for the channels that are missing, half of them in front."""

    def __init__(self, missing: int) -> None:
        super().__init__()
        self.missing = missing

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.missing // 2, self.missing - self.missing // 2))


class CifarBlock(nn.Module):
    """``relu(bn2(conv3x3(relu(bn1(conv3x3(x))))) + shortcut(x))``."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity() if stride == 1 else PaddedShortcut(channels - in_channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class PlainBlock(nn.Module):
    """``relu(bn2(conv3x3(relu(bn1(conv3x3(x))))))``: two layers of a plain network."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)))


class CifarResNet(nn.Module):
    """A 3x3 stem, three stages of ``n`` blocks, and a linear classifier.

    Args:
        n: blocks of each stage.
        block: :class:`CifarBlock` or :class:`PlainBlock`.
        zero_init_residual: start every block as its shortcut: the last norm's weight is zero.
    """

    def __init__(
        self,
        n: int,
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        block: type[CifarBlock] | type[PlainBlock] = CifarBlock,
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(block, 16, 16, n, stride=1)
        self.layer2 = _stage(block, 16, 32, n, stride=2)
        self.layer3 = _stage(block, 32, 64, n, stride=2)
        self.fc = nn.Linear(64, num_classes)
        init_weights(self, zero_last_gamma=zero_init_residual)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def _stage(
    block: type[CifarBlock] | type[PlainBlock], in_channels: int, channels: int, n: int, stride: int
) -> nn.Sequential:
    return nn.Sequential(block(in_channels, channels, stride), *(block(channels, channels) for _ in range(1, n)))


def _stage_blocks(depth: int) -> int:
    n, remainder = divmod(depth - 2, 6)
    if n < 1 or remainder:
        raise ValueError(f"depth must be 6n + 2 (20, 32, 44, 56, 110, ...), got {depth}")
    return n


def cifar_resnet(
    depth: int = 20,
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    zero_init_residual: bool = False,
    fused: bool = True,
) -> CifarResNet:
    """A CIFAR ResNet of ``depth`` layers: 20, 32, 44, 56, 110 and 1202 in the paper.

    Raises:
        ValueError: for a depth that is not ``6n + 2``.
    """
    n = _stage_blocks(depth)
    return built(CifarResNet(n, num_classes, in_channels, zero_init_residual=zero_init_residual), fused)


def plain(depth: int = 20, *, num_classes: int = 10, in_channels: int = 3, fused: bool = True) -> CifarResNet:
    """The plain network of ``depth`` layers, a CIFAR ResNet without its shortcuts: what shows the degradation that
    residual learning cures (He et al. 2016, figure 6, left).

    Raises:
        ValueError: for a depth that is not ``6n + 2``.
    """
    return built(CifarResNet(_stage_blocks(depth), num_classes, in_channels, block=PlainBlock), fused)
