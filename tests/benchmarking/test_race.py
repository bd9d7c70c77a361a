"""Contestants in turns: who is wrong is not timed, and who is missing says why."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from fusedres.benchmarking.agreement import verdict
from fusedres.benchmarking.race import Entrant, joined, race
from fusedres.benchmarking.referee import Referee
from fusedres.benchmarking.results import Measurement
from fusedres.benchmarking.timing import FEWEST_TURNS, speedup


def entrant(name: str, seconds: float = 1e-3, check: str | None = None) -> Entrant:
    about = Measurement("op", "sleep", "forward", "float32", (1,), name)
    return Entrant(about, lambda: time.sleep(seconds), None if check is None else lambda: check)


def test_every_contestant_is_set_against_every_other():
    slow, fast = race([entrant("slow", 4e-3), entrant("fast", 1e-3, "ok")], turns=5)
    assert fast.measurement.check == "ok" and slow.measurement.check == ""
    assert fast.measurement.speedup["slow"] > 2 > 0.5 > slow.measurement.speedup["fast"]
    assert len(slow.timing.samples) == len(fast.timing.samples) == 5
    assert fast.measurement.seconds == fast.timing.to_dict()


def test_who_is_wrong_is_not_timed_and_no_ratio_is_taken_over_it():
    baseline, red, right = race([entrant("eager"), entrant("wrong", 1e-4, "RED: output"), entrant("right", 1e-3, "ok")])
    assert red.measurement.check == "RED: output"
    assert red.timing is None and red.measurement.seconds is None and red.measurement.speedup == {}
    assert set(baseline.measurement.speedup) == {"right"} and set(right.measurement.speedup) == {"eager"}


def test_a_planted_wrong_network_is_caught():
    """Right in shape and faster, since it leaves the second half of the channels out."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())

    def wrong(x: torch.Tensor) -> torch.Tensor:
        out = model(x)
        return torch.cat((out[:, :4], torch.zeros_like(out[:, 4:])), 1)

    referee = Referee(model, lambda seed: torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed)))
    assert verdict(referee.judge(model, model)) == "ok"
    about = Measurement("model", "planted", "train step", "float32", (4, 3, 8, 8), "wrong")
    (finish,) = race([Entrant(about, lambda: None, lambda: verdict(referee.judge(model, wrong)))])
    assert finish.measurement.check.startswith("RED: ") and finish.measurement.seconds is None


def test_heats_are_joined_turn_by_turn():
    heats = [race([entrant("eager"), entrant("ours", 1e-3, "ok")], turns=turns) for turns in (2, 3)]
    eager, ours = joined(heats)
    assert ours.timing.samples == heats[0][1].timing.samples + heats[1][1].timing.samples
    assert ours.measurement.seconds == ours.timing.to_dict() and ours.measurement.check == "ok"
    assert ours.measurement.speedup == {"eager": speedup(eager.timing, ours.timing)}


@pytest.mark.parametrize("red", [0, 1])
def test_who_is_wrong_in_one_heat_has_no_times(red):
    heats = [race([entrant("eager"), entrant("ours", 1e-3, "RED" if i == red else "ok")], turns=2) for i in range(2)]
    eager, ours = joined(heats)
    assert ours.measurement.check == "RED" and ours.timing is None and ours.measurement.seconds is None
    assert eager.measurement.speedup == {} and len(eager.timing.samples) == 4


def test_who_is_missing_keeps_its_reason():
    about = Measurement("op", "sleep", "forward", "float32", (1,), "absent", missing="not installed")
    present, absent = race([entrant("eager"), Entrant(about)], turns=2)
    assert present.timing is not None
    assert absent.timing is None and absent.measurement.missing == "not installed"


def test_the_time_that_is_left_is_asked_for_after_the_checks():
    order = []
    checked = replace(entrant("right"), verdict=lambda: order.append("checked") or "ok")
    found = race([entrant("eager"), checked], turns=9, left=lambda: order.append("asked") or 0.0)
    assert order == ["checked", "asked"]
    assert {f.measurement.seconds["turns"] for f in found} == {FEWEST_TURNS}


def test_names_must_differ():
    with pytest.raises(ValueError, match="different names"):
        race([entrant("a"), entrant("a")])
