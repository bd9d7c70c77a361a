"""Two files of results, and what is a regression."""

from __future__ import annotations

from dataclasses import replace

import pytest
from report_data import scaled, source

from fusedres.benchmarking.report.compared import Change, MemoryChange, compared, dropped
from fusedres.cli import main


def timed(before, after):
    return [c for c in compared(before, after) if isinstance(c, Change)]


def regressed(before, after):
    return {(c.after.subject, c.after.contestant) for c in timed(before, after) if c.regressed}


def changed(before, **parts):
    return replace(before, results=replace(before.results, **parts))


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
    changes = timed(source(), source())
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


def test_what_fails_afterwards_is_said():
    def failed(m):
        return replace(m, seconds=None, speedup={}, missing="it failed: RuntimeError") if m.subject == "join" else m

    after = changed(source(), measurements=tuple(map(failed, source().measurements)))
    gone = [c for c in timed(source(), after) if c.after.subject == "join"]
    assert len(gone) == 3 and all(c.regressed for c in gone)
    assert gone[0].cells()[-1] == "GONE: it failed: RuntimeError"


@pytest.mark.parametrize(("contestant", "missing"), [("fusedres", "no time: needs 9 s"), ("eager", "not installed")])
def test_want_of_time_and_others_failures_are_said_and_no_regressions(contestant, missing):
    def failed(m):
        return replace(m, seconds=None, speedup={}, missing=missing) if m.contestant == contestant else m

    after = changed(source(), measurements=tuple(map(failed, source().measurements)))
    assert regressed(source(), after) == set()
    assert f"GONE: {missing}" in {c.cells()[-1] for c in timed(source(), after)}


def test_what_is_not_there_afterwards_is_named_and_no_regression(tmp_path, capsys):
    kept = tuple(m for m in source().measurements if m.subject != "join")
    after = changed(source(), measurements=kept, memory=source().memory[:1])
    found = dropped(source(), after)
    assert "join, forward, float32, 8x64x56x56, fusedres" in found and "memory of ResNet-50, patched" in found
    source().results.save(tmp_path / "before.json")
    after.results.save(tmp_path / "after.json")
    assert main(["report", "--compare", str(tmp_path / "before.json"), str(tmp_path / "after.json")]) == 0
    assert "after.json: join, forward" in capsys.readouterr().out


def test_more_memory_is_a_regression():
    def more(m):
        return replace(m, saved=2 * m.saved) if m.variant == "batch" and m.contestant == "fusedres" else m

    after = changed(source(), measurements=tuple(map(more, source().measurements)))
    found = [c for c in timed(source(), after) if c.regressed]
    assert {c.after.variant for c in found} == {"batch"} and len(found) == 3
    assert found[0].cells()[-1] == "REGRESSION: saved for backward 10 MB to 20 MB"


@pytest.mark.parametrize(
    ("parts", "verdict"),
    [
        ({"saved": 800_000_000}, "REGRESSION: saved for backward 579 MB to 800 MB"),
        ({"peak": 1_500_000_000}, "REGRESSION: peak 1158 MB to 1500 MB"),
        ({"missing": "it died"}, "GONE: it died"),
        ({"peak": 1_200_000_000}, ""),
    ],
)
def test_memory_of_forms_is_compared(parts, verdict):
    uses = tuple(replace(use, **parts) if use.variant == "patched" else use for use in source().results.memory)
    found = [c for c in compared(source(), changed(source(), memory=uses)) if isinstance(c, MemoryChange)]
    by_form = {c.after.variant: c for c in found}
    assert by_form["patched"].cells()[-1] == verdict and by_form["patched"].regressed == bool(verdict)
    assert not by_form["stock"].regressed
