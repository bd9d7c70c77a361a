"""Modules that multiply by a mask of their own drawing, and what only looks like one."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusedres.mask import Mask, mask_of


def drop_path(x, drop_prob=0.0, training=False):
    """As most repositories write it."""
    if drop_prob == 0.0 or not training:
        return x
    keep_prob = 1 - drop_prob
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    random_tensor = keep_prob + torch.rand(shape, dtype=x.dtype, device=x.device)
    random_tensor.floor_()
    return x.div(keep_prob) * random_tensor


class Drop(nn.Module):
    """``factor`` makes the result in training."""

    def __init__(self, factor, p=0.25):
        super().__init__()
        type(self).factor = staticmethod(factor)
        self.p = p

    def forward(self, x):
        return self.factor(x, self.p) if self.training and self.p else x


def drop(factor, p=0.25):
    return type("Drop", (Drop,), {})(factor, p)


def bernoulli(x, p):
    return x * x.new_empty((x.size(0), 1, 1, 1)).bernoulli_(1 - p).div_(1 - p)


MASKS = {
    "floor": (lambda x, p: drop_path(x, p, True), Mask(False, 1 / 0.75)),
    "bernoulli": (bernoulli, Mask(False)),
    "mask first": (lambda x, p: torch.empty(x.shape[0], 1, 1, 1).bernoulli_(1 - p) * x, Mask(False)),
    "number behind": (lambda x, p: x * (torch.rand(len(x), 1, 1, 1) > p).to(x.dtype) / (1 - p), Mask(False, 1 / 0.75)),
    "like a part": (lambda x, p: x * torch.bernoulli(torch.full_like(x[:, :1, :1, :1], 1 - p)), Mask(False)),
    "channels": (lambda x, p: F.dropout2d(x, p, True), Mask(True)),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    factor, expected = MASKS[name]
    module = drop(factor)
    assert mask_of(module) == expected
    assert mask_of(module.eval()) == expected
    assert not module.training


def by_python(x, p):
    return x * (random.random() > p)


def by_numpy(x, p):
    return x * float(np.random.rand() > p)


NOT_MASKS = {
    "whole batch": lambda x, p: x * torch.bernoulli(torch.tensor(1 - p)),
    "pixels": lambda x, p: x * (torch.rand(x.shape[0], 1, *x.shape[2:]) > p),
    "elements": lambda x, p: F.dropout(x, p, True),
    "noise": lambda x, p: x + torch.rand(x.shape[0], 1, 1, 1),
    "square": lambda x, p: x * x * torch.rand(x.shape[0], 1, 1, 1),
    "by values": lambda x, p: x * (x.mean((1, 2, 3), keepdim=True) > p).to(x.dtype),
    "two masks": lambda x, p: x * torch.rand(x.shape[0], 1, 1, 1) * torch.rand(x.shape[0], 1, 1, 1),
    "by size": lambda x, p: x * torch.rand(x.shape[0], 1, 1, 1) * (1 - p / x.shape[2]),
    "in place": lambda x, p: x.mul_(torch.rand(x.shape[0], 1, 1, 1)),
    "another type": lambda x, p: (x * torch.rand(x.shape[0], 1, 1, 1)).double(),
    "a branch by chance": lambda x, p: x * torch.rand(x.shape[0], 1, 1, 1) if torch.rand(()) > 2 * p else x,
    "python": by_python,
    "numpy": by_numpy,
    "nothing": lambda x, p: x,
    "an error": lambda x, p: x @ x,
}


@pytest.mark.parametrize("name", NOT_MASKS)
def test_what_is_none(name):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    assert mask_of(drop(NOT_MASKS[name])) is None
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()


def test_other_things_in_evaluation():
    class Scaled(Drop):
        def forward(self, x):
            return super().forward(x) if self.training else x * (1 - self.p)

    assert mask_of(Scaled(bernoulli)) is None


def test_a_module_with_a_state_of_its_own():
    class Counting(Drop):
        def forward(self, x):
            self.calls = getattr(self, "calls", 0) + self.training
            return super().forward(x)

    module = Counting(bernoulli)
    assert mask_of(module) is None
    assert "calls" not in module.__dict__
    with_parameter = drop(bernoulli)
    with_parameter.scale = nn.Parameter(torch.ones(()))
    assert mask_of(with_parameter) is None


def test_it_looks_again_when_a_setting_changes():
    module = drop(MASKS["floor"][0])
    assert mask_of(module).number == 1 / 0.75
    module.p = 0.5
    assert mask_of(module).number == 2.0
    module.p = 0.0
    assert mask_of(module) is None


def test_layers_of_pytorch():
    assert mask_of(nn.Dropout2d(0.5)) == Mask(True)
    for other in (nn.Dropout(0.5), nn.Identity(), nn.ReLU(), nn.AlphaDropout(0.5)):
        assert mask_of(other) is None
