"""Networks of any depth that differ in nothing but the skip: what the studies of depth compare.

The CIFAR networks of He et al. (2016, "Deep Residual Learning for Image Recognition", section 4.2): three stages of
``n`` pairs of 3x3 convolutions with 16, 32 and 64 channels, ``6n + 2`` layers. *Plain* and *residual* pairs have the
same parameters and, from one seed, the same initial weights; *pre-activation* (He et al. 2016, "Identity Mappings in
Deep Residual Networks") moves each norm and activation in front of its convolution.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .. import models
from ..models.cifar import PaddedShortcut
from ..patch import patch

__all__ = ["KINDS", "depth_network"]


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


class PreActivationNetwork(nn.Module):
    """A 3x3 stem, three stages of ``n`` pairs, a last norm and activation, and a linear classifier: the CIFAR ResNet in
    pre-activation form, where :func:`fusedres.models.cifar_preresnet` has bottlenecks."""

    def __init__(self, n: int, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.layer1 = _stage(16, 16, n, stride=1)
        self.layer2 = _stage(16, 32, n, stride=2)
        self.layer3 = _stage(32, 64, n, stride=2)
        self.bn = nn.BatchNorm2d(64)
        self.fc = nn.Linear(64, num_classes)
        models.init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(F.relu(self.bn(x)).mean((2, 3)))


def _stage(in_channels: int, channels: int, n: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        PreActivationPair(in_channels, channels, stride),
        *(PreActivationPair(channels, channels, 1) for _ in range(1, n)),
    )


def _pre_activation(depth: int, *, in_channels: int, num_classes: int, fused: bool) -> nn.Module:
    model = PreActivationNetwork((depth - 2) // 6, in_channels, num_classes)
    if fused:
        patch(model)
    return model


KINDS = {"plain": models.plain, "residual": models.cifar_resnet, "pre-activation": _pre_activation}


def depth_network(
    kind: str, depth: int, *, in_channels: int = 1, num_classes: int = 10, fused: bool = True
) -> nn.Module:
    """A network of ``depth`` layers of one of :data:`KINDS`.

    Raises:
        ValueError: for an unknown kind, or a depth that is not ``6n + 2``.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth must be 6n + 2 (8, 14, 20, ...), got {depth}")
    return KINDS[kind](depth, in_channels=in_channels, num_classes=num_classes, fused=fused)
