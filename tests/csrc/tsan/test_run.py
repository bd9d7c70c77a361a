"""That the runs under ThreadSanitizer end, whatever they run; ``make tsan`` is the check itself."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def run() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tsan_run", Path(__file__).with_name("run.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_does_not_end_is_ended_with_its_stacks(run):
    """With a child that holds the output open, for which a pipe would be waited."""
    hangs = "import subprocess, time; print('begun', flush=True); subprocess.Popen(['sleep', '60']); time.sleep(60)"
    began = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        run.watched([sys.executable, "-c", hangs], dict(os.environ), limit=3)
    assert time.monotonic() - began < 50
    said = str(ended.value)
    assert "no end after 3 seconds" in said and "begun" in said and "thread " in said


def test_what_ends_says_so(run):
    assert run.watched([sys.executable, "-c", "print('ran'); exit(3)"], dict(os.environ)) == (3, "ran\n")


def test_there_is_a_race_to_plant(run, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "BUILD", tmp_path)
    source, text, other = run.PLANTED
    changed = run.with_planted_race().read_text()
    assert text not in changed and other in changed and changed != source.read_text()


def test_reports_about_others_do_not_count(run):
    report = "{0} data race\n #0 f ({1})\n" + "=" * 18
    ours, others = report.format(run.REPORT, "_C.so+0x1"), report.format(run.REPORT, "libtorch_cpu.so+0x1")
    assert run.races(f"{ours}\n{others}\n") == [ours]
