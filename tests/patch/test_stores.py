"""What a forward stores while it is traced, one level deep or more, is taken back and a reason to decline it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from survey_blocks import ResidualBlock
from torch import nn

from fusedres.patch import explain

from .blocks import Layers, check_patched

FEATURES, LATEST, ELSEWHERE = [], None, {}


class Holder:
    feature = None


def keep_elsewhere(value, place=ELSEWHERE):
    place["feature"] = value


def keeps_in_a_nested_list(self, x):
    self.state["features"].append(y := self.branch(x))
    return y


def counts_in_a_dictionary(self, x):
    self.state["calls"] += 1
    return self.branch(x)


def keeps_in_an_object(self, x):
    self.holder.feature = y = self.branch(x)
    return y


def keeps_in_a_namespace(self, x):
    self.space.feature = y = self.branch(x)
    return y


def keeps_on_a_layer(self, x):
    self.relu.feature = y = self.branch(x)
    return y


def keeps_on_the_class(self, x):
    type(self).feature = y = self.branch(x)
    return y


def keeps_in_a_global_list(self, x):
    FEATURES.append(y := self.branch(x))
    return y


def keeps_in_a_global(self, x):
    global LATEST
    LATEST = y = self.branch(x)
    return y


def keeps_in_a_default(self, x):
    keep_elsewhere(y := self.branch(x))
    return y


def keeps_on_a_class_of_others(self, x):
    Holder.feature = y = self.branch(x)
    return y


def keeps_and_fails(self, x):
    keep_elsewhere(y := self.branch(x))
    self.state["features"].append(y)
    return y if y.sum() > 0 else x


STORES = {
    keeps_in_a_nested_list: "stores a value on the module ('state')",
    counts_in_a_dictionary: "stores a value on the module ('state')",
    keeps_in_an_object: "stores a value on the module ('holder')",
    keeps_in_a_namespace: "stores a value on the module ('space')",
    keeps_on_a_layer: "stores a value on the module ('feature')",
    keeps_on_the_class: "stores a value on its class ('feature')",
    keeps_in_a_global_list: "stores a value in a global ('FEATURES')",
    keeps_in_a_global: "stores a value in a global ('LATEST')",
    keeps_in_a_default: "stores a value outside of the module",
    keeps_on_a_class_of_others: "stores a value outside of the module",
    keeps_and_fails: "branches on data",
}


@pytest.mark.parametrize("forward", STORES, ids=lambda f: f.__name__)
def test_what_a_forward_stores_anywhere_is_taken_back(forward):
    block = type("Keeping", (Layers,), {"forward": forward, "feature": "of the class"})()
    block.state, block.holder, block.space = {"features": [], "calls": 0}, Holder(), SimpleNamespace(feature=None)
    model = nn.Sequential(block, ResidualBlock(4))
    report = explain(model)
    assert [site.path for site in report.fused] == ["1"]
    assert STORES[forward] in report.declined[0].reason
    assert block.state == {"features": [], "calls": 0}
    assert vars(block.holder) == ELSEWHERE == {}
    assert Holder.__dict__.get("feature") is block.space.feature is LATEST is None
    assert FEATURES == []
    assert "feature" not in vars(block.relu)
    assert type(block).feature == "of the class"


def test_what_the_parent_stores_on_a_block_spoils_the_parent_alone():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), ResidualBlock(4)

        def forward(self, x):
            self.block.last_input = y = self.first(x)
            return self.block(y)

    model = Parent()
    assert [site.path for site in explain(model).fused] == ["first", "block"]
    assert not hasattr(model.block, "last_input")


def test_values_in_a_cycle_of_references_are_not_stored():
    class Block(Layers):
        def forward(self, x):
            def again(n):
                return again(n - 1) if n else y

            y = self.branch(x)
            return again(2) + x

    assert check_patched(Block()).coverage == 1.0
