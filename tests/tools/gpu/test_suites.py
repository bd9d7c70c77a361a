"""Tests are counted from pytest's output as it comes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fusedres import env
from tools.gpu import suites
from tools.gpu.context import Context
from tools.gpu.process import Finished, Log
from tools.gpu.record import CUT_OFF, FAILED, OK, UNAVAILABLE
from tools.gpu.suites import Tally, _outcome, files

ROOT = Path(__file__).parents[3]

FAILING = """\
tests/cuda/test_join.py::test_a[bottleneck with a projection-1] PASSED   [ 33%]
tests/cuda/test_join.py::test_b FAILED   [ 66%]
tests/cuda/test_join.py::test_c SKIPPED (why)   [100%]
____ test_b ____
SKIPPED [1] tests/cuda/conftest.py:15: needs a GPU: torch was built without CUDA
FAILED tests/cuda/test_join.py::test_b - AssertionError: tensor: error 2e-1
1 failed, 1 passed, 1 skipped in 0.03s
"""
SKIPPED = "SKIPPED [9] tests/cuda/conftest.py:15: needs a GPU: torch sees no usable GPU"
NO_CUTLASS = "SKIPPED [9] tests/cuda/test_conv_epilogue.py:20: the library was built without CUTLASS"


def tally(text: str, status: int | None = 0) -> Tally:
    found = Tally()
    for line in text.splitlines():
        found.read(line)
    found.finish(Finished(status, 1.0, tuple(text.splitlines())))
    return found


def test_what_failed_comes_with_its_message():
    found = tally(FAILING, 1)
    assert found.counts == {"passed": 1, "failed": 1, "skipped": 1} and found.status == FAILED
    assert found.problems("cuda/test_join.py") == ["cuda/test_join.py::test_b: AssertionError: tensor: error 2e-1"]
    outcome = _outcome({"cuda/test_join.py": found}, ["cuda/test_join.py"])
    assert outcome.status == FAILED and outcome.summary == "1 passed, 1 failed, 1 skipped"


def test_a_process_that_dies_is_a_failure_and_keeps_its_counts():
    found = tally(FAILING.splitlines()[0], -11)
    assert found.counts["passed"] == 1 and found.status == FAILED
    assert found.problems("x")[0].startswith("x: ended by SIGSEGV")


def test_what_the_time_ended_is_cut_off_and_no_failure():
    names = ["cuda/test_join.py", "cuda/test_later.py"]
    outcome = _outcome({names[0]: tally(FAILING.splitlines()[0], None)}, names)
    assert outcome.status == CUT_OFF and outcome.summary.endswith("cuda/test_join.py, cuda/test_later.py")


def test_a_file_of_the_device_that_ran_nothing_is_no_success():
    outcome = _outcome({"cuda/test_join.py": tally(SKIPPED)}, ["cuda/test_join.py"])
    assert outcome.status == FAILED and "torch sees no usable GPU" in outcome.problems[0]


@pytest.mark.parametrize("reason", ["needs hypothesis, which is not installed", "nvcc was not found"])
def test_what_the_machine_lacks_is_no_failure_and_no_success(reason):
    skipped = f"SKIPPED [1] tests/triton/cases/case_join.py:9: {reason}"
    found = {"triton/cases/case_join.py": tally(skipped, 5)}
    outcome = _outcome(found, list(found))
    assert outcome.status == UNAVAILABLE and reason in outcome.problems[0]
    assert outcome.details["files"]["triton/cases/case_join.py"]["status"] == UNAVAILABLE
    failing = {**found, "cuda/test_join.py": tally(FAILING, 1)}
    assert _outcome(failing, list(failing)).problems[-1] == outcome.problems[0]


def test_what_the_build_was_not_asked_for_is_no_failure():
    found = {"cuda/test_conv_epilogue.py": tally(NO_CUTLASS), "cuda/test_join.py": tally(FAILING.splitlines()[0])}
    outcome = _outcome(found, list(found))
    assert outcome.status == OK and outcome.problems == []
    assert outcome.details["files"]["cuda/test_conv_epilogue.py"]["status"] == UNAVAILABLE


def test_cutlass_says_so(monkeypatch):
    monkeypatch.setattr(env, "cuda_missing", lambda: None)
    monkeypatch.setattr(env, "_build_record", lambda: {"cuda": True})
    assert suites._NOT_ASKED_FOR in env.cutlass_missing() and suites._NOT_ASKED_FOR in NO_CUTLASS


def test_messages_are_not_cut(tmp_path, monkeypatch):
    message = "x" * 300
    (tmp_path / "test_long.py").write_text(f"def test_long():\n    raise ValueError({message!r})\n")
    monkeypatch.setattr(suites, "files", lambda dry: [suites.File(str(tmp_path / "test_long.py"))])
    context = Context(tmp_path, tmp_path, Log(tmp_path / "log.txt"), dry=True)
    for variable in ("CI", "BUILD_NUMBER", "COLUMNS"):  # without which pytest cuts them
        monkeypatch.delenv(variable, raising=False)
    assert suites.tests(context, time.monotonic() + 100).status == FAILED
    told = [line for line in (tmp_path / "log.txt").read_text().splitlines() if "] FAILED " in line]
    assert told and told[-1].endswith(message)


def test_every_file_is_there_and_the_devices_come_first():
    paths = [file.path for file in files(dry=False)]
    assert all((ROOT / path).exists() for path in paths) and len(set(paths)) == len(paths)
    kinds = [path.split("/")[1] for path in paths]
    last = max(i for i, kind in enumerate(kinds) if kind in ("cuda", "triton"))
    assert set(kinds[: last + 1]) == {"cuda", "triton"}
    assert {path.name for path in (ROOT / "tests" / "cuda").glob("test_*.py")} - {"test_triton.py"} <= {
        Path(path).name for path in paths
    }
    assert all((ROOT / file.path).exists() for file in files(dry=True))
