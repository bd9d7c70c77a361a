"""Wide ResNets for small images (Zagoruyko and Komodakis 2016, "Wide Residual Networks", table 1).

Three stages of ``n`` pre-activation blocks with ``16 k``, ``32 k`` and ``64 k`` channels, ``6n + 4`` layers in all.
Where the shape changes the shortcut is a 1x1 convolution of the block's input. Keys within a block are those of
:class:`fusedres.nn.WideResidualBlock`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.init import init_weights
from .build import built

__all__ = ["WideBlock", "WideResNet", "wrn"]


class WideBlock(nn.Module):
    """``conv2(dropout(relu(bn2(conv1(relu(bn1(x))))))) + shortcut(x)``."""

    def __init__(self, in_channels: int, channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.dropout(F.relu(self.bn2(out)))
        return self.conv2(out) + self.shortcut(x)


class WideResNet(nn.Module):
    """A 3x3 stem, three stages of ``n`` blocks, a norm, and a linear classifier.

    Args:
        n: blocks of each stage.
        width: how many times wider than a CIFAR ResNet.
        dropout: the probability with which an element between a block's convolutions is dropped in training.
        zero_init_residual: start every block as its shortcut: the last norm's weight is zero.
    """

    def __init__(
        self,
        n: int,
        width: int,
        *,
        dropout: float = 0.0,
        num_classes: int = 10,
        in_channels: int = 3,
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.layer1 = _stage(16, 16 * width, n, 1, dropout)
        self.layer2 = _stage(16 * width, 32 * width, n, 2, dropout)
        self.layer3 = _stage(32 * width, 64 * width, n, 2, dropout)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)
        init_weights(self, zero_last_gamma=zero_init_residual)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(F.relu(self.bn1(x)).mean((2, 3)))


def _stage(in_channels: int, channels: int, n: int, stride: int, dropout: float) -> nn.Sequential:
    first = WideBlock(in_channels, channels, stride, dropout)
    return nn.Sequential(first, *(WideBlock(channels, channels, 1, dropout) for _ in range(1, n)))


def wrn(
    depth: int = 28, width: int = 10, *, dropout: float = 0.0, num_classes: int = 10, fused: bool = True, **options: int
) -> WideResNet:
    """WRN-``depth``-``width``: 16-8, 28-10 and 40-4 in the paper (their table 5).

    ``options`` as in :class:`WideResNet`.

    Raises:
        ValueError: for a depth that is not ``6n + 4``, or a width below one.
    """
    n, remainder = divmod(depth - 4, 6)
    if n < 1 or remainder:
        raise ValueError(f"depth must be 6n + 4 (10, 16, 28, 40, ...), got {depth}")
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    return built(WideResNet(n, width, dropout=dropout, num_classes=num_classes, **options), fused)
