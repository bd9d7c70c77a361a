"""Checks of what the public functions are given: they raise before any kernel runs, naming the argument and the shapes.

Wrong types and dtypes raise TypeError; wrong shapes, devices and values raise ValueError.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .bn_stats import statistics_dtype
from .conv import ConvGeometry, geometry, output_size

__all__ = ["Checked", "check_floating", "check_input"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Shape = tuple[int, ...]


def check_floating(op: str, x: Any, name: str = "x") -> None:
    """Checks that ``x`` is a tensor of a dtype that the ops compute in."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{op}: {name} must be of a dtype among {', '.join(map(str, _DTYPES))}, got {x.dtype}")


def check_input(op: str, x: Any, name: str = "x") -> Checked:
    """Checks an input ``[N, C, H, W]``; the result checks the operands that meet it."""
    check_floating(op, x, name)
    if x.dim() != 4:
        raise ValueError(f"{op}: {name} must have the 4 dimensions [N, C, H, W], got shape {tuple(x.shape)}")
    return Checked(op, name, x, tuple(x.shape))


class Checked(NamedTuple):
    """An input that passed, and the shape of the value that the steps so far have made of it."""

    op: str
    name: str
    x: Tensor
    shape: Shape

    def conv(
        self, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any, prefix: str = ""
    ) -> tuple[Checked, ConvGeometry]:
        """Checks a convolution of the present value; returns the value behind it."""
        self._tensor(f"{prefix}weight", weight, self._compute_dtypes())
        if weight.dim() != 4:
            raise self._misfit(f"{prefix}weight", weight.shape, "it must have the 4 dimensions [K, C / groups, R, S]")
        for name, value, least in (("stride", stride, 1), ("dilation", dilation, 1), ("padding", padding, 0)):
            self._pair(prefix + name, value, least)
        if not isinstance(groups, int) or groups < 1 or weight.shape[0] % groups:
            raise self._misfit(f"{prefix}weight", weight.shape, f"groups={groups} must divide its {weight.shape[0]}")
        if weight.shape[1] * groups != self.shape[1]:
            expects = f"{weight.shape[1]} channels in each of {groups} groups against {self.shape[1]} channels"
            raise self._misfit(f"{prefix}weight", weight.shape, expects)
        if bias is not None:
            self._vector(f"{prefix}bias", bias, weight.shape[0], self._compute_dtypes())
        kernel = (weight.shape[2], weight.shape[3])
        g = geometry(stride, padding, dilation, groups, kernel)
        size = output_size((self.shape[2], self.shape[3]), kernel, g)
        if min(size) < 1:
            raise self._misfit(f"{prefix}weight", weight.shape, f"the result would have the size {size}")
        return self._replace(shape=(self.shape[0], weight.shape[0], *size)), g

    def norm(
        self,
        gamma: Any,
        beta: Any,
        running_mean: Any,
        running_var: Any,
        training: bool,
        momentum: Any,
        prefix: str = "",
    ) -> None:
        """Checks a batch norm of the present value."""
        names = ("gamma", "beta", "running_mean", "running_var")
        for name, value in zip(names, (gamma, beta, running_mean, running_var)):
            if value is not None:
                self._vector(prefix + name, value, self.shape[1], self._norm_dtypes())
        if not training and (running_mean is None or running_var is None):
            missing = "running_mean" if running_mean is None else "running_var"
            raise ValueError(f"{self.op}: {prefix}{missing} must be given when training=False")
        if not isinstance(momentum, (int, float)):
            raise TypeError(f"{self.op}: {prefix}momentum must be a number, got {type(momentum).__name__}")

    def residual(self, residual: Any, name: str = "residual", *, dtype: torch.dtype | None = None) -> None:
        """Checks the other operand of a join with the present value."""
        self._tensor(name, residual, self._compute_dtypes() if dtype is None else (dtype,))
        if tuple(residual.shape) != self.shape:
            raise self._misfit(name, residual.shape, f"it is added to a tensor of shape {self.shape}")

    def alike(self, name: str, value: Any) -> None:
        """Checks an operand that meets the present value element by element."""
        self._tensor(name, value, self._compute_dtypes())
        if tuple(value.shape) != self.shape:
            raise self._misfit(name, value.shape, "the shapes must be the same")

    def vector(self, name: str, value: Any) -> None:
        """Checks one factor or term per channel of the present value."""
        self._vector(name, value, self.shape[1], self._norm_dtypes())

    def _vector(self, name: str, value: Any, channels: int, dtypes: tuple[torch.dtype, ...]) -> None:
        self._tensor(name, value, dtypes)
        if tuple(value.shape) != (channels,):
            raise self._misfit(name, value.shape, f"expected shape ({channels},)")

    def _tensor(self, name: str, value: Any, dtypes: tuple[torch.dtype, ...]) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"{self.op}: {name} must be a tensor, got {type(value).__name__}")
        if value.device != self.x.device:
            raise ValueError(f"{self.op}: {name} is on {value.device}, but {self.name} is on {self.x.device}")
        if value.dtype not in dtypes:
            expected = " or ".join(str(dtype) for dtype in dict.fromkeys(dtypes))
            raise TypeError(
                f"{self.op}: {name} of shape {tuple(value.shape)} is {value.dtype}, expected {expected} "
                f"beside {self.name} of shape {tuple(self.x.shape)} and {self.x.dtype}"
            )

    def _compute_dtypes(self) -> tuple[torch.dtype, ...]:
        return _DTYPES if self._autocast() else (self.x.dtype,)

    def _norm_dtypes(self) -> tuple[torch.dtype, ...]:
        return _DTYPES if self._autocast() else (self.x.dtype, statistics_dtype(self.x.dtype))

    def _autocast(self) -> bool:
        return torch.is_autocast_enabled(self.x.device.type)

    def _pair(self, name: str, value: Any, least: int) -> None:
        if isinstance(value, str):
            return  # string padding: the geometry knows it
        pair = (value, value) if isinstance(value, int) else value
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(v, int) for v in pair):
            raise TypeError(f"{self.op}: {name} must be an integer or two, got {value!r}")
        if min(pair) < least:
            raise ValueError(f"{self.op}: {name} must be at least {least}, got {value!r}")

    def _misfit(self, name: str, shape: torch.Size, why: str) -> ValueError:
        sides = f"{name} of shape {tuple(shape)} does not fit {self.name} of shape {tuple(self.x.shape)}"
        return ValueError(f"{self.op}: {sides}: {why}")
