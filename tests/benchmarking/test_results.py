"""Rows, goals and files of results."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace

import pytest

from fusedres.benchmarking import architectures, results
from fusedres.benchmarking.results import CONTRARY, HEAD, Goal, Measurement, MemoryUse, Results, Row, this_machine

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


@pytest.mark.parametrize(
    ("ratio", "eager", "ours", "marked"),
    [
        (1.04, 1185.0, 1270.0, True),
        (0.97, 0.431, 0.425, True),
        (1.1, 200.0, 150.0, False),
        (1.004, 405.0, 406.0, False),  # neither is faster by what the table shows
        (0.9, 100.0, 110.0, False),
    ],
)
def test_a_ratio_that_the_medians_contradict_is_marked(ratio, eager, ours, marked):
    row = Row("train", "ms", RATIO, eager, eager, ours, ratio, ratio)
    cells = dict(zip(HEAD, row.cells(), strict=True))
    assert (CONTRARY in cells["over eager"], CONTRARY in cells["over compile"]) == (marked, marked)
    assert any(CONTRARY in cell for cell in architectures.cells(row)) == marked


def test_a_share_of_bytes_is_not_a_ratio_of_times():
    assert Row("bytes", "MB", Goal(0.85, None, True), 688.0, ours=579.0, ratio=0.84).over_eager == "0.84x"


def test_a_red_row_has_no_numbers():
    cells = dict(zip(HEAD, Row("train", "ms", RATIO, check="RED: output").cells(), strict=True))
    assert cells["check"] == "RED: output"
    assert not any(cells[name] for name in ("eager", "fusedres", "images/s", "over eager", "reached"))


def test_a_goal_may_be_for_what_it_took():
    assert Row("patch()", "s", SECONDS, ours=0.1, goal_of="ours").reached == "aim"


MEASURED = Measurement(
    "model",
    "resnet50",
    "train step",
    "bfloat16",
    (8, 3, 224, 224),
    "fusedres",
    autocast=True,
    check="ok",
    seconds={"median": 0.5, "min": 0.4, "q1": 0.45, "q3": 0.6, "turns": 5},
    speedup={"eager": 1.5},
    images=8,
    moved=10**9,
    flops=10**10,
    roofline=0.2,
)


def test_results_survive_the_file(tmp_path):
    results = Results(
        this_machine(),
        {"quick": True, "left_out": ["torch.compile: no time"]},
        (Row("train", "ms", RATIO, 2.0, None, 1.0, 2.0, spread={"eager": {"median": 0.002}}),),
        [{"case": "basic", "ratio": 1.0}],
        (MEASURED, replace(MEASURED, contestant="OpenVINO", seconds=None, missing="inference only")),
        (MemoryUse("resnet50", (8, 3, 224, 224), "float32", "stock", saved=2, peak=3),),
        ({"device": "H100 SXM"},),
        {"name": "this CPU", "bandwidth": 1e10, "arithmetic": {"float32": 1e11}},
        ({"name": "tests", "status": "ok", "seconds": 1.0, "detail": ""},),
    )
    path = tmp_path / "folder" / "quick.json"
    results.save(path)
    assert Results.load(path) == results
    results.save(path)
    assert [p.name for p in path.parent.iterdir()] == ["quick.json"]


def test_files_from_before_a_field_are_read(tmp_path):
    path = tmp_path / "old.json"
    Results(this_machine(), {}, (Row("train", "ms", RATIO),), []).save(path)
    content = json.loads(path.read_text())
    for name in ("measurements", "memory", "traffic", "roofline", "stages"):
        del content[name]
    del content["machine"]["gpu"], content["machine"]["packages"]
    path.write_text(json.dumps(content))
    old = Results.load(path)
    assert old.rows[0].name == "train" and old.measurements == () and old.machine.gpu == ""


def test_what_a_measurement_means():
    assert MEASURED.group == "resnet50, train step, bfloat16 autocast, 8x3x224x224"
    assert MEASURED.images_per_second == 16
    assert MEASURED.bytes_per_second == 2e9 and MEASURED.flops_per_second == 2e10
    assert MEASURED.of_roofline == 0.4
    assert replace(MEASURED, seconds=None).images_per_second is None
    assert replace(MEASURED, moved=None).bytes_per_second is None


def test_a_gpu_names_its_own_folder():
    machine = replace(this_machine(), gpu="NVIDIA H100 80GB HBM3")
    assert machine.slug == "nvidia-h100-80gb-hbm3" and str(machine).startswith("NVIDIA H100 80GB HBM3, ")


def test_the_machine_makes_a_folder_name():
    slug = this_machine().slug
    assert slug.endswith("threads") and set(slug) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_results_do_not_make_a_tree_one_with_changes(tmp_path, monkeypatch):
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    code, result = tmp_path / "code" / "module.py", tmp_path / "bench" / "results" / "full.json"
    for path in (code, result):
        path.parent.mkdir(parents=True)
        path.write_text("before")
    monkeypatch.setattr(results, "__file__", str(code))
    monkeypatch.delenv("FUSEDRES_COMMIT", raising=False)
    assert this_machine().commit == "an unknown commit"
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    commit = this_machine().commit
    assert re.fullmatch(r"[0-9a-f]{7,40}", commit)
    result.write_text("after")
    assert this_machine().commit == commit
    code.write_text("after")
    assert this_machine().commit == f"{commit}+"
    assert this_machine().changed and not replace(this_machine(), commit=commit).changed


def test_a_copy_without_git_is_told_its_commit(monkeypatch):
    monkeypatch.setenv("FUSEDRES_COMMIT", "abc1234")
    monkeypatch.setattr(results, "_git", lambda *arguments: "def5678" if "rev-parse" in arguments else "")
    assert this_machine().commit == "def5678", "git knows better"
    monkeypatch.setattr(results, "_git", lambda *arguments: "")
    assert this_machine().commit == "abc1234"
    monkeypatch.setenv("FUSEDRES_COMMIT", "")
    assert this_machine().commit == "an unknown commit"
