"""Networks that differ in nothing but the skip."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusedres.analysis import depth_network
from fusedres.analysis.networks import KINDS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [8, 20])
def test_the_depth_is_that_of_its_layers(kind, depth):
    model = depth_network(kind, depth, fused=False)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == depth
    assert model(torch.randn(2, 1, 16, 16)).shape == (2, 10)


def test_plain_and_residual_have_the_same_parameters():
    models = []
    for kind in ("plain", "residual"):
        torch.manual_seed(3)
        models.append(depth_network(kind, 14).state_dict())
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


def test_only_the_skip_differs():
    """Where the branch gives nothing, a plain pair gives nothing, and the others give their input."""
    x = torch.rand(2, 16, 4, 4)
    for kind, expected in (("plain", torch.zeros_like(x)), ("residual", x), ("pre-activation", x)):
        pair = depth_network(kind, 8, fused=False).layer1[0]
        last = pair.conv2 if kind == "pre-activation" else pair.bn2
        nn.init.zeros_(last.weight)
        assert torch.equal(pair(x), expected)


def test_unknown_kinds_and_depths():
    with pytest.raises(ValueError, match="'plain', 'residual', 'pre-activation', got 'other'"):
        depth_network("other", 20)
    with pytest.raises(ValueError, match="6n \\+ 2"):
        depth_network("plain", 18)
