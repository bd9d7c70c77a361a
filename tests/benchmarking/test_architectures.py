"""The table of architectures: its rows, and where our time is said to go."""

from __future__ import annotations

from functools import partial

import pytest

from fusedres import models
from fusedres.benchmarking import architectures
from fusedres.benchmarking.architectures import HEAD, KINDS, Architecture, cells
from fusedres.benchmarking.referee import Referee
from fusedres.benchmarking.results import Goal, Row
from fusedres.benchmarking.workloads import INFERENCE_BF16, TRAIN_FP32
from fusedres.testing import Comparison, Entry

GOALS = {TRAIN_FP32: Goal(1.1), INFERENCE_BF16: Goal(2.0)}
TINY = Architecture(
    "tiny", partial(models.cifar_resnet, 8, num_classes=1000, fused=False), 32, GOALS, Goal(0.9, None, True)
)


def test_rows_of_a_network():
    found = list(architectures.measure(TINY, 2, 2))
    train, infer, saved = (f.row for f in found)
    assert [len(f.measurements) for f in found] == [2, 2, 0]
    for row in (train, infer):
        assert row.check == "ok" and row.ratio > 0
        assert set(row.shares) == set(KINDS) and sum(row.shares.values()) == pytest.approx(1)
    assert train.shares["convolutions"] > 0.1 and train.shares["passes"] > 0.01
    assert saved.ratio == saved.ours / saved.eager < 1


def test_a_red_check_has_no_ratio(monkeypatch):
    red = Comparison((Entry("output", 3.0, 1.0, 2.0, 1.0),))
    monkeypatch.setattr(Referee, "judge", lambda *args: red)
    rows = [found.row for found in architectures.measure(TINY, 1, 1)]
    assert all(row.ratio is None and row.check.startswith("RED") for row in rows[:2])
    monkeypatch.setattr(architectures, "verdict", lambda comparison: "RED: output")
    *_, saved = architectures.measure(TINY, 1, 1)
    assert saved.row.ratio is None and saved.row.check == "RED: output"


def test_as_text():
    row = Row("a network: train", "ms", Goal(1.3), 20.0, None, 10.0, 2.0, shares=dict(zip(KINDS, (0.5, 0.3, 0.2))))
    found = dict(zip(HEAD, cells(row), strict=True))
    assert found["over eager"] == "2.00x" and found["reached"] == "yes" and found["fused passes"] == "30%"
    assert all(share == "" for share in cells(Row("bytes", "MB", Goal(1.0)))[7:10])


def test_every_network_of_the_table_can_be_built():
    assert len({a.name for a in architectures.ARCHITECTURES}) == len(architectures.ARCHITECTURES)
    assert all(a.goals[TRAIN_FP32].at_least >= 1.15 for a in architectures.ARCHITECTURES)


def test_the_adjoint_keeps_the_same_for_any_number_of_steps():
    row = architectures.ode_row(2, 6)
    assert row.check == "ok" and row.ratio < 0.5
