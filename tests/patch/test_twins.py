"""Blocks that are the same are traced once; whatever tells one from another, each keeps its own forward."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from torch import nn

from fusedres.patch import patch, trace

from .blocks import Layers, assert_same, check_patched, images, settled


@pytest.fixture
def traces(monkeypatch):
    """The classes of what is traced."""
    seen = []
    original = trace._trace_once

    def counted(module, *arguments):
        seen.append(type(module))
        return original(module, *arguments)

    monkeypatch.setattr(trace, "_trace_once", counted)
    return seen


def test_a_repeated_block_is_traced_once(traces):
    counts = []
    for depth in (2, 9):
        traces.clear()
        report = check_patched(nn.Sequential(*(Layers() for _ in range(depth))))
        assert len(report.fused) == depth
        counts.append(traces.count(Layers))
    assert counts[0] == counts[1] > 0


def test_each_has_its_own_parameters_and_statistics():
    model = settled(nn.Sequential(Layers(), Layers()))
    with torch.no_grad():
        model[1].bn2.weight.mul_(3)
        model[1].bn1.running_mean.add_(1)
    patched = copy.deepcopy(model)
    patch(patched)
    assert_same(patched, model, images())


class Scaled(Layers):
    """A block whose forward asks what it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.factor, self.factors, self.settings = 1, [1, 2], {"of": {"branch": 1}}
        self.holder, self.act, self.number = None, nn.ReLU(), None
        self.gains = nn.ParameterList([nn.Parameter(torch.ones(1))])

    def forward(self, x):
        branch = self.branch(x) * self.factor * self.factors[1] * self.settings["of"]["branch"]
        branch = branch * len(self.gains) * (1 if self.holder is None else self.holder.value)
        branch = branch * (1 if self.number is None else float(self.number))
        return self.act(branch * self.gains[0].shape[0] + x)


def test_blocks_that_are_asked_what_they_hold_are_traced_once(traces):
    check_patched(nn.Sequential(*(Scaled() for _ in range(9))))
    assert 0 < traces.count(Scaled) <= 3


def _with_buffers(model):
    for block, value in zip(model, (1.0, 2.0)):
        del block.number
        block.register_buffer("number", torch.tensor(value, dtype=torch.float64))


def _with_objects(model):
    for block, value in zip(model, (1, 2)):
        block.holder = types.SimpleNamespace(value=value)


def _hook(model):
    model.relu.register_forward_hook(lambda *arguments: None)
    model.bn2.register_forward_hook(lambda module, inputs, out: out * 2)


DIFFERENCES = {
    "a number": lambda m: setattr(m, "factor", 2),
    "the type of a number": lambda m: setattr(m, "factor", 1.5),
    "a list": lambda m: m.factors.__setitem__(1, 5),
    "a dictionary in a dictionary": lambda m: m.settings["of"].__setitem__("branch", 3),
    "a submodule": lambda m: setattr(m, "act", nn.Tanh()),
    "a setting of a submodule": lambda m: setattr(m.relu, "inplace", False),
    "one parameter more": lambda m: m.gains.append(nn.Parameter(torch.ones(1, dtype=torch.float64))),
    "the shape of a parameter": lambda m: m.gains.__setitem__(0, nn.Parameter(torch.ones(4, dtype=torch.float64))),
    "a hook": _hook,
    "a submodule shared": lambda m: setattr(m, "conv2", m.conv1),
    "a frozen parameter": lambda m: m.conv1.weight.requires_grad_(False),
    "a norm in evaluation mode": lambda m: m.bn1.eval(),
}


@pytest.mark.parametrize("index", [0, 1], ids=["of the first", "of the last"])
@pytest.mark.parametrize("difference", DIFFERENCES.values(), ids=DIFFERENCES)
def test_what_tells_blocks_apart(difference, index):
    stock = settled(nn.Sequential(Scaled(), Scaled()))
    difference(stock[index])
    _check(stock)


@pytest.mark.parametrize("difference", [_with_buffers, _with_objects])
def test_what_only_the_forward_could_tell(difference):
    """Two tensors, or objects of any class, are never said to be equal."""
    stock = settled(nn.Sequential(Scaled(), Scaled()))
    difference(stock)
    _check(stock)


@pytest.mark.parametrize("index", [0, 1])
def test_a_forward_of_its_own(index):
    stock = settled(nn.Sequential(Scaled(), Scaled()))
    patched = copy.deepcopy(stock)
    for model in (stock, patched):
        model[index].forward = lambda x, block=model[index]: block.branch(x) - x
    patch(patched)
    assert_same(patched, stock, images())


def _check(stock):
    patched = copy.deepcopy(stock)
    patch(patched)
    assert_same(patched, stock, images())
