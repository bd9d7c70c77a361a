"""``torch.compile`` as a contestant that may be missing."""

from __future__ import annotations

import math
from time import perf_counter

import pytest
import torch
from torch import nn

from fusedres.benchmarking.compiled import CompileBudget, compile_contestant


def step_of(model):
    x = torch.randn(2, 4)
    return lambda: model(x)


def test_a_budget_compares_what_a_compilation_takes_with_what_is_left():
    assert CompileBudget(math.inf).refuses(True) is None
    assert CompileBudget(-math.inf).refuses(True) == "not asked for"
    assert CompileBudget(perf_counter() + 1000).refuses(True) is None
    assert "no time" in CompileBudget(perf_counter() + 1000, reserve=990).refuses(True)


def test_a_budget_learns():
    budget = CompileBudget(perf_counter() + 20)
    assert budget.refuses(True) is not None
    budget.spent(False, 1.0)
    assert budget.refuses(True) is None


def test_no_time_means_no_step():
    compiled = compile_contestant(nn.Linear(4, 4), step_of, True, CompileBudget(-math.inf))
    assert compiled.step is None and compiled.missing == "not asked for"


@pytest.mark.parametrize("message", ["broken\nin many lines", ""])
def test_a_failure_is_a_reason(monkeypatch, message):
    def fail(*args, **kwargs):
        raise RuntimeError(message)

    monkeypatch.setattr(torch, "compile", fail)
    compiled = compile_contestant(nn.Linear(4, 4), step_of, True, CompileBudget(math.inf))
    assert compiled.step is None
    assert compiled.missing == f"it failed: RuntimeError: {message.partition(chr(10))[0]}".rstrip(" :")


def test_a_success_is_timed(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, options: model)
    compiled = compile_contestant(nn.Linear(4, 4), step_of, False, CompileBudget(math.inf))
    assert compiled.step().shape == (2, 4)
    assert compiled.first_step > 0 and not compiled.missing
