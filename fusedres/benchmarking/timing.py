"""Timing contestants against each other in one process.

The contestants take turns, so that whatever else the machine does meets all of them alike, and a ratio is taken turn by
turn before its median: slow drifts cancel.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch

__all__ = ["FEWEST_TURNS", "Timing", "interleave", "speedup"]

FEWEST_TURNS = 3
"""Whatever the time that is left: the median of fewer is an outlier's to move."""


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one value for each turn."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def minimum(self) -> float:
        return min(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third quartile."""
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        first, _, third = statistics.quantiles(self.samples, n=4, method="inclusive")
        return first, third

    def to_dict(self) -> dict[str, Any]:
        first, third = self.quartiles
        return {
            "median": self.median,
            "min": self.minimum,
            "q1": first,
            "q3": third,
            "turns": len(self.samples),
        }


def speedup(baseline: Timing, contestant: Timing) -> float:
    """How many times faster ``contestant`` is: the median over turns of the ratio within a turn.

    Raises:
        ValueError: for timings that were not taken turn by turn.
    """
    if len(baseline.samples) != len(contestant.samples):
        raise ValueError(f"timings of {len(baseline.samples)} and {len(contestant.samples)} turns do not pair up")
    return statistics.median(b / c for b, c in zip(baseline.samples, contestant.samples))


def interleave(
    contestants: Mapping[str, Callable[[], Any]],
    *,
    turns: int = 7,
    warmup: int = 2,
    sample_seconds: float = 0.0,
    device: torch.device | str = "cpu",
    left: Callable[[], float] | None = None,
    ready: Callable[[], Any] = lambda: None,
) -> dict[str, Timing]:
    """Times the contestants in turn, each turn in another order.

    Args:
        contestants: by name, what to call.
        turns: how many times each is measured.
        warmup: how many calls of each come before.
        sample_seconds: a measurement repeats the call, the same number of times for all, until the fastest of them
            takes about this long; a call's share of it is the sample.
        device: what a measurement waits for before it ends.
        left: seconds that there are; asked after the warm-up, which says what a turn takes. As many turns are measured
            as fit, :data:`FEWEST_TURNS` at least.
        ready: called before every measurement, as part of none: where several processes wait for each other.
    """
    measure = partial(_measure, ready=ready, finish=_finisher(torch.device(device)))
    warm = _warm_up(contestants, warmup, measure)
    repeats = max(1, round(sample_seconds / min(warm.values())))
    if left is not None:
        turns = int(min(turns, max(FEWEST_TURNS, left() / (repeats * sum(warm.values())))))
    names = list(contestants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    with _no_garbage_collection():
        for turn in range(turns):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                samples[name].append(measure(contestants[name], repeats))
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def _finisher(device: torch.device) -> Callable[[], Any]:
    return (lambda: None) if device.type == "cpu" else partial(torch.cuda.synchronize, device)


def _warm_up(
    contestants: Mapping[str, Callable[[], Any]], warmup: int, measure: Callable[[Callable[[], Any], int], float]
) -> dict[str, float]:
    """Calls each so many times, once at least; returns what the fastest call of each took."""
    return {name: min(measure(call, 1) for _ in range(max(warmup, 1))) for name, call in contestants.items()}


def _measure(call: Callable[[], Any], repeats: int, ready: Callable[[], Any], finish: Callable[[], Any]) -> float:
    ready()
    finish()
    start = perf_counter()
    for _ in range(repeats):
        call()
    finish()
    return (perf_counter() - start) / repeats


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
