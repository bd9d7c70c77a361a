"""Interleaved timing: the order of calls, and the arithmetic on what it finds."""

from __future__ import annotations

import gc
import math
import time

import pytest

from fusedres.benchmarking import Timing, interleave, speedup
from fusedres.benchmarking.timing import FEWEST_TURNS


def test_a_timing_sums_up_its_samples():
    timing = Timing((4.0, 1.0, 2.0, 3.0, 5.0))
    assert (timing.median, timing.minimum, timing.quartiles) == (3.0, 1.0, (2.0, 4.0))
    assert timing.to_dict() == {"median": 3.0, "min": 1.0, "q1": 2.0, "q3": 4.0, "turns": 5}


def test_one_sample_is_its_own_quartiles():
    assert Timing((2.0,)).quartiles == (2.0, 2.0)


def test_a_speedup_is_the_median_of_the_ratios_within_a_turn():
    drifting = Timing((1.0, 10.0, 100.0)), Timing((0.5, 5.0, 50.0))
    assert speedup(*drifting) == 2.0


def test_timings_that_do_not_pair_up_are_refused():
    with pytest.raises(ValueError, match="2 and 1 turns"):
        speedup(Timing((1.0, 1.0)), Timing((1.0,)))


def test_contestants_take_turns_and_the_first_changes():
    calls = []
    contestants = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = interleave(contestants, turns=4, warmup=1)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert all(len(timing.samples) == 4 for timing in times.values())


def test_a_short_call_is_repeated_and_its_share_counts():
    times = interleave({"": lambda: time.sleep(1e-3)}, turns=3, sample_seconds=1e-2)
    assert 1e-3 <= times[""].minimum < 5e-3


def test_as_many_turns_as_there_is_time_for():
    sleeping = {name: lambda: time.sleep(1e-3) for name in "ab"}

    def turns(seconds: float) -> set[int]:
        found = interleave(sleeping, turns=9, left=lambda: seconds)
        return {len(timing.samples) for timing in found.values()}

    assert turns(60.0) == {9}
    assert turns(-1.0) == {FEWEST_TURNS}
    (some,) = turns(6 * 2.2e-3)
    assert FEWEST_TURNS <= some <= 6  # a call takes a millisecond and more


def test_garbage_collection_is_as_it_was():
    assert gc.isenabled()
    interleave({"": lambda: None}, turns=1)
    assert gc.isenabled()


def test_without_a_limit_all_turns_are_measured():
    found = interleave({"one": lambda: None}, turns=7, left=lambda: math.inf)
    assert len(found["one"].samples) == 7
