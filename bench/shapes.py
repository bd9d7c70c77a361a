"""Every shape that the suites measure, and where it comes from; a test holds each to occur in the network it is of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import nn

from fusedres import models
from fusedres.benchmarking.shapes import BATCH, BLOCK_INPUTS, name_of
from fusedres.benchmarking.shapes import GROUPED as RESNEXT

__all__ = [
    "ACTIVATIONS",
    "BLOCKS",
    "CHANNELS",
    "CONVOLUTIONS",
    "DEPTHWISE",
    "EPILOGUES",
    "GROUPED",
    "MODIFIED",
    "NETWORKS",
    "ODE_STATES",
    "ON_GPU",
    "SMOKE_BATCH",
    "SMOKE_BLOCK",
    "SMOKE_MOST",
    "SMOKE_STATE",
    "STEMS",
    "Convolution",
    "Network",
    "activations",
    "name_of",
]

Shape = tuple[int, int, int, int]


# ---------------------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------------------


class Network(NamedTuple):
    """A network, stock, and the batches that it is measured with: images and their resolution."""

    make: Callable[[], nn.Module]
    batches: tuple[tuple[int, int], ...]


def _imagenet(make: Callable[..., nn.Module], *batches: tuple[int, int]) -> Network:
    return Network(partial(make, fused=False), batches or (BATCH,))


NETWORKS = {
    "ResNet-50": _imagenet(models.resnet50, (1, 224), BATCH, (32, 224)),
    "ResNeXt-50": _imagenet(models.resnext50_32x4d),
    "WRN-50-2": _imagenet(models.wide_resnet50_2),
    "WRN-28-10": Network(partial(models.wrn, 28, 10, num_classes=1000, fused=False), ((16, 32),)),
    "DenseNet-121": _imagenet(models.densenet121),
    "SE-ResNet-50": _imagenet(models.seresnet50),
    "pre-activation ResNet-50": _imagenet(models.preresnet50),
    "CIFAR ResNet-20": Network(partial(models.cifar_resnet, 20, num_classes=1000, fused=False), ((128, 32),)),
    "CIFAR pre-activation ResNet-110": Network(
        partial(models.cifar_preresnet, 110, num_classes=1000, fused=False), ((32, 32),)
    ),
}

SMOKE_BATCH = (2, 64)


# ---------------------------------------------------------------------------------------------------------------------
# Activations: what a norm, a join or a pass over a tensor sees
# ---------------------------------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, tuple[Shape, ...]] = {
    "ResNet-50": ((8, 64, 112, 112), (8, 256, 56, 56), (8, 512, 28, 28), (8, 1024, 14, 14), (8, 2048, 7, 7)),
    "ResNeXt-50": ((8, 128, 56, 56),),
    "WRN-50-2": ((8, 512, 14, 14),),
    "WRN-28-10": ((16, 160, 32, 32),),
    "DenseNet-121": ((8, 128, 28, 28), (8, 160, 56, 56)),
    "SE-ResNet-50": ((1, 256, 56, 56),),
    "pre-activation ResNet-50": ((32, 64, 56, 56),),
    "CIFAR ResNet-20": ((128, 16, 32, 32), (1, 64, 8, 8)),
}
"""By the network whose norms read them, with batches of several sizes down to the smallest."""


def activations(*networks: str) -> tuple[Shape, ...]:
    """Those of some networks, or all, each once."""
    return tuple(dict.fromkeys(shape for name in networks or ACTIVATIONS for shape in ACTIVATIONS[name]))


MODIFIED: tuple[Shape, ...] = ((8, 256, 56, 56), (8, 1024, 14, 14), (16, 160, 32, 32))
"""For what is done to few of them: gains, dropout, slices, the other layout."""

STEMS = ACTIVATIONS["ResNet-50"][:1]
"""That a max pooling follows."""

CHANNELS = (64, 512, 2048)
"""Of norms of ResNet-50, for what is done to channels alone."""

ON_GPU: tuple[Shape, ...] = (
    (256, 256, 56, 56),
    (256, 64, 56, 56),
    (64, 64, 56, 56),
    (32, 256, 14, 14),
    (8, 2048, 7, 7),
    (2, 64, 7, 7),
)
"""Of ResNet-50, from far beyond a GPU's L2 cache to launch-bound."""

EPILOGUES: tuple[Shape, ...] = ((256, 64, 56, 56), (256, 128, 28, 28), (256, 256, 14, 14), (256, 512, 7, 7))
"""Inputs of ResNet-50's 3x3 convolutions with stride 1, batch 256."""

