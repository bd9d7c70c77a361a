"""Calls in a process of their own."""

from __future__ import annotations

import os
import sys

import pytest

from fusedres.analysis.peak import in_child, peak_resident, resident


def test_a_call_in_a_child_and_its_peak():
    child = in_child(bytes.count, bytes(2**29), b"a")
    assert child.result == 0
    assert 2**29 < child.peak < 2**32


def test_an_error_in_a_child():
    with pytest.raises(RuntimeError, match="ValueError: invalid literal"):
        in_child(int, "none")


def test_a_child_that_dies():
    with pytest.raises(RuntimeError, match="ended with status 3"):
        in_child(os._exit, 3)


def test_this_process():
    assert 2**20 < resident() <= peak_resident()


def test_where_the_system_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules["fusedres.analysis.peak"], "_STATUS", tmp_path / "nothing")
    assert resident() == peak_resident() > 2**20
