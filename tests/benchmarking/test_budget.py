"""What fits in the time that is left."""

from __future__ import annotations

import math
from time import perf_counter

from fusedres.benchmarking.budget import TimeBudget


def test_what_it_takes_is_compared_with_what_is_left():
    assert TimeBudget().refuses("compiling", 1e9) is None
    assert TimeBudget(-math.inf).refuses("compiling", 1.0) == "not asked for"
    assert TimeBudget.of(1000).refuses("compiling", 100) is None
    assert TimeBudget.of(1000, reserve=990).refuses("compiling", 100).startswith("no time: needs about 100 s of ")
    assert "of 0 s left" in TimeBudget(perf_counter() - 5).refuses("compiling", 1.0)


def test_it_learns_for_each_kind_of_work():
    budget = TimeBudget.of(20)
    assert budget.refuses("compiling", 75.0) is not None
    budget.spent("compiling", 30.0, 1.0)
    assert budget.refuses("compiling", 75.0) is None
    assert budget.refuses("exporting", 75.0) is not None


def test_a_part_of_it_shares_the_deadline_and_what_was_learnt():
    budget = TimeBudget.of(100)
    part = budget.within(60)
    assert 35 < part.left() < 40.1 < budget.left()
    part.spent("compiling", 10.0, 100.0)
    assert budget.refuses("compiling", 11.0) is not None
