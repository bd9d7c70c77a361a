"""Gated and sparse skips in the ways that people write them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusedres.patch import patch

from ..blocks import check_patched, images
from .test_residual import block


def highway(self, x):
    gate = torch.sigmoid(self.gate(x))
    return gate * self.branch(x) + (1 - gate) * x


def other_orders(self, x):
    g = F.sigmoid(self.gate(x))
    return x * (1.0 - g) + self.branch(x) * g


def by_name(self, x):
    g = self.gate(x).sigmoid()
    out = torch.mul(g, self.branch(x))
    out += torch.mul(torch.sub(1, g), x)
    return out


def by_module(self, x):
    g = self.sigmoid(self.gate(x))
    return g * self.branch(x) + (1 - g) * self.skip(x)


def sparse(self, x):
    gate = torch.sigmoid(self.gate(x))
    mask = (gate > self.threshold).float()
    return mask * self.branch(x) + (1 - mask) * x


def sparse_in_the_gates_dtype(self, x):
    g = torch.sigmoid(self.gate(x))
    m = torch.gt(g, 0.4).to(g.dtype)
    return (1 - m) * x + m * self.branch(x)


def sparse_as_the_gate(self, x):
    g = torch.sigmoid(self.gate(x))
    m = (g > 0.4).type_as(g)
    return (1 - m) * x + m * self.branch(x)


def gated_block(forward) -> nn.Module:
    layers = {"gate": nn.Conv2d(4, 4, 1), "skip": nn.Conv2d(4, 4, 1), "sigmoid": nn.Sigmoid()}
    model = block(forward, **layers)
    model.threshold = 0.5
    return model


@pytest.mark.parametrize("forward", [highway, other_orders, by_name, by_module])
def test_gated(forward):
    report = check_patched(gated_block(forward))
    assert {site.pattern: site.convolutions for site in report.fused} == {
        "conv-bn-relu-conv-bn": ("conv1", "conv2"),
        "gated skip": ("gate",),
    }
    assert "m * f + (1 - m) * x, m = sigmoid(gate)\n" in report.source("")
    assert "gated_1.join(block_0_out, gate, " in report.source("")


@pytest.mark.parametrize("forward", [sparse, sparse_in_the_gates_dtype, sparse_as_the_gate])
def test_sparse(forward):
    model = gated_block(forward)
    report = check_patched(model)
    assert "sparse skip" in [site.pattern for site in report.fused]
    assert "sigmoid(gate) > 0." in report.source("")


def test_a_dense_gate_for_vectors():
    class Highway(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.fn, self.gate = (
                nn.Conv2d(4, 6, 3),
                nn.BatchNorm2d(6),
                nn.Linear(6, 6),
                nn.Linear(6, 6),
            )

        def forward(self, x):
            x = self.bn(self.conv(x)).mean((2, 3))
            g = torch.sigmoid(self.gate(x))
            return g * self.fn(x) + (1 - g) * x

    report = check_patched(Highway())
    assert [(site.pattern, site.convolutions) for site in report.fused] == [("conv-bn", ("conv",)), ("gated skip", ())]


def test_a_gate_that_is_broadcast():
    model = gated_block(highway)
    model.gate = nn.Conv2d(4, 1, 1)
    assert "gated skip" in [site.pattern for site in check_patched(model).fused]


@pytest.mark.parametrize("forward", [highway, sparse, sparse_in_the_gates_dtype])
def test_the_result_has_stocks_dtype(forward):
    stock, model = (gated_block(forward).bfloat16().eval() for _ in range(2))
    model.load_state_dict(stock.state_dict())
    patch(model)
    x = images().bfloat16()
    assert model(x).dtype == stock(x).dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert model.float()(x.float()).dtype == stock.float()(x.float()).dtype


def test_options():
    report = check_patched(gated_block(highway), backend="reference", memory="low")
    assert "x, backend = 'reference', memory = 'low')" in report.source("").split("gated_1.join(")[1]


def two_gates(self, x):
    return torch.sigmoid(self.gate(x)) * self.branch(x) + (1 - torch.sigmoid(self.skip(x))) * x


def not_from_one(self, x):
    g = torch.sigmoid(self.gate(x))
    return g * self.branch(x) + (2 - g) * x


def gate_that_is_shown(self, x):
    g = torch.sigmoid(self.gate(x))
    return g * self.branch(x) + (1 - g) * x, g


def a_learnt_threshold(self, x):
    m = (torch.sigmoid(self.gate(x)) > self.bn1.bias.mean()).float()
    return m * self.branch(x) + (1 - m) * x


def in_double(self, x):
    m = (torch.sigmoid(self.gate(x)) > 0.5).to(torch.float64)
    return m * self.branch(x) + (1 - m) * x


@pytest.mark.parametrize("forward", [two_gates, not_from_one, gate_that_is_shown, a_learnt_threshold, in_double])
def test_what_only_looks_like_it(forward):
    report = check_patched(gated_block(forward))
    assert [site.pattern for site in report.fused] == ["conv-bn-relu-conv-bn"]
