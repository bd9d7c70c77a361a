"""Pre-activation ResNets (He et al. 2016, "Identity Mappings in Deep Residual Networks").

Norm and ReLU come before each convolution, nothing follows an addition, and one more norm and ReLU come before the
classifier. Where the shape changes the shortcut is a 1x1 convolution of the block's normalised and activated input. The
bottleneck has its stride on the 3x3 convolution.

Keys are timm's: ``preresnet18`` to ``preresnet152`` load ``resnetv2_18`` to ``resnetv2_152``; the classifier is a 1x1
convolution, as there. The networks for small images, which timm does not have, follow the same names.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.init import init_weights
from .build import built

__all__ = [
    "PreActBasic",
    "PreActBottleneck",
    "PreResNet",
    "cifar_preresnet",
    "preresnet18",
    "preresnet34",
    "preresnet50",
    "preresnet101",
    "preresnet152",
]


class Projection(nn.Module):
    """A 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class PreActBasic(nn.Module):
    """``conv3x3(relu(norm2(conv3x3(z)))) + shortcut``, ``z = relu(norm1(x))``; the shortcut is ``x`` or a projection of
    ``z``."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        projects = stride != 1 or in_channels != out_channels
        self.downsample = Projection(in_channels, out_channels, stride) if projects else None
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(x))
        shortcut = x if self.downsample is None else self.downsample(out)
        out = self.conv1(out)
        out = self.conv2(F.relu(self.norm2(out)))
        return out + shortcut


class PreActBottleneck(nn.Module):
    """``conv1x1(relu(norm3(conv3x3(relu(norm2(conv1x1(z))))))) + shortcut``, ``z = relu(norm1(x))``; the shortcut is
    ``x`` or a projection of ``z``."""

    expansion = 4

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        channels = out_channels // self.expansion
        projects = stride != 1 or in_channels != out_channels
        self.downsample = Projection(in_channels, out_channels, stride) if projects else None
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(x))
        shortcut = x if self.downsample is None else self.downsample(out)
        out = self.conv1(out)
        out = self.conv2(F.relu(self.norm2(out)))
        out = self.conv3(F.relu(self.norm3(out)))
        return out + shortcut


class Stage(nn.Module):
    """Blocks, one after the other."""

    def __init__(
        self,
        block: type[PreActBasic] | type[PreActBottleneck],
        in_channels: int,
        out_channels: int,
        count: int,
        stride: int,
    ) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            block(in_channels, out_channels, stride), *(block(out_channels, out_channels) for _ in range(1, count))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class Head(nn.Module):
    """The mean over the image, and a linear classifier that is a 1x1 convolution."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3), keepdim=True)).flatten(1)


class PreResNet(nn.Module):
    """A stem, stages of pre-activation blocks, a norm, and a classifier.

    Args:
        block: :class:`PreActBasic` or :class:`PreActBottleneck`.
        layers: how many blocks each stage has.
        channels: of each stage's output.
        stem_channels: of the stem.
        small_images: a 3x3 stem without stride, in the place of a 7x7 convolution with stride 2 and a pooling.
        zero_init_residual: start every block as its shortcut: the last norm's weight is zero.
    """

    def __init__(
        self,
        block: type[PreActBasic] | type[PreActBottleneck],
        layers: tuple[int, ...],
        channels: tuple[int, ...],
        *,
        stem_channels: int = 64,
        num_classes: int = 1000,
        in_channels: int = 3,
        small_images: bool = False,
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential()
        size, stride = (3, 1) if small_images else (7, 2)
        self.stem.conv = nn.Conv2d(in_channels, stem_channels, size, stride, padding=size // 2, bias=False)
        if not small_images:
            self.stem.pool = nn.MaxPool2d(3, stride=2, padding=1)
        widths = (stem_channels, *channels)
        self.stages = nn.Sequential(
            *(Stage(block, widths[i], widths[i + 1], n, 1 if i == 0 else 2) for i, n in enumerate(layers))
        )
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = Head(widths[-1], num_classes)
        init_weights(self, zero_last_gamma=zero_init_residual)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.stem(x))
        return self.head(F.relu(self.norm(x)))


def _preresnet(
    block: type[PreActBasic] | type[PreActBottleneck], layers: tuple[int, ...], fused: bool, **options: int
) -> PreResNet:
    channels = (64, 128, 256, 512) if block is PreActBasic else (256, 512, 1024, 2048)
    return built(PreResNet(block, layers, channels, **options), fused)


def preresnet18(*, fused: bool = True, **options: int) -> PreResNet:
    """Pre-activation ResNet-18, timm's ``resnetv2_18``; ``options`` as in :class:`PreResNet`."""
    return _preresnet(PreActBasic, (2, 2, 2, 2), fused, **options)


def preresnet34(*, fused: bool = True, **options: int) -> PreResNet:
    """Pre-activation ResNet-34, timm's ``resnetv2_34``; ``options`` as in :class:`PreResNet`."""
    return _preresnet(PreActBasic, (3, 4, 6, 3), fused, **options)


def preresnet50(*, fused: bool = True, **options: int) -> PreResNet:
    """Pre-activation ResNet-50, timm's ``resnetv2_50``; ``options`` as in :class:`PreResNet`."""
    return _preresnet(PreActBottleneck, (3, 4, 6, 3), fused, **options)


def preresnet101(*, fused: bool = True, **options: int) -> PreResNet:
    """Pre-activation ResNet-101, timm's ``resnetv2_101``; ``options`` as in :class:`PreResNet`."""
    return _preresnet(PreActBottleneck, (3, 4, 23, 3), fused, **options)


def preresnet152(*, fused: bool = True, **options: int) -> PreResNet:
    """Pre-activation ResNet-152, timm's ``resnetv2_152``; ``options`` as in :class:`PreResNet`."""
    return _preresnet(PreActBottleneck, (3, 8, 36, 3), fused, **options)


def cifar_preresnet(depth: int = 164, *, num_classes: int = 10, fused: bool = True, **options: int) -> PreResNet:
    """A pre-activation ResNet of ``depth`` layers for small images: 164 and 1001 in the paper (their table 4).

    Three stages of ``n`` bottlenecks with 64, 128 and 256 channels behind a 3x3 stem with 16. ``options`` as in
    :class:`PreResNet`.

    Raises:
        ValueError: for a depth that is not ``9n + 2``.
    """
    n, remainder = divmod(depth - 2, 9)
    if n < 1 or remainder:
        raise ValueError(f"depth must be 9n + 2 (11, 20, 164, 1001, ...), got {depth}")
    options = {"num_classes": num_classes, "stem_channels": 16, "small_images": True, **options}
    return built(PreResNet(PreActBottleneck, (n, n, n), (64, 128, 256), **options), fused)
