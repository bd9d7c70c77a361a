"""What a graph records that plain ``torch.fx`` would lose. What it declines is tested in ``test_plan.py``."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import nn

from fusedres.patch.trace import IN_PLACE_OPERATORS, Untraceable, survey, trace


def module(forward) -> nn.Module:
    return type("Traced", (nn.Module,), {"forward": forward})()


def everything(_: nn.Module) -> bool:
    return True


@pytest.mark.parametrize("target", IN_PLACE_OPERATORS, ids=lambda f: f.__name__)
def test_in_place_operators_stay_in_place(target):
    graph = trace(module(lambda self, x, y: target(x, y)), everything).graph
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [target]


def test_augmented_assignment_is_in_place():
    def forward(self, x, y):
        x += y
        return x

    graph = trace(module(forward), everything).graph
    assert operator.iadd in {node.target for node in graph.nodes}


def test_defaults_are_fixed_and_the_signature_kept():
    traced = trace(module(lambda self, x, n=2, *, flag=False: x if flag else x * n), everything)
    assert [node.name for node in traced.graph.nodes if node.op == "placeholder"] == ["x"]
    assert str(traced.signature) == "(x, n=2, *, flag=False)"


def test_a_submodule_is_inlined_called_or_called_because_it_must_be():
    plain = nn.Sequential(module(lambda self, x: x * 2))
    branching = nn.Sequential(module(lambda self, x: x if x.sum() > 0 else -x))
    assert len(trace(plain, everything).inlined) == 1
    for model, inline in ((plain, lambda _: False), (branching, everything)):
        traced = trace(model, inline)
        assert traced.inlined == frozenset()
        assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0"]


def test_survey_looks_at_eval_mode_alone():
    model = module(lambda self, x: x * 2 if self.training else x)
    assert len(survey(model, everything).graph.nodes) == 2
    with pytest.raises(Untraceable, match="train and in eval"):
        trace(model, everything)


def test_a_submodule_that_differs_between_the_modes_spoils_only_what_inlines_it():
    model = nn.Sequential(module(lambda self, x: x * 2 if self.training else x))
    with pytest.raises(Untraceable, match="train and in eval"):
        trace(model, everything)
    assert trace(model, lambda _: False).inlined == frozenset()


def test_constants_are_not_stored_on_the_module():
    model = module(lambda self, x: x + torch.ones(3))
    with pytest.raises(Untraceable, match="constant tensor"):
        trace(model, everything)
    assert not [name for name in model.__dict__ if "constant" in name]
