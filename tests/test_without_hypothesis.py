"""Where hypothesis is missing, the tests by random cases are skipped and no others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTEST = """
import sys
from functools import partial
from importlib.machinery import PathFinder

def find_spec(found, name, path=None, target=None):
    return found(name, [p for p in sys.path if "without_hypothesis" in p] if name == "hypothesis" else path, target)

PathFinder.find_spec = partial(find_spec, PathFinder.find_spec)
import pytest

sys.exit(pytest.main(["-p", "no:hypothesispytest", "-p", "no:cacheprovider", "-v", *sys.argv[1:]]))
"""
"""pytest, where the installed hypothesis is not found."""


def run(*arguments: str) -> str:
    command = [sys.executable, "-c", PYTEST, *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_tests_by_random_cases_are_skipped_alone():
    printed = run("tests/ops/test_conv.py", "tests/ops/test_all_finite.py", "-rs")
    skipped = [line for line in printed.splitlines() if " SKIPPED" in line]
    assert any("test_conv.py::test_output_size " in line for line in skipped)
    assert any(
        "test_all_finite.py::test_one_bad_value_is_found_anywhere[" in line for line in skipped
    )  # parameters stay
    assert len(skipped) < printed.count(" PASSED")
    assert "needs hypothesis, which is not installed" in printed


def test_every_file_of_tests_can_be_imported():
    run("--collect-only", "-q", "tests")
