"""Grouped convolutions between two norms: ours, the vendor's bare, and the vendor's with stock PyTorch's passes around.

The vendor's is also timed without norm, activation and statistics: where ours is ahead of that, the passes around it
cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import select
from ..ops.activations import RELU
from ..ops.registry import OPS, Op
from ..testing import assert_within_budget
from .agreement import attempted
from .kernels import DIED
from .race import Entrant, race
from .results import Measurement
from .shapes import GROUPED

__all__ = ["CONTESTANTS", "KINDS", "Convolved", "check", "measure"]

KINDS = ("fprop", "dgrad", "wgrad")
CONTESTANTS = ("vendor", "eager", "cuda")
"""The bare convolution; with what surrounds it in stock PyTorch; the fused kernel, which does the same."""

_GROUPS = 32
_CHECKED = 2  # images


class Convolved:
    """A 3x3 convolution's passes in each contestant's way, on operands of its own.

    Args:
        shape: of the input, ``(N, C, H, W)``; the result has as many channels.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        stride: int,
        groups: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.shape, self.stride, self.groups, self.dtype, self.device = shape, stride, groups, dtype, device
        n, c, h, w = shape
        behind = (n, c, (h - 1) // stride + 1, (w - 1) // stride + 1)
        self.x, self.g, self.y = self._image(shape, 1), self._image(behind, 3), self._image(behind, 4)
        self.weight = self._image((c, c // groups, 3, 3), 2) / (9 * c / groups) ** 0.5
        self.out = torch.empty_like(self.weight)
        self.norm, self.rows = (self._drawn((4, c), seed).abs() + 0.1 for seed in (5, 6))

    def of(self, images: int) -> Convolved:
        """The same of other images."""
        return Convolved((images, *self.shape[1:]), self.stride, self.groups, self.dtype, self.device)

    def _drawn(self, shape: tuple[int, ...], seed: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, device=self.device, generator=generator)

    def _image(self, shape: tuple[int, int, int, int], seed: int) -> Tensor:
        return self._drawn(shape, seed).to(self.dtype).contiguous(memory_format=torch.channels_last)

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int]]:
        return [self.stride] * 2, [1, 1], [1, 1]

    def op(self, kind: str) -> Op:
        return OPS[f"conv_fused_{kind}"]

    def arguments(self, kind: str) -> list[Any]:
        """Of :meth:`op`."""
        pending = (self.x, self.norm, RELU.code, RELU.param)
        gradient = (self.g, self.y, self.rows)
        return {
            "fprop": [*pending, self.weight, None, *self.geometry, True],
            "dgrad": [*gradient, self.weight, *pending, *self.geometry],
            "wgrad": [*gradient, *pending, *self.geometry, self.out],
        }[kind]

    def call(self, kind: str, contestant: str) -> Callable[[], Any]:
        if contestant == "vendor":
            return partial(self._vendor, kind)
        if contestant == "eager":
            return partial(self._eager, kind)
        return partial(self.op(kind).overload(contestant), *self.arguments(kind))

    def moved(self, kind: str) -> int:
        """Bytes of a single pass over the fused op's operands and results."""
        image = {
            "fprop": (self.x, self.y),
            "dgrad": (self.g, self.y, self.x, self.x),
            "wgrad": (self.g, self.y, self.x),
        }
        return sum(t.nbytes for t in (*image[kind], self.weight))

    @property
    def flops(self) -> int:
        """Two per multiply-add."""
        return 2 * self.y.numel() * 9 * (self.shape[1] // self.groups)

    def _vendor(self, kind: str) -> Any:
        if kind == "fprop":
            return torch.conv2d(self.x, self.weight, None, *self.geometry, self.groups)
        return self._gradient(kind, self.g, self.x)

    def _eager(self, kind: str) -> Any:
        mean, rstd, scale, shift = (row[:, None, None].to(self.dtype) for row in self.norm)
        z = torch.relu(scale * self.x + shift)
        if kind == "fprop":
            y = torch.conv2d(z, self.weight, None, *self.geometry, self.groups)
            return y, torch.var_mean(y.float(), (0, 2, 3))
        outer, slope, centre, offset = (row[:, None, None].to(self.dtype) for row in self.rows)
        gradient = self._gradient(kind, outer * self.g - slope * (self.y - centre) - offset, z)
        if kind == "wgrad":
            return gradient
        dx = torch.where(z > 0, gradient[0], 0)
        return dx, dx.sum((0, 2, 3)), (dx * ((self.x - mean) * rstd)).sum((0, 2, 3))

    def _gradient(self, kind: str, g: Tensor, x: Tensor) -> Any:
        mask = (kind == "dgrad", kind == "wgrad", False)
        rest = (False, [0, 0], self.groups, mask)
        return torch.ops.aten.convolution_backward(g, x, self.weight, None, *self.geometry, *rest)


def check(convolved: Convolved, kind: str, backend: str) -> str:
    """``"ok"`` where a backend's results are within the budget, on a few images of the same kind; or what is not."""
    few = convolved.of(_CHECKED)
    op, arguments = few.op(kind), few.arguments(kind)
    ours, plain = (_results(op, name, arguments) for name in (backend, "reference"))
    exact = _results(op, "reference", [a.double() if isinstance(a, Tensor) else a for a in arguments])
    try:
        for i, results in enumerate(zip(ours, plain, exact, strict=True)):
            assert_within_budget(*results, name=f"result {i}")
    except AssertionError as error:
        return f"RED: {error}"
    return "ok"


def _results(op: Op, backend: str, arguments: list[Any]) -> list[Tensor]:
    """What an op returns, or writes to its last argument."""
    returned = op.overload(backend)(*arguments)
    return [arguments[-1].clone()] if returned is None else list(returned)


def measure(
    batch: int,
    most: tuple[int, int] | None,
    dtype: torch.dtype,
    device: torch.device,
    turns: int,
    begin: Callable[[str], bool] = lambda contestant: True,
) -> Iterator[Measurement]:
    """ResNeXt-50's: every pass by every contestant.

    Args:
        most: channels and height, in a smoke test.
        begin: as in :func:`.kernels.measure`.
    """
    for channels, size, stride in GROUPED:
        groups = _GROUPS
        if most is not None:
            groups = max(2, min(groups, most[0] * _GROUPS // channels))
            channels, size = groups * (channels // _GROUPS), min(size, most[1])
        convolved = Convolved((batch, channels, size, size), stride, groups, dtype, device)
        for kind in KINDS:
            entrants = [_entrant(convolved, kind, name, begin) for name in CONTESTANTS]
            for finish in race(entrants, turns=turns, warmup=3, sample_seconds=2e-3, device=device):
                yield finish.measurement


def _entrant(convolved: Convolved, kind: str, contestant: str, begin: Callable[[str], bool]) -> Entrant:
    about = Measurement(
        "op",
        f"conv {kind}",
        "forward" if kind == "fprop" else "backward",
        str(convolved.dtype).removeprefix("torch."),
        convolved.shape,
        contestant,
        variant=f"3x3, {convolved.groups} groups, stride {convolved.stride}",
        baseline=contestant == "vendor",
        moved=convolved.moved(kind),
        flops=convolved.flops,
    )
    if contestant != "cuda":
        return Entrant(about, convolved.call(kind, contestant))
    device = torch.device(convolved.device)
    if reason := select.why_not("cuda", device.type, convolved.dtype):
        return Entrant(replace(about, missing=reason))
    call = convolved.call(kind, contestant)

    def right() -> str:
        call()  # on all images, as it is timed
        return check(convolved, kind, contestant)

    def verdict() -> str:
        found = attempted(right, device) if begin(f"conv {kind}, {contestant}") else DIED
        begin("")
        return found

    return Entrant(about, call, verdict)
