"""Grouped convolutions of ResNeXt-50 on a GPU, with what surrounds them, against cuDNN's with the same passes around.

``pytest bench/ops/test_conv_grouped.py``; a smoke test (``--benchmark-disable``) without a GPU runs the references. The
vendor's convolution is also timed bare, without norm, activation or statistics: where the fused pass is ahead of that,
the passes around it cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusedres import select
from fusedres.ops.activations import RELU
from fusedres.ops.registry import OPS, Op
from fusedres.testing import assert_within_budget, channels_last

FPROP, DGRAD, WGRAD = OPS["conv_fused_fprop"], OPS["conv_fused_dgrad"], OPS["conv_fused_wgrad"]
CONTESTANTS = ("vendor", "eager", "fused")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Images, channels, size and stride of the 3x3 convolutions of ResNeXt-50 32x4d, batch 256, and a depthwise one of
# EfficientNet's size.
RESNEXT = (
    (256, 128, 56, 1, 32),
    (256, 256, 56, 2, 32),
    (256, 256, 28, 1, 32),
    (256, 512, 28, 2, 32),
    (256, 512, 14, 1, 32),
    (256, 1024, 14, 2, 32),
    (256, 1024, 7, 1, 32),
    (256, 240, 28, 1, 240),
)

DEVICE = "cuda" if select.why_not("cuda", "cuda", torch.bfloat16) is None else "cpu"
BACKEND = "cuda" if DEVICE == "cuda" else "reference"


@pytest.fixture
def smoke(request) -> bool:
    """Whether nothing is timed, so that two small images will do."""
    return request.config.getoption("--benchmark-disable")


@pytest.fixture
def timed(benchmark, smoke) -> Callable[..., None]:
    """``timed(group, call, touched)``: a round is many calls, and the device is waited for at its end."""

    def run(group: str, call: Callable[[], Any], touched: int) -> None:
        if DEVICE == "cpu":
            if not smoke:
                pytest.skip(str(select.why_not("cuda", "cuda", torch.bfloat16)))
            benchmark.pedantic(call, rounds=1)
            return
        calls = 1 if smoke else 50

        def round_of_calls() -> None:
            for _ in range(calls):
                call()
            torch.cuda.synchronize()

        benchmark.group = group
        benchmark.pedantic(round_of_calls, rounds=9, iterations=1, warmup_rounds=2)
        if benchmark.stats is None:
            return
        seconds = benchmark.stats.stats.median / calls
        benchmark.extra_info.update(device=torch.cuda.get_device_name(), microseconds=round(1e6 * seconds, 1))
        benchmark.extra_info["GB/s"] = round(touched / seconds / 1e9, 1)

    return run


class Operands:
    """One convolution's operands, and its passes in each contestant's way."""

    def __init__(self, images: int, c: int, size: int, stride: int, groups: int, dtype: torch.dtype) -> None:
        after = (size - 1) // stride + 1
        shape, behind = (images, c, size, size), (images, c, after, after)
        self.geometry = ([stride, stride], [1, 1], [1, 1])
        self.groups = groups
        self.x = channels_last(shape, dtype).to(DEVICE)
        self.weight = channels_last((c, c // groups, 3, 3), dtype, 2).to(DEVICE) / (9 * c / groups) ** 0.5
        self.g, self.y = (channels_last(behind, dtype, seed).to(DEVICE) for seed in (3, 4))
        self.norm, self.rows = (
            channels_last((4, c, 1, 1), seed=seed)[..., 0, 0].abs().to(DEVICE) + 0.1 for seed in (5, 6)
        )
        self.out = torch.empty_like(self.weight)
        self.pending = (self.x, self.norm, RELU.code, RELU.param)

    def arguments(self, kind: str) -> tuple[Any, list[Any]]:
        gradient = (self.g, self.y, self.rows)
        return {
            "fprop": (FPROP, [*self.pending, self.weight, None, *self.geometry, True]),
            "dgrad": (DGRAD, [*gradient, self.weight, *self.pending, *self.geometry]),
            "wgrad": (WGRAD, [*gradient, *self.pending, *self.geometry, self.out]),
        }[kind]

    def vendor(self, kind: str) -> Any:
        if kind == "fprop":
            return torch.conv2d(self.x, self.weight, None, *self.geometry, self.groups)
        return self._gradient(kind, self.g, self.x)

    def eager(self, kind: str) -> Any:
        """What stock PyTorch runs for the same: a pass for each norm and activation."""
        mean, rstd, scale, shift = (row[:, None, None].to(self.x.dtype) for row in self.norm)
        z = torch.relu(scale * self.x + shift)
        if kind == "fprop":
            y = torch.conv2d(z, self.weight, None, *self.geometry, self.groups)
            return y, torch.var_mean(y.float(), (0, 2, 3))
        outer, slope, centre, offset = (row[:, None, None].to(self.x.dtype) for row in self.rows)
        dz = self._gradient(kind, outer * self.g - slope * (self.y - centre) - offset, z)
        if kind == "wgrad":
            return dz
        dx = torch.where(z > 0, dz[0], 0)
        return dx, dx.sum((0, 2, 3)), (dx * ((self.x - mean) * rstd)).sum((0, 2, 3))

    def _gradient(self, kind: str, g: torch.Tensor, x: torch.Tensor) -> Any:
        mask = (kind == "dgrad", kind == "wgrad", False)
        geometry = (*self.geometry, False, [0, 0], self.groups)
        return torch.ops.aten.convolution_backward(g, x, self.weight, None, *geometry, mask)


def results(op: Op, backend: str, arguments: list[Any], wide: bool) -> list[torch.Tensor]:
    """What an op returns or writes, on these operands or on the same in float64."""
    given = [a.double() if wide and isinstance(a, torch.Tensor) else a for a in arguments]
    returned = op.overload(backend)(*given)
    return [given[-1].clone()] if returned is None else list(returned)


def check(kind: str, *case: Any) -> None:
    op, arguments = Operands(*case).arguments(kind)
    found = (
        results(op, backend, arguments, wide)
        for backend, wide in ((BACKEND, False), ("reference", False), ("reference", True))
    )
    for i, (ours, plain, exact) in enumerate(zip(*found)):
        assert_within_budget(ours, plain, exact, f"{kind}, result {i}")


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("kind", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("images", "channels", "size", "stride", "groups"), RESNEXT)
def test_conv_grouped(timed, smoke, images, channels, size, stride, groups, dtype, kind, contestant):
    case = (channels, min(size, 7) if smoke else size, stride, groups, DTYPES[dtype])
    if contestant == "fused":
        check(kind, 2, *case)
    operands = Operands(2 if smoke else images, *case)
    op, arguments = operands.arguments(kind)
    calls = {
        "vendor": lambda: operands.vendor(kind),
        "eager": lambda: operands.eager(kind),
        "fused": lambda: op.overload(BACKEND)(*arguments),
    }
    read = {"fprop": (operands.y,), "dgrad": (operands.g, operands.y, operands.x), "wgrad": (operands.g, operands.y)}
    touched = sum(t.nbytes for t in (operands.x, operands.weight, *read[kind]))
    name = f"{images}x{channels}x{size}x{size}, {groups} groups, stride {stride}, {dtype}"
    timed(f"{kind} {name}", calls[contestant], touched)
