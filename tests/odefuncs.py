"""Right-hand sides of differential equations, written as for torchdiffeq."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusedres.nn import ResidualBlock
from fusedres.ops import conv_bn_act

__all__ = ["Counting", "SmoothFused", "TimeConv", "fused_function", "oscillator"]


class TimeConv(nn.Module):
    """``4 conv(tanh(conv([t, x])))``: smooth, depends on time, strong enough for several steps."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels + 1, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        x = torch.cat([torch.ones_like(x[:, :1]) * t, x], 1)
        return 4 * self.conv2(torch.tanh(self.conv1(x)))


class Counting(nn.Module):
    """Counts the calls of a function, and remembers their times."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.times: list[float] = []

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        assert t.dim() == 0 and t.dtype == x.dtype
        self.times.append(t.item())
        return self.function(t, x)


class SmoothFused(nn.Module):
    """Fused ops without a kink, so that the solution depends on everything smoothly."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        conv, norm = self.conv, self.norm
        statistics = norm.running_mean, norm.running_var
        return (
            conv_bn_act(x, conv.weight, conv.bias, norm.weight, norm.bias, *statistics, padding=1, act="silu") - t * x
        )


class _Fused(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = ResidualBlock(channels)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.block(x)) - t * x


def fused_function(channels: int = 6) -> nn.Module:
    """A function around a fused residual block."""
    return _Fused(channels)


def oscillator(t: Tensor, x: Tensor) -> Tensor:
    """``x'' = -x`` over the last dimension, which holds ``x`` and ``x'``: a rotation by ``t``."""
    return torch.stack([x[..., 1], -x[..., 0]], -1)
