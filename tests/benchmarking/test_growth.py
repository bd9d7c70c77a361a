"""Cost as batch and depth grow, and the first step's time."""

from __future__ import annotations

import pytest

from fusedres.benchmarking import growth
from fusedres.benchmarking.growth import first_steps, grown
from fusedres.benchmarking.results import Measurement, Results
from fusedres.cli import main
from fusedres.testing import Comparison, Entry


def test_what_autograd_keeps_grows_with_the_batch(monkeypatch):
    monkeypatch.setattr(growth, "_BATCH_RESOLUTION", 64)  # the rows of norms are kept whatever the batch
    found = list(grown("batch", (2, 4), 2))
    assert [(m.shape[0], m.contestant) for m in found] == [(n, c) for n in (2, 4) for c in ("eager", "fusedres")]
    by_name = {(m.shape[0], m.contestant): m for m in found}
    for name in ("eager", "fusedres"):
        small, large = by_name[2, name], by_name[4, name]
        assert 1.9 < large.saved / small.saved < 2.1 and small.seconds["median"] > 0
    ours = by_name[4, "fusedres"]
    assert ours.check == "ok" and set(ours.speedup) == {"eager"} and ours.suite == "growth"
    assert by_name[4, "eager"].baseline and not by_name[4, "eager"].check


def test_depth(monkeypatch):
    monkeypatch.setattr(growth, "_DEPTH_BATCH", 2)
    small, large = [m for m in grown("depth", (8, 14), 2) if m.contestant == "eager"]
    assert (small.depth, large.depth) == (8, 14) and large.saved > small.saved


def test_an_unknown_variant():
    with pytest.raises(ValueError, match="'batch' or 'depth', got 'width'"):
        list(grown("width", (1,), 1))


def test_a_red_check_has_no_times(monkeypatch):
    red = Comparison((Entry("output", 3.0, 1.0, 2.0, 1.0),))
    monkeypatch.setattr(type(growth.TRAIN_FP32), "check", lambda *args, **kwargs: red)
    monkeypatch.setattr(growth, "interleave", lambda *args, **kwargs: pytest.fail("timed"))
    (only,) = grown("depth", (8,), 2)
    assert only.check.startswith("RED") and only.seconds is None and not only.speedup


def test_first_steps_are_taken_in_processes_of_their_own():
    eager, ours = first_steps(("resnet18",), (2, 32), ("eager", "fusedres"))
    assert eager.first_step > 0 and ours.first_step > 0 and ours.contestant == "fusedres"
    (absent,) = first_steps(("resnet18",), (2, 32), ("no such contestant",))
    assert absent.first_step is None and "KeyError" in absent.missing


def test_the_command_writes_results(tmp_path, monkeypatch):
    for name, value in (("BATCHES", (2, 2, 4)), ("DEPTHS", (8,)), ("_FIRST_BATCH", (2, 32)), ("_DEPTH_BATCH", 2)):
        monkeypatch.setattr(growth, name, value)
    monkeypatch.setattr(growth, "_BATCH_RESOLUTION", 32)
    path = tmp_path / "growth.json"
    assert main(["growth", "--quick", "--json", str(path)]) == 0
    found = Results.load(path).measurements
    assert {m.suite for m in found} == {"growth", "first step"}
    assert {m.variant for m in found if m.suite == "growth"} == {"batch", "depth"}


def test_being_cut_off_loses_nothing(tmp_path, monkeypatch):
    measured = Measurement("growth", "resnet18", "train step", "float32", (2, 3, 8, 8), "eager", "batch")

    def cut_off(variant, *args):
        if variant == "depth":
            raise KeyboardInterrupt
        yield measured

    monkeypatch.setattr(growth, "grown", cut_off)
    path = tmp_path / "growth.json"
    with pytest.raises(KeyboardInterrupt):
        main(["growth", "--quick", "--json", str(path)])
    assert Results.load(path).measurements == (measured,)
