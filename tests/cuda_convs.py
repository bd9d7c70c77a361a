"""Checks of the grouped convolutions against float64, for tensors of any device: the emulator's (the CPU) or a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from cuda_ops import DTYPES, compare, generator, wide
from torch import Tensor

from fusedres.ops.activations import ACTIVATIONS, Activation
from fusedres.ops.bn_stats import BN_STATS
from fusedres.ops.conv import ConvGeometry, output_size
from fusedres.ops.conv_fused import CONV_FUSED_FPROP, CONV_FUSED_JOIN
from fusedres.ops.conv_fused_backward import CONV_FUSED_DGRAD, CONV_FUSED_WGRAD
from fusedres.testing import assert_within_budget, channels_last, rms

__all__ = ["ACTS", "DTYPES", "GEOMETRIES", "GROUPS", "GroupedCase"]

Pair = tuple[int, int]

ACTS = [Activation(name, 0.125) for name in ACTIVATIONS]

# Channels, filters, groups: 4, 8, 16, 32 and 64 channels per group, depthwise, more channels than a block computes at
# once, groups that make more or fewer channels than they read, and sizes that cut the last block short.
GROUPS = [
    (16, 16, 4),
    (72, 72, 18),
    (64, 64, 8),
    (48, 48, 3),
    (64, 64, 2),
    (64, 64, 1),
    (96, 96, 1),
    (16, 48, 2),
    (48, 16, 2),
    (40, 40, 1),
    (24, 24, 24),
    (72, 72, 72),
]

GEOMETRIES = [
    {"kernel": (5, 5), "padding": (2, 2)},
    {"kernel": (7, 7), "padding": (3, 3), "stride": (2, 2)},
    {"kernel": (1, 1), "padding": (0, 0), "stride": (2, 2)},
    {"kernel": (2, 3), "padding": (3, 0), "stride": (3, 1)},
    {"dilation": (2, 3), "padding": (2, 3)},
    {"stride": (2, 2), "dilation": (2, 2), "padding": (0, 0)},
]


@dataclass
class GroupedCase:
    """A grouped convolution's operands, and the checks of its passes.

    Attributes:
        prologue: whether the input, or the output's gradient, is pending.
        pitch: channels of the buffers that the 4-d operands are slices of, beyond their own.
    """

    shape: tuple[int, int, int, int]
    filters: int
    groups: int
    dtype: torch.dtype = torch.bfloat16
    kernel: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair = (1, 1)
    dilation: Pair = (1, 1)
    prologue: bool = True
    act: Activation = field(default_factory=lambda: Activation("relu"))
    pitch: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        c = self.shape[1]
        self.x = self.tensor(self.shape, 1)
        draw = torch.randn(self.filters, c // self.groups, *self.kernel, generator=generator(2))
        self.weight = (draw / math.sqrt(draw[0].numel())).to(self.device, self.dtype)
        self.norm = self.rows(c, 3) if self.prologue else None
        self.bias = torch.randn(self.filters, generator=generator(4)).to(self.device)

    def tensor(self, shape: tuple[int, ...], seed: int) -> Tensor:
        """A channels_last tensor, or a slice of one."""
        n, c, h, w = shape
        drawn = channels_last((n, c + self.pitch, h, w), self.dtype, seed)[:, :c]
        room = torch.zeros(n, h, w, c + self.pitch, dtype=self.dtype, device=self.device).permute(0, 3, 1, 2)
        return room[:, :c].copy_(drawn)

    def rows(self, channels: int, seed: int) -> Tensor:
        rows = torch.randn(4, channels, generator=generator(seed))
        rows[1:3] = rows[1:3].abs() + 0.5
        return rows.to(self.device)

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int]]:
        return list(self.stride), list(self.padding), list(self.dilation)

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        g = ConvGeometry(self.stride, self.padding, self.dilation, self.groups)
        return (self.shape[0], self.filters, *output_size(self.shape[2:], self.kernel, g))

    @property
    def pending(self) -> tuple:
        return self.x, self.norm, *((self.act.code, self.act.param) if self.prologue else (0, 0.0))

    def check_fprop(self, bias: bool = True) -> Tensor:
        """The result, and its statistics, which are those of what was written: of the same rounded numbers."""
        args = (*self.pending, self.weight, self.bias if bias else None, *self.geometry, True)
        y, stats = CONV_FUSED_FPROP.overload("cuda")(*args)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert_within_budget(
            y, CONV_FUSED_FPROP.reference(*args)[0], CONV_FUSED_FPROP.reference(*wide(args))[0], str(self)
        )
        plain, exact = BN_STATS.reference(y), BN_STATS.reference(y.double())
        deviation = float((exact[1] / (y.numel() / y.shape[1])).mean().sqrt())
        for row, scale in ((0, deviation + rms(exact[0])), (1, None)):
            assert_within_budget(stats[row], plain[row], exact[row], f"{self}, row {row}", scale=scale)
        without, none = CONV_FUSED_FPROP.overload("cuda")(*args[:-1], False)
        assert torch.equal(without, y) and none.numel() == 0
        return y

    def check_join(self, residual: str = "affine", act: Activation | None = None) -> Tensor:
        act = act or self.act
        side = None if residual == "none" else self.tensor(self.out_shape, 5)
        res_norm = self.rows(self.filters, 6) if residual == "affine" else None
        args = (*self.pending, self.weight, self.bias, *self.geometry, self.rows(self.filters, 7), side, res_norm)
        (out,) = compare(str(self), CONV_FUSED_JOIN, (*args, act.code, act.param))
        return out

    @property
    def gradient(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The gradient behind the output's norm, the output, and the norm's rows; or the output's gradient alone."""
        g = self.tensor(self.out_shape, 8)
        if not self.prologue:
            return g, None, None
        return g, self.tensor(self.out_shape, 9), self.rows(self.filters, 10) * 0.5

    def leave_the_kinks(self) -> None:
        """Moves values of the input away from where two right answers have different gradients."""
        if self.act.name in ("identity", "silu", "gelu"):
            return
        for _ in range(60):
            z = self.x.double()
            if self.norm is not None:
                z = self.norm[2, :, None, None] * z + self.norm[3, :, None, None]
            near = torch.stack([(z - kink).abs() < 0.02 for kink in (-3.0, 0.0, 3.0, 6.0)]).any(0)
            if not near.any():
                return
            self.x[near] += 0.37
        raise AssertionError("some values stay at the kinks")

    def check_dgrad(self, addend: bool = False) -> Tensor:
        self.leave_the_kinks()
        more = self.tensor(self.shape, 11) if addend else None
        args = (*self.gradient, self.weight, *self.pending, *self.geometry, more)
        exact, _ = CONV_FUSED_DGRAD.reference(*wide(args))
        terms = rms(exact) * (self.x.numel() / self.shape[1]) ** 0.5  # the sums are of numbers that cancel
        dx, _ = compare(str(self), CONV_FUSED_DGRAD, args, (None, terms))
        assert dx.is_contiguous(memory_format=torch.channels_last)
        return dx

    def check_wgrad(self, out_dtype: torch.dtype | None = None) -> Tensor:
        results = []
        for overload, widen in (("cuda", False), ("reference", False), ("reference", True)):
            out = torch.full_like(self.weight, float("nan"), dtype=torch.float64 if widen else out_dtype)
            args = (*self.gradient, *self.pending, *self.geometry)
            CONV_FUSED_WGRAD.overload(overload)(*(wide(args) if widen else args), out)
            results.append(out)
        assert_within_budget(*results, str(self))
        return results[0]
