"""Single kernels on a device: how close each comes to a copy's bandwidth, and to the device's arithmetic.

The passes are those of a ResNet-50's training step. Bytes are those of a single pass over every operand and result;
batch norm's and the joins' passes have no matrix product, so theirs is a fraction of the bandwidth alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import select
from ..ops.conv import ConvGeometry
from ..ops.join_pool import pool_window
from ..ops.registry import OPS
from ..testing import assert_within_budget
from ..tune import contestants as convolution_contestants
from ..tune import referee
from .agreement import attempted
from .results import Measurement
from .rotation import copies, rotating
from .timing import interleave, speedup

__all__ = ["SHAPES", "SMOKE_SHAPES", "measure"]

SHAPES = ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7))
"""Channels and height of what ResNet-50's norms see."""

SMOKE_SHAPES = ((16, 6),)

DIED = "RED: the process died in it"
"""The check of a contestant that :func:`measure` is told not to begin."""

_VENDOR = "vendor with passes around it"

_STEM = pool_window(3, 2, 1)
_MOST_SETS = 8
_RELU = 1
_BACKENDS = ("cpu", "cuda", "triton", "reference")
_ONE, _THREE = ConvGeometry((1, 1), (0, 0), (1, 1), 1), ConvGeometry((1, 1), (1, 1), (1, 1), 1)
_CONVOLUTIONS = (
    (64, 56, 256, (1, 1), _ONE),
    (256, 56, 64, (1, 1), _ONE),
    (64, 56, 64, (3, 3), _THREE),
    (1024, 14, 256, (1, 1), _ONE),
    (256, 14, 256, (3, 3), _THREE),
)
"""Channels, height, filters, kernel size and geometry."""


@dataclass(frozen=True)
class _Pass:
    """One call of an op: its operands, and the bytes that a single pass over them and its results moves."""

    op: str
    arguments: tuple[Any, ...]
    moved: int


def measure(
    batch: int,
    shapes: tuple[tuple[int, int], ...],
    dtype: torch.dtype,
    device: torch.device,
    turns: int,
    begin: Callable[[str], bool] = lambda contestant: True,
) -> Iterator[Measurement]:
    """Every pass on every backend that runs here, and a copy of as many bytes; then the convolutions, ours and the
    vendor's.

    Args:
        begin: told which op of which backend is first called now, or an empty name where none is, and says whether it
            may be.
    """
    for channels, size in shapes:
        shape = (batch, channels, size, size)
        sets = [list(_passes(shape, dtype, device, seed)) for seed in range(_sets(shape, dtype, device))]
        for same in zip(*sets):
            yield from _measure_pass(same, shape, dtype, device, turns, begin)
    if select.why_not("triton", device.type, dtype) is None:
        for channels, size, filters, kernel, geometry in _CONVOLUTIONS:
            for kind in ("fprop", "dgrad", "wgrad"):
                shape = (batch, channels, size, size)
                yield from _measure_convolution(kind, shape, filters, kernel, geometry, dtype, device, turns, begin)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics and joins
# ---------------------------------------------------------------------------------------------------------------------


