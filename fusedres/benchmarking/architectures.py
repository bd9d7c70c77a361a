"""``python -m fusedres bench --architectures``: training and inference of each kind of residual network, beside eager.

As in the other table, correctness comes first: a row whose check is red has no ratio. What is left of our step is told
too: the share of convolutions, which are the vendor library's (and our weight gradients), of the fused passes, and of
everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from .. import models
from ..nn import ODEBlock
from ..patch import patch
from .agreement import verdict
from .contest import contest
from .memory import saved_bytes, silent_errors
from .results import Goal, Measurement, Row, quantity
from .shapes import BATCH as BATCH_AND_RESOLUTION
from .workloads import INFERENCE_BF16, TRAIN_BF16, TRAIN_FP32, Batch, Workload, settle

__all__ = ["ARCHITECTURES", "HEAD", "Architecture", "Found", "cells", "measure", "ode_row"]

BATCH = BATCH_AND_RESOLUTION[0]
HEAD = (
    f"batch {BATCH}",
    "eager",
    "fusedres",
    "images/s",
    "over eager",
    "at least",
    "reached",
    "of our time: convolutions",
    "fused passes",
    "the rest",
    "check",
)
"""The columns of :func:`cells`."""

_CHECKED = (2, 64)
"""Images and resolution of the check against float64."""

KINDS = ("convolutions", "passes", "rest")
"""What :attr:`Row.shares` tells apart."""

_CONVOLUTIONS = ("convolution", "slow_conv", "conv_wgrad", "conv_depthwise")


@dataclass(frozen=True)
class Architecture:
    """A network with what its steps should reach.

    Attributes:
        make: builds it, unfused.
        resolution: of its images.
        goals: for each workload how many times faster than eager.
        saved: the share of eager's bytes that autograd should keep at most.
    """

    name: str
    make: Callable[[], nn.Module]
    resolution: int
    goals: dict[Workload, Goal]
    saved: Goal | None = None


def _goals(train_bf16: float, train_fp32: float = 1.15) -> dict[Workload, Goal]:
    return {TRAIN_BF16: Goal(train_bf16), TRAIN_FP32: Goal(train_fp32), INFERENCE_BF16: Goal(2.4)}


def _saved(share: float) -> Goal:
    return Goal(share, None, less_is_better=True)


ARCHITECTURES = (
    Architecture("pre-activation ResNet-50", partial(models.preresnet50, fused=False), 224, _goals(1.4), _saved(0.55)),
    Architecture("WRN-28-10", partial(models.wrn, 28, 10, num_classes=1000, fused=False), 32, _goals(1.3)),
    Architecture("ResNeXt-50 32x4d", partial(models.resnext50_32x4d, fused=False), 224, _goals(1.3)),
    Architecture("SE-ResNet-50", partial(models.seresnet50, fused=False), 224, _goals(1.5), _saved(0.70)),
    Architecture("DenseNet-121", partial(models.densenet121, fused=False), 224, _goals(1.6, 1.3), _saved(0.35)),
)


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, one string for each of :data:`HEAD`."""
    shares = (f"{100 * row.shares[kind]:.0f}%" if row.shares else "" for kind in KINDS)
    return (
        row.name,
        quantity(row.eager, row.unit),
        quantity(row.ours, row.unit),
        "" if row.images_per_second is None else f"{row.images_per_second:.1f}",
        row.over_eager,
        str(row.goal),
        row.reached,
        *shares,
        row.check,
    )


class Found(NamedTuple):
    """A row of the table, and the measurements that it was made from."""

    row: Row
    measurements: tuple[Measurement, ...] = ()


def measure(architecture: Architecture, train_turns: int, inference_turns: int) -> Iterator[Found]:
    """The rows of one network: every workload that has a goal, then the bytes saved for backward."""
    torch.manual_seed(0)
    model = architecture.make().to(memory_format=torch.channels_last)
    batches = Batch.several(BATCH, architecture.resolution)
    settle(model, batches[0].images)
    for workload, goal in architecture.goals.items():
        turns = train_turns if workload.training else inference_turns
        yield _workload_row(architecture, workload, goal, model, batches, turns)
    if architecture.saved is not None:
        yield Found(_bytes_row(architecture, architecture.saved, model, batches[0]))


