"""The README's numbers are those of the committed results."""

from __future__ import annotations

import importlib.util
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


def test_a_full_run_goes_before_a_quick_one(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "ROOT", tmp_path)
    for name, ratio in (("quick", 1.5), ("full", 2.5)):
        row = Row("train | fp32", "ms", Goal(1.2), 2.0, ours=1.0, ratio=ratio)
        Results(this_machine(), {}, (row,), []).save(tmp_path / "bench" / "results" / "a-cpu" / f"{name}.json")
    text = script.updated(f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n")
    assert "2.50x" in text and "1.50x" not in text and "old" not in text
    assert "train \\| fp32" in text and "bench/results/a-cpu/full.json" in text
    assert text.startswith("before\n") and text.endswith("\nafter\n")


def test_without_markers_it_says_so(script):
    with pytest.raises(ValueError, match="must contain"):
        script.updated("nothing here")
