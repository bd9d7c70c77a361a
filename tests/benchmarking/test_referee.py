"""What a contestant is held to."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fusedres.benchmarking.referee import DRAWS, Referee


def inputs(seed: int) -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())


def failing(comparison) -> set[str]:
    return {entry.name for entry in comparison.entries if not entry.ok}


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_stock_itself_is_right(autocast):
    model = network()
    referee = Referee(model, inputs, autocast=autocast, input_gradients=True)
    twin = copy.deepcopy(model)
    found = referee.judge(twin, twin)
    assert found.ok
    assert {"output", "grad of input 0", "grad of 0.weight", "1.running_mean"} <= {e.name for e in found.entries}


def test_wrong_gradients_and_buffers_are_seen():
    model = network()
    twin = copy.deepcopy(model)

    def no_gradient(x):
        return twin(x).detach() + 0 * twin[0].weight.sum()

    assert {"grad of 0.weight", "grad of 1.bias"} <= failing(Referee(model, inputs).judge(twin, no_gradient))
    frozen = copy.deepcopy(model)

    def no_statistics(x):
        out = frozen(x)
        frozen[1].running_mean.data.zero_()
        return out

    assert failing(Referee(model, inputs).judge(frozen, no_statistics)) == {"1.running_mean"}


def test_what_is_judged_is_left_as_stock_is():
    model = network()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].weight.zero_()  # a step has changed it
    Referee(model, inputs).judge(twin, twin)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values()))
    assert all(p.grad is None for p in twin.parameters())


def test_what_it_measures_by_is_found_once():
    seeds = []
    referee = Referee(network().eval(), lambda seed: seeds.append(seed) or inputs(seed), backward=False)
    for _ in range(2):
        twin = network().eval()
        assert not referee.judge(twin, lambda x, twin=twin: twin(x) + 1).ok
    # Every draw of each of the two, and once for the measure.
    assert sorted(seeds) == sorted([*range(DRAWS[-1])] * 3)
