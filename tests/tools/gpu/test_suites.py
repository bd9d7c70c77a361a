"""Tests are counted from pytest's output as it comes."""

from __future__ import annotations

from pathlib import Path

from tools.gpu.process import Finished
from tools.gpu.record import CUT_OFF, FAILED, OK
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
NO_HYPOTHESIS = "SKIPPED [1] tests/triton/cases/case_join.py:9: needs hypothesis, which is not installed"


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


def test_hypothesis_may_be_missing():
    outcome = _outcome({"triton/cases/case_join.py": tally(NO_HYPOTHESIS, 5)}, ["triton/cases/case_join.py"])
    assert outcome.status == OK and "needs hypothesis" in outcome.problems[0]


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
