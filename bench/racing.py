"""Groups, whose contestants are timed in turns, behind tests, of which each is one contestant.

pytest-benchmark times one test after another, so that a machine that slows down in between decides who wins. Here the
first test of a group checks all of the group's contestants and times those that are right in turns
(:func:`fusedres.benchmarking.race.race`): one sample of each, in an order that changes, then the next sample of each.
Every test of the group then gives pytest-benchmark the samples of its own contestant, one per round, through a clock
that goes forward by exactly what was measured. So its table, its files and its comparisons are of real samples, each
once; its own calibration and outliers by time of day mean nothing here, and ratios are in ``extra_info``, taken within
a turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache

import pytest
import torch

from fusedres.analysis.devices import Device, device_of
from fusedres.benchmarking.peers import OURS, PEERS
from fusedres.benchmarking.race import Entrant, Finish, race
from fusedres.benchmarking.results import Measurement, Results, this_machine

__all__ = ["CLOCK", "Groups", "ReplayClock", "extra_info"]


class ReplayClock:
    """A clock that stands still, but for :meth:`advance`, which takes as long as the next sample did."""

    def __init__(self) -> None:
        self._now = 0.0
        self._samples: Iterator[float] = iter(())

    def load(self, samples: Sequence[float]) -> None:
        """What the next calls of :meth:`advance` take."""
        self._samples = iter(samples)

    def advance(self) -> None:
        """Raises StopIteration where no sample is left: none is given twice."""
        self._now += next(self._samples)

    def __call__(self) -> float:
        return self._now


CLOCK = ReplayClock()
"""The timer of every test in ``bench/``."""


@dataclass
class Groups:
    """What became of every group so far.

    Attributes:
        smoke: whether nothing is timed, so that everything runs once.
        devices: of the groups, by their keys in ``found``.
    """

    smoke: bool
    found: dict[tuple[str, ...], dict[str, Finish]] = field(default_factory=dict)
    devices: dict[tuple[str, ...], str] = field(default_factory=dict)

    def finish(
        self,
        group: Measurement,
        contestant: str,
        enter: Callable[[], Sequence[Entrant]],
        turns: int,
        seconds: float,
        device: str = "cpu",
    ) -> Finish:
        """The contestant's part in a group; the first question about the group has it race.

        Args:
            group: what its contestants share.
            enter: makes the entrants.
            turns: samples of each.
            seconds: about what a sample of the fastest takes.
            device: where it runs.
        """
        key = group.suite, group.group
        if key not in self.found:
            # In a smoke test a single turn, behind a single call.
            how = (1, 1, 0.0) if self.smoke else (turns, 3, seconds)
            settings = dict(zip(("turns", "warmup", "sample_seconds"), how))
            finishes = race(enter(), device=device, **settings)
            self.found[key] = {f.measurement.contestant: self._with_roofline(f, device) for f in finishes}
            self.devices[key] = device
        return self.found[key][contestant]

    def _with_roofline(self, finish: Finish, device: str) -> Finish:
        """With what the device's peaks allow, where they are known; a CPU's are measured once for each dtype."""
        measurement = finish.measurement
        if self.smoke or measurement.moved is None or measurement.roofline is not None:
            return finish
        dtype = getattr(torch, measurement.dtype)
        peaks = _peaks(device, dtype)
        if peaks is None:
            return finish
        seconds = peaks.seconds(measurement.moved, measurement.flops or 0, dtype)
        return replace(finish, measurement=replace(measurement, roofline=seconds))

    def results(self) -> dict[str, Results]:
        """All measurements by device, as files of results hold them."""
        return {device: self._results(device) for device in dict.fromkeys(self.devices.values())}

    def _results(self, device: str) -> Results:
        here = [group for key, group in self.found.items() if self.devices[key] == device]
        measurements = tuple(f.measurement for group in here for f in group.values())
        return Results(_machine(device), {"suite": "pytest bench"}, measurements=measurements)


_OTHERS = frozenset(peer.name for peer in PEERS if not isinstance(peer, type(OURS)))
_machine = cache(this_machine)
_peaks: Callable[[str, torch.dtype], Device | None] = cache(device_of)


def replay(benchmark, finish: Finish, label: str, device: str = "cpu") -> None:
    """Gives a contestant's samples to pytest-benchmark; skips the test where it is missing, fails it where it is wrong.

    Where another library is, the reason is shown, and the test is an expected failure: nothing here can mend it.

    Args:
        label: the group's name in the table.
    """
    measurement = finish.measurement
    if measurement.missing:
        pytest.skip(measurement.missing)
    if finish.timing is None:
        (pytest.xfail if measurement.contestant in _OTHERS else pytest.fail)(measurement.check)
    benchmark.group = label
    benchmark.extra_info.update(extra_info(measurement, device))
    CLOCK.load(finish.timing.samples)
    benchmark.pedantic(CLOCK.advance, rounds=len(finish.timing.samples))


def extra_info(m: Measurement, device: str = "cpu") -> dict[str, object]:
    """What pytest-benchmark's table has no columns for; the whole measurement is in it, too."""
    machine = _machine(device)
    derived = {
        "images/s": m.images_per_second,
        "GB/s": None if m.bytes_per_second is None else m.bytes_per_second / 1e9,
        "GFLOP/s": None if m.flops_per_second is None else m.flops_per_second / 1e9,
        "fraction of roofline": m.of_roofline,
        "bytes saved for backward": m.saved,
        "peak memory": m.peak,
        "speed-up over compile": m.speedup.get("torch.compile"),
        **{f"speed-up over {name}": ratio for name, ratio in m.speedup.items() if name != "torch.compile"},
    }
    known = {name: round(value, 3) for name, value in derived.items() if value is not None}
    return {
        "device": machine.device,
        "threads": machine.threads,
        "torch": machine.torch,
        "dtype": m.dtype,
        "layout": m.layout,
        **known,
        "measurement": asdict(m),
    }
