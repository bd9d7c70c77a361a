"""A network of continuous depth for small images: Chen et al. (2018, "Neural Ordinary Differential Equations", 3).

Residual blocks take the image down to a quarter of its size; an ODE block stands where a residual network has a stack
of blocks with the same shape; norm, average pooling and a linear classifier follow.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.ode import ODEBlock
from ..patch import patch

__all__ = ["DownsamplingBlock", "ODEFunction", "ODENet", "TimeConv2d", "odenet"]


def _norm(kind: str, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    groups = min(32, channels)
    if channels % groups:
        raise ValueError(f"norm='group' has {groups} groups, which must divide the channels, got {channels}")
    return nn.GroupNorm(groups, channels)


class TimeConv2d(nn.Module):
    """A 3x3 convolution that also sees the time, as one more channel in front of the others."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels + 1, out_channels, 3, padding=1)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.conv(torch.cat([torch.ones_like(x[:, :1]) * t, x], 1))


class ODEFunction(nn.Module):
    """``norm3(conv2(t, relu(norm2(conv1(t, relu(norm1(x)))))))``: the derivative of the state."""

    def __init__(self, channels: int, norm: str = "group") -> None:
        super().__init__()
        self.norm1 = _norm(norm, channels)
        self.conv1 = TimeConv2d(channels, channels)
        self.norm2 = _norm(norm, channels)
        self.conv2 = TimeConv2d(channels, channels)
        self.norm3 = _norm(norm, channels)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        out = self.conv1(t, F.relu(self.norm1(x)))
        out = self.conv2(t, F.relu(self.norm2(out)))
        return self.norm3(out)


class DownsamplingBlock(nn.Module):
    """A pre-activation block of stride two: ``conv2(relu(norm2(conv1(z)))) + shortcut(z)``, ``z = relu(norm1(x))``."""

    def __init__(self, channels: int, norm: str = "group") -> None:
        super().__init__()
        self.norm1 = _norm(norm, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False)
        self.norm2 = _norm(norm, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(channels, channels, 1, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        z = F.relu(self.norm1(x))
        out = self.conv2(F.relu(self.norm2(self.conv1(z))))
        return out + self.shortcut(z)


class ODENet(nn.Module):
    """Stem, two downsampling blocks, ODE block, classifier; arguments as in :func:`odenet`."""

    def __init__(self, num_classes: int, in_channels: int, channels: int, norm: str, **ode: Any) -> None:
        super().__init__()
        if norm not in ("group", "batch"):
            raise ValueError(f"norm must be 'group' or 'batch', got {norm!r}")
        self.stem = nn.Conv2d(in_channels, channels, 3)
        self.down = nn.Sequential(*(DownsamplingBlock(channels, norm) for _ in range(2)))
        self.ode = ODEBlock(ODEFunction(channels, norm), **ode)
        self.norm = _norm(norm, channels)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ode(self.down(self.stem(x)))
        return self.fc(F.relu(self.norm(x)).mean((2, 3)))


def odenet(
    *,
    num_classes: int = 10,
    in_channels: int = 1,
    channels: int = 64,
    norm: str = "group",
    method: str = "dopri5",
    adjoint: bool = False,
    rtol: float = 1e-3,
    atol: float = 1e-3,
    fused: bool = True,
    **options: Any,
) -> ODENet:
    """The ODE network of Chen et al. (2018, section 3) for MNIST, about 0.2 million parameters.

    Args:
        num_classes: the width of the classifier.
        in_channels: of the images.
        channels: everywhere inside.
        norm: ``"group"`` norms as in the paper, or ``"batch"`` norms, which :func:`fusedres.patch` knows. With the
            adjoint, batch norms in the ODE block update their running statistics in backward as well.
        method, adjoint, rtol, atol, options: of the :class:`fusedres.nn.ODEBlock`.
        fused: whether :func:`fusedres.patch` is applied to the convolutional blocks. The ODE block is the same.

    Raises:
        ValueError: for an unknown norm, and for channels that 32 groups do not divide.
    """
    solver = {"method": method, "adjoint": adjoint, "rtol": rtol, "atol": atol, **options}
    model = ODENet(num_classes, in_channels, channels, norm, **solver)
    if fused:
        patch(model)
    return model
