"""The README's numbers are those of the committed results."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from fusedres.benchmarking.results import Goal, Results, Row, this_machine

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("update_readme", ROOT / "bench" / "update_readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_is_up_to_date(script):
    text = (ROOT / "README.md").read_text()
    assert script.updated(text) == text, "run python bench/update_readme.py"


GENERATED = re.compile(r"<!-- [^>]*written by (\S+) -->.*?<!-- end of [^>]* -->", re.DOTALL)
MEASURED = re.compile(r"\d[\d.,]*\s?(?:x\b(?! \d)|ms\b|s\b|seconds\b|MB\b|GB\b|images/s|%)")


def test_every_measured_number_is_in_a_table_that_a_program_writes():
    text = (ROOT / "README.md").read_text()
    assert MEASURED.search(GENERATED.search(text)[0])  # it finds those that there are
    assert MEASURED.findall(GENERATED.sub("", text)) == []
    assert all((ROOT / program).exists() for program in GENERATED.findall(text))


def test_every_table_names_a_committed_file_of_a_known_commit():
    files = re.findall(r"\]\((bench/results/\S+\.json)\)", (ROOT / "README.md").read_text())
    assert files
    for name in files:
        machine = Results.load(ROOT / name).machine
        assert Path(name).parent.name == machine.slug
        assert re.fullmatch(r"[0-9a-f]{7,40}", machine.commit), f"{name} was measured on files that were not committed"
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", machine.date) and machine.torch


def test_a_number_by_hand_would_be_found():
    for text in ("1.4x faster", "in 12 ms", "3,100 images/s", "40 % less", "688 MB", "2 seconds"):
        assert MEASURED.search(text)
    for text in ("224 x 224", "1x1 convolutions", "to over 1000 layers", "Python 3.10 to 3.13"):
        assert not MEASURED.search(text)


def test_a_full_run_goes_before_a_quick_one(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "ROOT", tmp_path)
    for name, ratio in (("quick", 1.5), ("full", 2.5)):
        row = Row("train | fp32", "ms", Goal(1.2), 2.0, ours=1.0, ratio=ratio)
        Results(this_machine(), {}, (row,), []).save(tmp_path / "bench" / "results" / "a-cpu" / f"{name}.json")
    text = script.updated(f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n")
    assert "2.50x" in text and "1.50x" not in text and "old" not in text
    assert "train \\| fp32" in text and "bench/results/a-cpu/full.json" in text
    assert text.startswith("before\n") and text.endswith("\nafter\n")


@pytest.mark.parametrize(("ours", "marks"), [(1270.0, 2), (1100.0, 0)])
def test_what_the_mark_behind_a_ratio_means_is_said(script, monkeypatch, tmp_path, ours, marks):
    monkeypatch.setattr(script, "ROOT", tmp_path)
    row = Row("train step", "ms", Goal(1.2), 1185.0, ours=ours, ratio=1.04)
    Results(this_machine(), {}, (row,)).save(tmp_path / "bench" / "results" / "a-cpu" / "full.json")
    text = script.updated(f"{script.BEGIN}{script.END}")
    assert text.count("†") == marks and ("the medians themselves say the contrary" in text) == bool(marks)


def test_without_markers_it_says_so(script):
    with pytest.raises(ValueError, match="must contain"):
        script.updated("nothing here")
