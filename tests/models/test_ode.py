"""The ODE network: size, keys, agreement of stock and fused, memory, learning."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from fusedres import models
from fusedres.benchmarking.memory import saved_bytes
from fusedres.models.ode import ODEFunction, TimeConv2d
from fusedres.testing import channels_last

SMALL = {"channels": 8, "method": "rk4"}


def test_its_size_is_the_papers():
    """0.22 million parameters (Chen et al. 2018, table 1)."""
    parameters = sum(p.numel() for p in models.odenet().parameters())
    assert parameters / 1e6 == pytest.approx(0.22, rel=0.1)


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("in_channels, size", [(1, 28), (3, 32)])
def test_shapes_and_keys(in_channels, size, norm):
    options = SMALL | {"in_channels": in_channels, "num_classes": 7, "norm": norm}
    model, stock = models.odenet(**options), models.odenet(fused=False, **options)
    assert model(torch.randn(2, in_channels, size, size)).shape == (2, 7)
    assert list(model.state_dict()) == list(stock.state_dict())


def test_the_time_is_a_channel():
    conv, x = TimeConv2d(3, 4), torch.randn(2, 3, 5, 5)
    weight = conv.conv.weight
    plain = F.conv2d(x, weight[:, 1:], conv.conv.bias, padding=1)
    of_time = F.conv2d(torch.full((2, 1, 5, 5), 0.25), weight[:, :1], padding=1)
    torch.testing.assert_close(conv(torch.tensor(0.25), x), plain + of_time)
    function = ODEFunction(8)
    x = torch.randn(2, 8, 5, 5)
    assert not torch.allclose(function(torch.tensor(0.0), x), function(torch.tensor(1.0), x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_fused_agrees_with_stock(norm, training):
    options = SMALL | {"norm": norm}
    stock, fused = (models.odenet(fused=f, **options).train(training) for f in (False, True))
    fused.load_state_dict(stock.state_dict())
    x = channels_last((4, 1, 28, 28))
    with torch.no_grad():
        exact = copy.deepcopy(stock).double()(x.double())
        stock_error, fused_error = ((model(x).double() - exact).norm() for model in (stock, fused))
    assert fused_error <= 2 * stock_error + 1e-6 * exact.norm()


def test_the_adjoint_keeps_less():
    x = torch.randn(4, 1, 28, 28)
    kept = []
    for adjoint in (False, True):
        model = models.odenet(adjoint=adjoint, channels=16)
        kept.append(saved_bytes(model, lambda model=model: model(x)))
        model(x).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert kept[1] < 0.5 * kept[0]


def test_it_learns():
    """Two kinds of stripes are told apart."""
    torch.manual_seed(0)
    images = torch.zeros(16, 1, 16, 16)
    images[:8, :, ::2] = 1.0
    images[8:, :, :, ::2] = 1.0
    labels = torch.arange(16) // 8
    model = models.odenet(num_classes=2, **SMALL)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert torch.equal(model(images).argmax(1), labels)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="norm must be 'group' or 'batch', got 'layer'"):
        models.odenet(norm="layer")
    with pytest.raises(ValueError, match="32 groups, which must divide the channels, got 48"):
        models.odenet(channels=48)
    with pytest.raises(ValueError, match="method must be one of"):
        models.odenet(method="rk45")
