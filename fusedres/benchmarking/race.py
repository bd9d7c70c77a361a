"""Contestants against each other: first what they compute is checked, then those that are right are timed in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .results import Measurement
from .timing import Timing, interleave, speedup

__all__ = ["Entrant", "Finish", "joined", "race"]


@dataclass(frozen=True)
class Entrant:
    """One who wants to take part.

    Attributes:
        about: what is known beforehand; names the contestant, and says why where it is missing.
        call: what is timed; ``None`` where it is missing.
        verdict: says ``"ok"`` or what is wrong with its results; ``None`` for the baseline, which is the measure.
    """

    about: Measurement
    call: Callable[[], Any] | None = None
    verdict: Callable[[], str] | None = None


@dataclass(frozen=True)
class Finish:
    """What became of an entrant, with every sample where it was timed."""

    measurement: Measurement
    timing: Timing | None = None


def race(
    entrants: Sequence[Entrant],
    *,
    turns: int = 9,
    warmup: int = 2,
    sample_seconds: float = 0.0,
    device: torch.device | str = "cpu",
    left: Callable[[], float] | None = None,
) -> tuple[Finish, ...]:
    """Checks all entrants, then times those whose results are right, in turns (:func:`.timing.interleave`).

    A contestant whose check is red is not timed, so there is no ratio of it, nor one over it.

    Raises:
        ValueError: for two entrants of one name.
    """
    if len({e.about.contestant for e in entrants}) < len(entrants):
        raise ValueError(f"contestants must have different names, got {[e.about.contestant for e in entrants]}")
    checked = [(e, replace(e.about, check=_check(e))) for e in entrants]
    able = {m.contestant: e.call for e, m in checked if e.call is not None and m.check in ("", "ok")}
    times: dict[str, Timing] = {}
    if able:
        times = interleave(able, turns=turns, warmup=warmup, sample_seconds=sample_seconds, device=device, left=left)
    return tuple(Finish(_measured(m, times), times.get(m.contestant)) for _, m in checked)


def joined(heats: Sequence[Sequence[Finish]]) -> tuple[Finish, ...]:
    """Several races of the same contestants, in the same order, as one with the turns of all of them.

    Whose check is red in one heat has no times, and that check.
    """
    timings = {fs[0].measurement.contestant: [f.timing for f in fs] for fs in zip(*heats, strict=True)}
    times = {
        name: Timing(tuple(sample for timing in own for sample in timing.samples))
        for name, own in timings.items()
        if None not in own
    }
    return tuple(_joined([f.measurement for f in fs], times) for fs in zip(*heats, strict=True))


def _joined(measurements: Sequence[Measurement], times: dict[str, Timing]) -> Finish:
    first = measurements[0]
    check = next((m.check for m in measurements if m.check not in ("", "ok")), first.check)
    return Finish(_measured(replace(first, check=check), times), times.get(first.contestant))


def _check(entrant: Entrant) -> str:
    return entrant.verdict() if entrant.call is not None and entrant.verdict is not None else ""


def _measured(about: Measurement, times: dict[str, Timing]) -> Measurement:
    own = times.get(about.contestant)
    if own is None:
        return replace(about, seconds=None, speedup={})
    ratios = {name: speedup(other, own) for name, other in times.items() if name != about.contestant}
    return replace(about, seconds=own.to_dict(), speedup=ratios)
