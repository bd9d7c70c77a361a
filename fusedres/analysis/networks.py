"""Networks of any depth that differ in nothing but the skip: what the studies of depth compare.

The CIFAR networks of He et al. (2016, "Deep Residual Learning for Image Recognition", section 4.2): three stages of
``n`` pairs of 3x3 convolutions with 16, 32 and 64 channels, ``6n + 2`` layers. *Plain* and *residual* pairs have the
same parameters and, from one seed, the same initial weights; *pre-activation* (He et al. 2016, "Identity Mappings in
Deep Residual Networks") moves each norm and activation in front of its convolution.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..models import init_weights
from ..models.cifar import PaddedShortcut
from ..patch import patch

__all__ = ["KINDS", "DepthNetwork", "depth_network"]


class PlainPair(nn.Module):
    """``relu(bn2(conv2(relu(bn1(conv1(x))))))``."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)))


class ResidualPair(PlainPair):
    """``relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))``, the shortcut without parameters."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__(in_channels, channels, stride)
        self.shortcut = nn.Identity() if stride == 1 else PaddedShortcut(channels - in_channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class PreActivationPair(nn.Module):
    """``conv2(relu(bn2(conv1(relu(bn1(x)))))) + shortcut(x)``, the shortcut without parameters."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut = nn.Identity() if stride == 1 else PaddedShortcut(channels - in_channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return out + self.shortcut(x)


KINDS = {"plain": PlainPair, "residual": ResidualPair, "pre-activation": PreActivationPair}


class DepthNetwork(nn.Module):
    """A 3x3 stem, three stages of ``n`` pairs, and a linear classifier. Pre-activation pairs are normalised behind the
    last stage, the others behind the stem."""

    def __init__(self, pair: type[nn.Module], n: int, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.norm_last = pair is PreActivationPair
        self.bn1 = nn.BatchNorm2d(64 if self.norm_last else 16)
        self.layer1 = _stage(pair, 16, 16, n, stride=1)
        self.layer2 = _stage(pair, 16, 32, n, stride=2)
        self.layer3 = _stage(pair, 32, 64, n, stride=2)
        self.fc = nn.Linear(64, num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if not self.norm_last:
            x = F.relu(self.bn1(x))
        x = self.layer3(self.layer2(self.layer1(x)))
        if self.norm_last:
            x = F.relu(self.bn1(x))
        return self.fc(x.mean((2, 3)))


def _stage(pair: type[nn.Module], in_channels: int, channels: int, n: int, stride: int) -> nn.Sequential:
    return nn.Sequential(pair(in_channels, channels, stride), *(pair(channels, channels, 1) for _ in range(1, n)))


def depth_network(
    kind: str, depth: int, *, in_channels: int = 1, num_classes: int = 10, fused: bool = True
) -> DepthNetwork:
    """A network of ``depth`` layers whose pairs are of one of :data:`KINDS`.

    Raises:
        ValueError: for an unknown kind, or a depth that is not ``6n + 2``.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    n, remainder = divmod(depth - 2, 6)
    if n < 1 or remainder:
        raise ValueError(f"depth must be 6n + 2 (8, 14, 20, ...), got {depth}")
    model = DepthNetwork(KINDS[kind], n, in_channels, num_classes)
    if fused:
        patch(model)
    return model