SMOKE_MOST: Shape = (2, 64, 7, 7)
"""The largest sizes in a smoke test."""


# ---------------------------------------------------------------------------------------------------------------------
# Convolutions
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Convolution:
    """Input, output channels, and geometry."""

    shape: Shape
    channels: int
    size: int
    stride: int = 1
    groups: int = 1

    @property
    def padding(self) -> list[int]:
        return [self.size // 2] * 2

    @property
    def out(self) -> Shape:
        """The shape of its result."""
        n, _, h, w = self.shape
        return (n, self.channels, *((side + 2 * (self.size // 2) - self.size) // self.stride + 1 for side in (h, w)))

    @property
    def flops(self) -> int:
        """Two per multiply-add."""
        n, channels, h, w = self.out
        return 2 * n * channels * h * w * self.shape[1] // self.groups * self.size**2

    def within(self, most: Shape) -> Convolution:
        """A smaller one of the same kind, with as many channels per group."""
        shape, groups = tuple(map(min, self.shape, most)), 1
        if self.groups > 1:
            groups = shape[1] * self.groups // self.shape[1]
        return Convolution(shape, min(self.channels, most[1]), self.size, self.stride, groups)

    def __str__(self) -> str:
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        groups = f", {self.groups} groups" if self.groups > 1 else ""
        return f"{name_of(self.shape)} to {self.channels}, {self.size}x{self.size}{stride}{groups}"


CONVOLUTIONS: dict[str, tuple[Convolution, ...]] = {
    "ResNet-50": (
        Convolution((8, 64, 56, 56), 64, 1),
        Convolution((8, 64, 56, 56), 64, 3),
        Convolution((8, 64, 56, 56), 256, 1),
        Convolution((8, 128, 56, 56), 128, 3, 2),
        Convolution((8, 256, 14, 14), 256, 3),
        Convolution((8, 1024, 14, 14), 256, 1),
        Convolution((8, 512, 7, 7), 512, 3),
    ),
    "WRN-28-10": (Convolution((16, 160, 32, 32), 160, 3),),
    "DenseNet-121": (Convolution((8, 128, 28, 28), 32, 3),),
    "CIFAR ResNet-20": (Convolution((128, 16, 32, 32), 16, 3),),
}
"""By network, those without groups."""

GROUPED: tuple[Convolution, ...] = tuple(
    Convolution((256, channels, size, size), channels, 3, stride, 32) for channels, size, stride in RESNEXT
)
"""ResNeXt-50's, batch 256; a GPU's alone. On a CPU they are measured in their blocks."""

DEPTHWISE = Convolution((256, 240, 28, 28), 240, 3, 1, 240)
"""Of EfficientNet-B0's channels and size, batch 256."""


# ---------------------------------------------------------------------------------------------------------------------
# Blocks, by their names in ``fusedres.benchmarking.grid``
# ---------------------------------------------------------------------------------------------------------------------

BLOCKS: dict[str, tuple[Shape, ...]] = {
    "conv-bn-relu": ((8, 64, 56, 56), (1, 64, 7, 7)),
    "basic": ((8, 64, 56, 56), (128, 16, 32, 32), (1, 512, 7, 7)),
    "bottleneck": ((8, 256, 56, 56), (8, 1024, 14, 14), (1, 2048, 7, 7)),
    "grouped bottleneck": ((8, 256, 56, 56), (8, 1024, 14, 14)),
    "bottleneck with squeeze-excitation": ((8, 256, 56, 56), (8, 1024, 14, 14)),
    "pre-activation bottleneck": ((8, 256, 56, 56), (8, 1024, 14, 14)),
    "wide": ((16, 160, 32, 32), (16, 640, 8, 8)),
    "dense": ((8, 64, 56, 56), (8, 256, 14, 14)),
}
"""What a block of each kind reads; the command's grid has every one on :data:`BLOCK_INPUTS`."""

SMOKE_BLOCK: Shape = max(BLOCK_INPUTS, key=lambda shape: shape[0] * shape[2])
"""Large enough not to run as stock, and narrow."""


# ---------------------------------------------------------------------------------------------------------------------
# Differential equations
# ---------------------------------------------------------------------------------------------------------------------

ODE_STATES: tuple[Shape, ...] = ((32, 64, 7, 7), (16, 64, 32, 32))
"""The state of Chen et al.'s (2018) network on MNIST, and one of a CIFAR network's first stage."""

SMOKE_STATE: Shape = (2, 32, 5, 5)
