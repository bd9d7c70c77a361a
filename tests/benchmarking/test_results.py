"""Rows, goals and files of results."""

from __future__ import annotations

import pytest

from fusedres.benchmarking.results import HEAD, Goal, Results, Row, this_machine

RATIO = Goal(1.2, 1.45)
SECONDS = Goal(2.0, 0.3, True, " s")


@pytest.mark.parametrize(
    ("goal", "value", "reached"),
    [
        (RATIO, 1.19, "no"),
        (RATIO, 1.2, "yes"),
        (RATIO, 1.5, "aim"),
        (SECONDS, 2.1, "no"),
        (SECONDS, 1.0, "yes"),
        (SECONDS, 0.1, "aim"),
        (Goal(0.97), 0.98, "yes"),
    ],
)
def test_goals(goal, value, reached):
    assert goal.reached(value) == reached


def test_a_row_as_text():
    row = Row("train", "ms", RATIO, 200.0, 150.0, 100.0, 2.0, 1.5, 80.0, "(9 s)", "ok")
    cells = dict(zip(HEAD, row.cells(), strict=True))
    assert cells["eager"] == "200 ms"
    assert cells["torch.compile"] == "150 ms (9 s)"
    assert cells["over eager"] == "2.00x"
    assert cells["at least / aim"] == "1.20x / 1.45x"
    assert cells["reached"] == "aim"


def test_a_red_row_has_no_numbers():
    cells = dict(zip(HEAD, Row("train", "ms", RATIO, check="RED: output").cells(), strict=True))
    assert cells["check"] == "RED: output"
    assert not any(cells[name] for name in ("eager", "fusedres", "images/s", "over eager", "reached"))


def test_a_goal_may_be_for_what_it_took():
    assert Row("patch()", "s", SECONDS, ours=0.1, goal_of="ours").reached == "aim"


def test_results_survive_the_file(tmp_path):
    rows = (Row("train", "ms", RATIO, 2.0, None, 1.0, 2.0, spread={"eager": {"median": 0.002}}),)
    results = Results(this_machine(), {"quick": True}, rows, [{"case": "basic", "ratio": 1.0}])
    path = tmp_path / "folder" / "quick.json"
    results.save(path)
    assert Results.load(path) == results


def test_the_machine_makes_a_folder_name():
    slug = this_machine().slug
    assert slug.endswith("threads") and set(slug) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
