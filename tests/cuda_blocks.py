"""Whole blocks on the CUDA backend, for the emulator and for a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import fusedres
from fusedres.testing import channels_last, compare

__all__ = ["BLOCKS", "check_block"]


def conv_bn(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class Residual(nn.Module):
    """``relu(branch(x) + shortcut(x))``."""

    def __init__(self, branch: list[nn.Module], shortcut: list[nn.Module]) -> None:
        super().__init__()
        self.branch, self.shortcut = nn.Sequential(*branch), nn.Sequential(*shortcut)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.branch(x) + self.shortcut(x))


class Excited(nn.Module):
    """A residual block with squeeze-excitation before its sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv_bn(16, 16, 3)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.relu, self.gate = nn.ReLU(), nn.Sigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn(self.conv(x))
        y = y * self.gate(self.fc2(self.relu(self.fc1(self.pool(y)))))
        return self.relu(y + x)


class PreActivation(nn.Module):
    """A wide residual block whose convolutions have biases."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(16), nn.BatchNorm2d(32)
        self.conv1, self.conv2 = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 16, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(torch.relu(self.bn1(x)))
        return self.conv2(torch.relu(self.bn2(y))) + x


class DenseLayer(nn.Sequential):
    """Two pre-activated convolutions, the second of which adds 8 channels."""

    def __init__(self, inputs: int) -> None:
        narrow, added = nn.Conv2d(inputs, 16, 1, bias=False), nn.Conv2d(16, 8, 3, padding=1, bias=False)
        super().__init__(nn.BatchNorm2d(inputs), nn.ReLU(), narrow, nn.BatchNorm2d(16), nn.ReLU(), added)


class Dense(nn.Module):
    """A dense block: every layer reads a slice of one buffer and writes the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([DenseLayer(16 + 8 * i) for i in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: Residual([*conv_bn(16, 16, 3), nn.ReLU(), *conv_bn(16, 16, 3)], []),
    "bottleneck with a projection": lambda: Residual(
        [*conv_bn(16, 8, 1), nn.ReLU(), *conv_bn(8, 8, 3, 2), nn.ReLU(), *conv_bn(8, 32, 1)], conv_bn(16, 32, 1, 2)
    ),
    "grouped": lambda: Residual(
        [*conv_bn(16, 32, 1), nn.SiLU(), *conv_bn(32, 32, 3, 1, 8), nn.SiLU(), *conv_bn(32, 16, 1)], []
    ),
    "squeeze-excitation": Excited,
    "pre-activation": PreActivation,
    "dense": Dense,
}


def check_block(name: str, dtype: torch.dtype, training: bool, device: str) -> None:
    torch.manual_seed(0)
    block = BLOCKS[name]().train(training).to(device, memory_format=torch.channels_last)

    def fuse(module: nn.Module) -> None:
        assert fusedres.patch(module, backend="cuda").fused

    def draw(seed: int) -> list[torch.Tensor]:
        return [channels_last((4, 16, 12, 12), seed=seed).to(device)]

    compare(block, fuse, draw, dtype=dtype).check()
