"""The shapes that the command and the suites in ``bench/`` measure, in one place."""

from __future__ import annotations

__all__ = [
    "ACTIVATIONS",
    "BATCH",
    "BLOCK_INPUTS",
    "CHANNELS",
    "MODIFIED",
    "NETWORKS",
    "SMOKE_BATCH",
    "WEIGHT_GRADIENTS",
    "name_of",
]

BATCH = (8, 224)
"""Images and their resolution, for whole networks."""

SMOKE_BATCH = (2, 64)

ACTIVATIONS = (
    (8, 64, 112, 112),
    (8, 256, 56, 56),
    (8, 512, 28, 28),
    (8, 1024, 14, 14),
    (8, 2048, 7, 7),
    (64, 16, 32, 32),
    (1, 64, 7, 7),
)
"""What a norm or a join of ResNet-50 sees, one of a CIFAR ResNet, and a very small one."""

MODIFIED = ((8, 256, 56, 56), (8, 1024, 14, 14), (64, 160, 32, 32))
"""For joins with a gain or a dropout and for slices: two of ResNet-50, one of a wide ResNet."""

BLOCK_INPUTS = (
    (1, 64, 7, 7),
    (1, 512, 7, 7),
    (1, 64, 56, 56),
    (2, 128, 28, 28),
    (8, 256, 14, 14),
    (8, 64, 56, 56),
    (32, 16, 32, 32),
)
"""What a block reads, down to the smallest."""

CHANNELS = (64, 512, 2048)

WEIGHT_GRADIENTS = (
    ((8, 64, 56, 56), 64, 1),
    ((8, 64, 56, 56), 64, 3),
    ((8, 64, 56, 56), 256, 1),
    ((8, 256, 14, 14), 256, 3),
    ((8, 1024, 14, 14), 256, 1),
    ((8, 512, 7, 7), 512, 3),
)
"""Input, output channels and kernel size of convolutions in ResNet-50."""

NETWORKS = (
    "resnet50",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "preresnet50",
    "seresnet50",
    "densenet121",
    "cifar_resnet",
)


def name_of(shape: tuple[int, ...]) -> str:
    """``8x64x56x56``, for groups and ids."""
    return "x".join(map(str, shape))
