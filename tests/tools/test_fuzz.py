"""Fuzzing in slices: what passed is not run again, what failed is, and says why."""

from __future__ import annotations

import sys

from hypothesis import settings

from tools import fuzz
from tools.fuzz import PER_SLICE, main, run, state_of


def command(body: str):
    return lambda seed: [sys.executable, "-c", f"seed = {seed}; {body}"]


def test_a_slice_is_what_the_profile_has():
    assert 2 * settings.get_profile("fuzz").max_examples == PER_SLICE


def test_goes_on_where_it_was(tmp_path):
    fails = command("print('E   the case'); raise SystemExit(seed == 2)")
    first = list(run([1, 2, 3], tmp_path, 60.0, fails))
    assert first == [(1, "passed"), (2, "failed"), (3, "passed")]
    assert list(run([1, 2, 3], tmp_path, 60.0, command("pass"))) == [
        (1, "passed before"),
        (2, "passed"),
        (3, "passed before"),
    ]


def test_a_slice_without_an_end(tmp_path):
    assert list(run([7], tmp_path, 1.0, command("import time; time.sleep(60)"))) == [(7, "took too long")]


def test_other_sources_begin_anew(tmp_path):
    (tmp_path / "fusedres").mkdir()
    source = tmp_path / "fusedres" / "a.py"
    states = []
    for text in ("1", "2", "1"):
        source.write_text(text)
        states.append(state_of(tmp_path))
    assert states[0] == states[2] != states[1]


def test_the_command_prints_the_failing_case(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fuzz, "ROOT", tmp_path)
    monkeypatch.setattr(fuzz, "state_of", lambda: "state")
    monkeypatch.setattr(run, "__defaults__", (command("print('E   the case'); raise SystemExit(seed == 6)"),))
    assert main(["--cases", "1500", "--first", "5"]) == 1
    said = capsys.readouterr().out
    assert "slice 5, 1 of 2: passed" in said and "slice 6, 2 of 2: failed\nE   the case" in said
    assert "2,000 cases" in said and "1 of 2 slices failed" in said
