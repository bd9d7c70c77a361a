"""The file of results and the table."""

from __future__ import annotations

import json

from tools.gpu.record import CUT_OFF, FAILED, OK, Outcome, Record, table


def test_the_file_is_whole_after_every_result(tmp_path):
    record = Record(tmp_path / "deep" / "gpu.json", {"budget": 1.0})
    assert json.loads(record.path.read_text())["stages"] == []
    record.put("build", Outcome(), 0.04)
    record.put("build", Outcome(OK, "done", details={"archs": "90a"}), 1.26)
    content = json.loads(record.path.read_text())
    assert content["budget"] == 1.0 and [path.name for path in record.path.parent.iterdir()] == ["gpu.json"]
    assert content["stages"] == [
        {"name": "build", "seconds": 1.3, "status": OK, "summary": "done", "problems": [], "details": {"archs": "90a"}}
    ]


def test_the_table_names_the_first_problem_of_each_stage():
    stages = [
        {"name": "tests", "status": FAILED, "seconds": 61.4, "summary": "2 failed", "problems": ["a: one", "b: two"]},
        {"name": "bench", "status": CUT_OFF, "seconds": 7.0, "summary": "", "problems": []},
    ]
    assert table(stages).splitlines() == [
        "stage  status   seconds  found",
        "tests  FAILED   61       2 failed",
        "bench  cut off  7",
        "tests: a: one (and 1 more)",
    ]
