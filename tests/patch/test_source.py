"""What the code of a forward names, and whether it asks for its class."""

from __future__ import annotations

import pytest
import torch
from survey_blocks import ResidualBlock
from torch import nn

from fusedres.patch import patch
from fusedres.patch.source import named_in

from .blocks import Layers, check_patched, images, settled


class NamesItself(Layers):
    def forward(self, x):
        return self.branch(x) * (2 if type(self).__name__ == "NamesItself" else 3)


class AsksForItsClass(Layers):
    def forward(self, x):
        return self.factor() * self.branch(x)

    def factor(self):
        return 2 if self.__class__ is AsksForItsClass else 3


class CallsItsBase(Layers):
    def forward(self, x):
        return super(type(self), self).forward(x)


class CallsItsBaseByName(Layers):
    def forward(self, x):
        return super(CallsItsBaseByName, self).forward(x) * type(self).C  # noqa: UP008


@pytest.mark.parametrize("cls", [NamesItself, AsksForItsClass, CallsItsBase])
def test_a_forward_that_asks_for_its_class_is_left(cls):
    report = check_patched(nn.Sequential(cls(), ResidualBlock(4)))
    assert [site.path for site in report.fused] == ["1"]
    assert "asks for the class of its module" in report.declined[0].reason


def test_a_class_that_is_a_way_to_its_attributes_is_no_matter():
    model = settled(CallsItsBaseByName()).eval()
    expected = model(images())
    assert patch(model).coverage == 1.0
    torch.testing.assert_close(model(images()), expected, rtol=1e-9, atol=1e-11)
    model.relu.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(model(images()), expected, rtol=1e-9, atol=1e-11)


def helper(module, x):
    return x * module.from_helper


class Reading(Layers):
    def forward(self, x):
        return helper(self, self.rest(x)) + sum(self.in_loop for _ in range(2)) + getattr(self, "by_string")  # noqa: B009

    @property
    def setting(self):
        return self.from_property

    def rest(self, x):
        return super().forward(x) * self.setting

    def not_called(self):
        return self.elsewhere


def test_names_are_those_of_all_code_that_a_forward_may_run():
    assert named_in(Reading) >= {"from_helper", "in_loop", "by_string", "from_property", "branch", "conv1"}
    assert "elsewhere" not in named_in(Reading)
