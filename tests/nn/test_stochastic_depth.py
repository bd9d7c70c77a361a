"""Stochastic depth draws as torchvision's does."""

from __future__ import annotations

import pytest
import torch
from torchvision_shim import torchvision_ops

from fusedres.nn import StochasticDepth


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32, 3, 4, 5), (32, 6), (0, 3, 4, 5)])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("training", [True, False])
def test_the_same_seed_drops_the_same_samples(dtype, shape, p, training):
    theirs, ours = torchvision_ops().StochasticDepth(p, "row").train(training), StochasticDepth(p).train(training)
    x = torch.randn(shape, dtype=dtype)
    for seed in range(3):
        torch.manual_seed(seed)
        expected = theirs(x)
        torch.manual_seed(seed)
        assert torch.equal(ours(x), expected)


def test_whole_samples_are_dropped_and_the_others_scaled():
    x = torch.ones(2000, 2, 3)
    y = StochasticDepth(0.2)(x)
    kept = y[:, 0, 0] > 0
    assert torch.equal(y, (kept * (1 / 0.8)).view(-1, 1, 1).expand_as(y))
    assert abs(int(kept.sum()) - 1600) < 5 * (2000 * 0.2 * 0.8) ** 0.5


def test_nothing_is_drawn_where_nothing_is_dropped():
    x = torch.ones(3, 2)
    state = torch.get_rng_state()
    assert StochasticDepth(0.0)(x) is x and StochasticDepth(0.5).eval()(x) is x
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_other_probabilities_are_refused(p):
    with pytest.raises(ValueError, match="p must be between 0 and 1"):
        StochasticDepth(p)


def test_it_has_no_keys_and_says_its_probability():
    assert not StochasticDepth(0.5).state_dict()
    assert repr(StochasticDepth(0.5)) == "StochasticDepth(p=0.5)"