def _sets(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> int:
    """How many sets of operands, so that a call finds none of its own in a cache."""
    return copies(math.prod(shape) * dtype.itemsize, device, most=_MOST_SETS)


def _passes(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, seed: int) -> Iterator[_Pass]:
    grad, y, residual = (_image(shape, dtype, device, 3 * seed + i) for i in range(3))
    count = float(y.numel() // shape[1])
    norm = _rows(y, count)
    operands = (y, norm, residual, None, _RELU, 0.0)
    sums = OPS["join_backward_reduce"].overload("reference")(grad, *operands, False)[0]
    yield _Pass("bn_stats", (y,), y.nbytes)
    yield _Pass("join", operands, 3 * y.nbytes)
    yield _Pass("join_backward_reduce", (grad, *operands, False), 3 * y.nbytes)
    yield _Pass("join_backward_apply", (grad, *operands, sums, count, True, False, True), 5 * y.nbytes)
    # Without a norm, by whose rounding one backend takes another of two values than the next.
    pooled, taken = OPS["join_pool"].overload("reference")(y, None, _RELU, 0.0, *_STEM, True)
    moved = y.nbytes + pooled.nbytes + taken.nbytes
    yield _Pass("join_pool", (y, None, _RELU, 0.0, *_STEM, True), moved)
    yield _Pass("join_pool_backward", (pooled, taken, y, *_STEM[:3]), moved)


def _image(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(shape, device=device, generator=generator).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def _rows(y: Tensor, count: float) -> Tensor:
    stats = OPS["bn_stats"].overload("reference")(y)
    return OPS["bn_norm"].overload("reference")(stats, count, None, None, None, None, 0.0, 1e-5)


def _measure_pass(
    same: Sequence[_Pass],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    turns: int,
    begin: Callable[[str], bool],
) -> Iterator[Measurement]:
    """One pass, of which there are several sets of operands."""
    each = same[0]
    op = OPS[each.op]
    plain = _measurement(each.op, "", shape, dtype, moved=each.moved)
    checks, calls = {}, {}
    for backend in _BACKENDS:
        if reason := _why_not(op, backend, device, dtype):
            if backend != "cpu" or device.type == "cpu":
                yield plain(contestant=backend, missing=reason)
            continue
        if begin(f"{each.op}, {backend}"):
            checks[backend] = attempted(partial(_check, op, backend, each.arguments), device)
        else:
            checks[backend] = DIED
        if checks[backend] == "ok":
            calls[backend] = rotating([partial(op.overload(backend), *one.arguments) for one in same])
    begin("")
    checks["copy"] = ""
    source, target = torch.zeros(2, max(each.moved // 2, 1), dtype=torch.uint8, device=device)
    calls["copy"] = lambda: target.copy_(source)
    yield from _timed(plain, checks, calls, "reference", device, turns)


def _why_not(op: Any, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if backend != "reference" and backend not in op.kernels:
        return f"{op.name} has no kernel there"
    if backend == "triton":
        from .. import triton

        triton.load()
    return select.why_not(backend, device.type, dtype)


def _check(op: Any, backend: str, arguments: tuple[Any, ...]) -> str:
    """``"ok"``, or which result is over the error budget."""
    if backend == "reference":
        return "ok"
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
    found = [op.overload(backend)(*arguments), op.overload("reference")(*arguments), op.overload("reference")(*wide)]
    found = [(each,) if isinstance(each, Tensor) else each for each in found]
    try:
        for i, results in enumerate(zip(*found)):
            assert_within_budget(*results, name=f"result {i}")
    except AssertionError as error:
        return f"RED: {error}"
    return "ok"


# ---------------------------------------------------------------------------------------------------------------------
# Convolutions
# ---------------------------------------------------------------------------------------------------------------------


def _measure_convolution(
    kind: str,
    shape: tuple[int, int, int, int],
    filters: int,
    kernel: tuple[int, int],
    geometry: ConvGeometry,
    dtype: torch.dtype,
    device: torch.device,
    turns: int,
    begin: Callable[[str], bool],
) -> Iterator[Measurement]:
    from ..triton.tuning import bytes_and_flops, configuration, pose

    problem = pose(kind, dtype, shape, filters, kernel, geometry, True)
    moved, flops = bytes_and_flops(problem)
    variant = f"{kernel[0]}x{kernel[1]} to {filters}"
    plain = _measurement(f"conv {kind}", variant, shape, dtype, moved=moved, flops=flops)
    calls: dict[str, Callable[[], Any]] = {}

    def check() -> str:
        ours, vendor, exact = convolution_contestants(problem, device)
        right = referee(problem, vendor, exact)
        calls[_VENDOR] = vendor
        run = partial(ours, configuration(problem, device))
        if not right(run()):
            return "RED: over the error budget"
        calls["triton"] = run
        return "ok"

    checks = {"triton": attempted(check, device) if begin(f"conv {kind}, triton") else DIED}
    begin("")
    checks |= dict.fromkeys(calls.keys() - checks.keys(), "ok")
    yield from _timed(plain, checks, calls, _VENDOR, device, turns)


# ---------------------------------------------------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------------------------------------------------


def _measurement(
    subject: str, variant: str, shape: tuple[int, ...], dtype: torch.dtype, **amounts: int
) -> Callable[..., Measurement]:
    workload = "backward" if "backward" in subject or "grad" in subject else "forward"
    short = str(dtype).removeprefix("torch.")
    return partial(Measurement, "op", subject, workload, short, shape, variant=variant, **amounts)


def _timed(
    plain: Callable[..., Measurement],
    checks: dict[str, str],
    calls: dict[str, Callable[[], Any]],
    baseline: str,
    device: torch.device,
    turns: int,
) -> Iterator[Measurement]:
    times = interleave(calls, turns=turns, warmup=3, sample_seconds=2e-3, device=device) if calls else {}
    for name, check in checks.items():
        own = times.get(name)
        yield plain(
            contestant=name,
            check=check,
            seconds=None if own is None else own.to_dict(),
            speedup={other: speedup(times[other], own) for other in times if other != name} if own else {},
            baseline=name == baseline,
        )
