"""DenseNet-BC for images of about 224 x 224 (Huang et al. 2017, "Densely Connected Convolutional Networks", table 1).

Keys and, from the same seed, weights are those of ``torchvision.models``.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.init import init_weights
from .build import built

__all__ = ["DenseLayer", "DenseNet", "DenseStage", "densenet121", "densenet161", "densenet169", "densenet201"]


class DenseLayer(nn.Module):
    """``conv3x3(relu(norm2(conv1x1(relu(norm1(x))))))``: the new channels."""

    def __init__(self, in_channels: int, growth_rate: int, bn_size: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, bn_size * growth_rate, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(bn_size * growth_rate)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(bn_size * growth_rate, growth_rate, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout) if dropout else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.relu1(self.norm1(x)))
        out = self.conv2(self.relu2(self.norm2(out)))
        return out if self.dropout is None else self.dropout(out)


class DenseStage(nn.ModuleDict):
    """Layers that each read the channels of the input and of all layers before them; returns all channels."""

    def __init__(self, count: int, in_channels: int, growth_rate: int, bn_size: int, dropout: float) -> None:
        super().__init__()
        for i in range(count):
            self[f"denselayer{i + 1}"] = DenseLayer(in_channels + i * growth_rate, growth_rate, bn_size, dropout)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


def _transition(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            norm=nn.BatchNorm2d(in_channels),
            relu=nn.ReLU(inplace=True),
            conv=nn.Conv2d(in_channels, out_channels, 1, bias=False),
            pool=nn.AvgPool2d(2, stride=2),
        )
    )


class DenseNet(nn.Module):
    """A stem, dense stages with transitions between them, a norm, and a linear classifier.

    Args:
        growth_rate: channels that a layer adds (``k`` in the paper).
        layers: how many layers each stage has.
        stem_channels: of the stem.
        bn_size: channels between the two convolutions of a layer, over ``growth_rate``.
        dropout: the probability with which an element of a layer's output is dropped in training.
    """

    def __init__(
        self,
        growth_rate: int = 32,
        layers: tuple[int, ...] = (6, 12, 24, 16),
        stem_channels: int = 64,
        *,
        bn_size: int = 4,
        dropout: float = 0.0,
        num_classes: int = 1000,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        channels = stem_channels
        self.features = nn.Sequential(
            OrderedDict(
                conv0=nn.Conv2d(in_channels, channels, 7, stride=2, padding=3, bias=False),
                norm0=nn.BatchNorm2d(channels),
                relu0=nn.ReLU(inplace=True),
                pool0=nn.MaxPool2d(3, stride=2, padding=1),
            )
        )
        for i, count in enumerate(layers, 1):
            stage = DenseStage(count, channels, growth_rate, bn_size, dropout)
            self.features.add_module(f"denseblock{i}", stage)
            channels += count * growth_rate
            if i < len(layers):
                self.features.add_module(f"transition{i}", _transition(channels, channels // 2))
                channels //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, num_classes)
        init_weights(self, mode="fan_in")
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.features(x), inplace=True)
        return self.classifier(F.adaptive_avg_pool2d(out, (1, 1)).flatten(1))


def densenet121(*, fused: bool = True, **options: int) -> DenseNet:
    """DenseNet-121; ``options`` as in :class:`DenseNet`."""
    return built(DenseNet(32, (6, 12, 24, 16), 64, **options), fused)


def densenet161(*, fused: bool = True, **options: int) -> DenseNet:
    """DenseNet-161; ``options`` as in :class:`DenseNet`."""
    return built(DenseNet(48, (6, 12, 36, 24), 96, **options), fused)


def densenet169(*, fused: bool = True, **options: int) -> DenseNet:
    """DenseNet-169; ``options`` as in :class:`DenseNet`."""
    return built(DenseNet(32, (6, 12, 32, 32), 64, **options), fused)


def densenet201(*, fused: bool = True, **options: int) -> DenseNet:
    """DenseNet-201; ``options`` as in :class:`DenseNet`."""
    return built(DenseNet(32, (6, 12, 48, 32), 64, **options), fused)
