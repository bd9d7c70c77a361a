"""Two files of results, and what is a regression."""

from __future__ import annotations

from dataclasses import replace

import pytest
from report_data import scaled, source

from fusedres.benchmarking.report.compared import compared
from fusedres.cli import main


def regressed(before, after):
    return {(c.after.subject, c.after.contestant) for c in compared(before, after) if c.regressed}


def test_only_what_is_slower_beyond_ten_percent_and_the_spread():
    before = source()
    assert regressed(before, before) == set()
    assert regressed(before, scaled(before, 1.09)) == set()
    assert regressed(before, scaled(before, 0.5)) == set()
    assert ("resnet50", "fusedres") in regressed(before, scaled(before, 1.2))
    assert ("resnet50", "eager") not in regressed(before, scaled(before, 1.2))


def test_what_the_spread_explains_is_none():
    def unsure(m):
        return replace(m, seconds=m.seconds and {**m.seconds, "q1": 0.5 * m.seconds["median"]})

    after = scaled(source(), 1.2)
    after = replace(after, results=replace(after.results, measurements=tuple(map(unsure, after.results.measurements))))
    assert regressed(source(), after) == set()


def test_what_turned_red_is_one():
    def red(m):
        return replace(m, check="RED: output", seconds=None, speedup={}) if m.contestant == "fusedres" else m

    after = source()
    after = replace(after, results=replace(after.results, measurements=tuple(map(red, after.results.measurements))))
    assert ("resnet50", "fusedres") in regressed(source(), after)
    assert "RED: output" in compared(source(), after)[1].cells()


def test_depths_are_not_mixed_up():
    changes = compared(source(), source())
    assert {c.after.depth for c in changes if c.after.variant == "depth"} == {8, 14, 20}
    assert all(c.ratio == 1 for c in changes)


def test_other_devices_do_not_compare():
    other = source()
    machine = replace(other.machine, gpu="H100")
    with pytest.raises(ValueError, match="do not compare"):
        compared(source(), replace(other, results=replace(other.results, machine=machine)))


def test_the_command(tmp_path, capsys):
    source().results.save(tmp_path / "before.json")
    scaled(source(), 1.3).results.save(tmp_path / "after.json")
    assert main(["report", "--compare", str(tmp_path / "before.json"), str(tmp_path / "before.json")]) == 0
    assert main(["report", "--compare", str(tmp_path / "before.json"), str(tmp_path / "after.json")]) == 1
    assert "REGRESSION" in capsys.readouterr().out
