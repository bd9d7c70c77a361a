"""Whether the process grows: thousands of training steps and inferences, and the memory that is resident after them."""

from __future__ import annotations

import gc
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

from .. import env
from ..analysis.peak import resident
from ..nn import BottleneckBlock, DenseBottleneckBlock, PreActResidualBlock, SEBlock
from ..select import use_backend

__all__ = ["LIMIT", "Workload", "growth"]

LIMIT = 4 * 2**20
"""Bytes of growth that an allocator may make of nothing; a tensor leaked per step is soon more."""

_SAMPLES = 10


def growth(
    step: Callable[[], object],
    steps: int,
    on_sample: Callable[[int, int], None] = lambda *_: None,
    size: Callable[[], int] = resident,
) -> int:
    """By how many bytes ``steps`` calls of ``step`` let the process grow.

    The size, as a rule the resident memory, is read ten times on the way, first after a tenth of the calls, in which
    everything is allocated that is allocated once; the answer is the median of the last three readings less that of the
    first three.

    Args:
        on_sample: called with the number of calls so far and the size.
        size: of the process, in bytes.

    Raises:
        ValueError: for fewer than ten steps.
    """
    if steps < _SAMPLES:
        raise ValueError(f"steps must be at least {_SAMPLES}, got {steps}")
    readings = []
    for part in range(_SAMPLES):
        done = (part + 1) * steps // _SAMPLES
        for _ in range(done - part * steps // _SAMPLES):
            step()
        gc.collect()
        readings.append(size())
        on_sample(done, readings[-1])
    return round(median(readings[-3:]) - median(readings[:3]))


class Workload:
    """One call is a training step and an inference of one block of every kind, at sizes that change with the calls."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        blocks = [
            *(BottleneckBlock(8, 16, stride=2), PreActResidualBlock(16, 16), SEBlock(16, 16)),
            DenseBottleneckBlock(3, 16, 8, dropout=0.1),
        ]
        self.model = nn.Sequential(*blocks).to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3)
        self.backend = "cpu" if env.library_missing() is None else "reference"
        self.calls = 0

    def __call__(self) -> None:
        size = (10, 16, 13)[self.calls % 3]
        self.calls += 1
        x = torch.randn(2, 8, size, size).contiguous(memory_format=torch.channels_last)
        with use_backend(self.backend):
            self.optimizer.zero_grad()
            self.model.train()(x).square().mean().backward()
            self.optimizer.step()
            with torch.inference_mode():
                self.model.eval()(x)


# ---------------------------------------------------------------------------------------------------------------------
# python -m fusedres soak
# ---------------------------------------------------------------------------------------------------------------------


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=10_000, help="training steps, each with an inference")


def run(args: Namespace) -> int:
    def say(done: int, size: int) -> None:
        print(f"{done:>8} steps: {size / 2**20:8.1f} MiB resident", flush=True)

    grown = growth(Workload(), args.steps, say)
    verdict = "no growth" if grown < LIMIT else "GROWS"
    print(f"{verdict}: {grown / 2**20:+.1f} MiB over {args.steps} steps, {LIMIT / 2**20:.0f} MiB allowed")
    return int(grown >= LIMIT)
