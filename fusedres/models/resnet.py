"""ResNet, ResNeXt, Wide ResNet and SE-ResNet for images of about 224 x 224.

He et al. (2016, "Deep Residual Learning for Image Recognition"), Xie et al. (2017, "Aggregated Residual Transformations
for Deep Neural Networks"), Zagoruyko and Komodakis (2016, "Wide Residual Networks"), Hu et al. (2018,
"Squeeze-and-Excitation Networks"). The bottleneck has its stride on the 3x3 convolution. Keys and, from the same seed,
weights are those of ``torchvision.models``; the keys of ``seresnet50``, which it does not have, are timm's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..nn.init import init_weights
from .build import built

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "ResNet",
    "SqueezeExcitation",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "seresnet50",
    "wide_resnet50_2",
]


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, groups=groups, bias=False)


def _conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


class SqueezeExcitation(nn.Module):
    """``x * sigmoid(fc2(relu(fc1(mean(x)))))``, with 1x1 convolutions."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.fc2(torch.relu(self.fc1(squeezed))))


class BasicBlock(nn.Module):
    """``relu(bn2(conv3x3(relu(bn1(conv3x3(x))))) + shortcut(x))``."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        downsample: nn.Module | None,
        groups: int,
        base_width: int,
        reduction: int = 0,
    ) -> None:
        super().__init__()
        if groups != 1 or base_width != 64 or reduction:
            given = f"{groups}, {base_width} and {reduction}"
            raise ValueError(f"BasicBlock has groups=1, base_width=64 and reduction=0, got {given}")
        self.conv1 = _conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """``relu(se(bn3(conv1x1(relu(bn2(conv3x3(relu(bn1(conv1x1(x))))))))) + shortcut(x))``, ``se`` if there is one."""

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        downsample: nn.Module | None,
        groups: int,
        base_width: int,
        reduction: int = 0,
    ) -> None:
        super().__init__()
        width = channels * base_width // 64 * groups
        self.conv1 = _conv1x1(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width, stride, groups)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv1x1(width, channels * self.expansion)
        self.bn3 = nn.BatchNorm2d(channels * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.se = SqueezeExcitation(channels * self.expansion, reduction) if reduction else None
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.se is not None:
            out = self.se(out)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """A stem, four stages of residual blocks, and a linear classifier.

    Args:
        block: :class:`BasicBlock` or :class:`Bottleneck`.
        layers: how many blocks each stage has.
        groups: of the bottleneck's 3x3 convolution (cardinality).
        base_width: the width of the first stage's 3x3 convolution, per group (64 for a ResNet).
        reduction: of the bottleneck's squeeze-and-excitation; without one if 0.
        zero_init_residual: start every block as its shortcut: the last norm's weight is zero.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, int, int, int],
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        groups: int = 1,
        base_width: int = 64,
        reduction: int = 0,
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        self._channels = 64
        self._options = (groups, base_width, reduction)
        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._stage(block, 64, layers[0], stride=1)
        self.layer2 = self._stage(block, 128, layers[1], stride=2)
        self.layer3 = self._stage(block, 256, layers[2], stride=2)
        self.layer4 = self._stage(block, 512, layers[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        init_weights(self, zero_last_gamma=zero_init_residual)

    def _stage(self, block: type[BasicBlock] | type[Bottleneck], channels: int, count: int, stride: int) -> nn.Module:
        out_channels = channels * block.expansion
        downsample = None
        if stride != 1 or self._channels != out_channels:
            downsample = nn.Sequential(_conv1x1(self._channels, out_channels, stride), nn.BatchNorm2d(out_channels))
        blocks = [block(self._channels, channels, stride, downsample, *self._options)]
        self._channels = out_channels
        blocks += [block(out_channels, channels, 1, None, *self._options) for _ in range(1, count)]
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def _resnet(
    block: type[BasicBlock] | type[Bottleneck], layers: tuple[int, int, int, int], fused: bool, **options: int
) -> ResNet:
    return built(ResNet(block, layers, **options), fused)


def resnet18(*, fused: bool = True, **options: int) -> ResNet:
    """ResNet-18; ``options`` as in :class:`ResNet`."""
    return _resnet(BasicBlock, (2, 2, 2, 2), fused, **options)


def resnet34(*, fused: bool = True, **options: int) -> ResNet:
    """ResNet-34; ``options`` as in :class:`ResNet`."""
    return _resnet(BasicBlock, (3, 4, 6, 3), fused, **options)


def resnet50(*, fused: bool = True, **options: int) -> ResNet:
    """ResNet-50; ``options`` as in :class:`ResNet`."""
    return _resnet(Bottleneck, (3, 4, 6, 3), fused, **options)


def resnet101(*, fused: bool = True, **options: int) -> ResNet:
    """ResNet-101; ``options`` as in :class:`ResNet`."""
    return _resnet(Bottleneck, (3, 4, 23, 3), fused, **options)


def resnet152(*, fused: bool = True, **options: int) -> ResNet:
    """ResNet-152; ``options`` as in :class:`ResNet`."""
    return _resnet(Bottleneck, (3, 8, 36, 3), fused, **options)


def wide_resnet50_2(*, fused: bool = True, **options: int) -> ResNet:
    """Wide ResNet-50-2: ResNet-50 with 3x3 convolutions of twice the width; ``options`` as in :class:`ResNet`."""
    return _resnet(Bottleneck, (3, 4, 6, 3), fused, base_width=128, **options)


def resnext50_32x4d(*, fused: bool = True, **options: int) -> ResNet:
    """ResNeXt-50, 32 groups of 4 channels; ``options`` as in :class:`ResNet`."""
    return _resnet(Bottleneck, (3, 4, 6, 3), fused, groups=32, base_width=4, **options)


def resnext101_32x8d(*, fused: bool = True, **options: int) -> ResNet:
    """ResNeXt-101, 32 groups of 8 channels; ``options`` as in :class:`ResNet`."""
    return _resnet(Bottleneck, (3, 4, 23, 3), fused, groups=32, base_width=8, **options)


def seresnet50(*, fused: bool = True, **options: int) -> ResNet:
    """SE-ResNet-50, with a reduction of 16; ``options`` as in :class:`ResNet`. Keys are timm's."""
    return _resnet(Bottleneck, (3, 4, 6, 3), fused, reduction=16, **options)