def _images(architecture: Architecture) -> Callable[[int], Tensor]:
    size, resolution = _CHECKED
    return lambda seed: Batch.random(size, min(resolution, architecture.resolution), seed).images


def _workload_row(
    architecture: Architecture, workload: Workload, goal: Goal, model: nn.Module, batches: Sequence[Batch], turns: int
) -> Found:
    name = f"{architecture.name}: {workload.name}"
    checked = Batch(_images(architecture)(0), batches[0].classes[: _CHECKED[0]])
    finishes = contest(architecture.name, workload, model, batches, turns=turns, memory=True, checked=checked)
    measurements = tuple(f.measurement for f in finishes)
    eager, ours = measurements
    if ours.seconds is None:
        return Found(Row(name, "ms", goal, check=ours.check), measurements)
    step = workload.prepared(model)
    patch(step)
    row = Row(
        name,
        "ms",
        goal,
        eager=1e3 * eager.seconds["median"],
        ours=1e3 * ours.seconds["median"],
        ratio=ours.speedup[eager.contestant],
        images_per_second=ours.images_per_second,
        check=ours.check,
        spread={m.contestant: m.seconds for m in measurements},
        shares=_shares(workload.step(step, step, batches)),
    )
    return Found(row, measurements)


def _shares(step: Callable[[], object]) -> dict[str, float]:
    """Where a step's time goes, by kind of op."""
    step()  # the first one prepares
    with silent_errors(), profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    seconds = dict.fromkeys(KINDS, 0.0)
    for event in profiled.key_averages():
        seconds[_kind(event.key)] += event.self_cpu_time_total
    total = sum(seconds.values())
    return {kind: value / total for kind, value in seconds.items()}


def _kind(op: str) -> str:
    if any(part in op for part in _CONVOLUTIONS) and "evaluate_function" not in op:
        return "convolutions"
    return "passes" if op.startswith("fusedres::") else "rest"


def _bytes_row(architecture: Architecture, goal: Goal, model: nn.Module, batch: Batch) -> Row:
    name = f"{architecture.name}: bytes saved for backward, fp32"
    check = verdict(TRAIN_FP32.check(model, _images(architecture)))
    saved = []
    for fuses in (False, True):
        twin = TRAIN_FP32.prepared(model)
        if fuses:
            patch(twin)
        saved.append(saved_bytes(twin, lambda twin=twin: batch.loss(twin(batch.images))))
    stock, ours = saved
    ratio = ours / stock if check == "ok" else None
    return Row(name, "MB", goal, eager=stock / 1e6, ours=ours / 1e6, ratio=ratio, check=check)


class _Flow(nn.Module):
    """The right-hand side of a differential equation: two convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.conv2(torch.relu(self.conv1(torch.relu(x))))


def ode_row(few: int = 4, many: int = 32) -> Row:
    """What autograd keeps of an ``ODEBlock`` with the adjoint method: as much for many steps as for few."""
    x = torch.randn(BATCH, 16, 32, 32).contiguous(memory_format=torch.channels_last).requires_grad_()

    def saved(steps: int, adjoint: bool) -> int:
        block = ODEBlock(_Flow(16), method="rk4", adjoint=adjoint, step_size=1 / steps)
        return saved_bytes(block, lambda: block(x))

    plain, ours = saved(many, False), saved(many, True)
    check = "ok" if saved(few, True) == ours else f"RED: {saved(few, True)} bytes for {few} steps, {ours} for {many}"
    name = f"ODEBlock, {many} steps, adjoint beside none: bytes saved for backward"
    return Row(name, "MB", _saved(1.0), eager=plain / 1e6, ours=ours / 1e6, ratio=ours / plain, check=check)
