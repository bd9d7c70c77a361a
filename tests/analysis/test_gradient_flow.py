"""Gradients at the outputs of blocks."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedres
from fusedres import models
from fusedres.analysis import blocks_of, depth_network, gradient_flow
from fusedres.cli import main


def by_hand(model: nn.Module, x: Tensor) -> list[float]:
    """The same by keeping the gradients of the outputs themselves."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        out.retain_grad()
        kept.append(out)
        return out.clone()  # what comes next may work in place

    hooks = [block.register_forward_hook(keep) for block in blocks_of(model).values()]
    model(x).sum().backward()
    for hook in hooks:
        hook.remove()
    return [float(out.grad.double().norm()) for out in kept]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fused", [False, True])
def test_the_norms_are_those_of_the_outputs_gradients(training, fused):
    model = models.cifar_resnet(8, fused=fused).double().train(training)
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    flow = gradient_flow(model, x)
    assert flow.paths == ("layer1.0", "layer2.0", "layer3.0")
    assert flow.norms == pytest.approx(by_hand(model, x))


def test_patched_blocks_and_those_of_this_library_have_the_stock_norms():
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    model = nn.Sequential(fusedres.nn.ResidualBlock(4), fusedres.nn.BottleneckBlock(4, 8)).double()
    with fusedres.use_backend("stock"):
        stock = gradient_flow(model, x)
    assert gradient_flow(model, x).norms == pytest.approx(stock.norms)
    network = models.cifar_resnet(8, fused=False).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    stock = gradient_flow(network, x)
    fusedres.patch(network)
    assert gradient_flow(network, x).norms == pytest.approx(stock.norms)


def test_the_skip_keeps_what_a_plain_network_does_not():
    """Plain, the gradient grows with depth from block to block; with the skip, much less."""
    x, classes = torch.randn(8, 1, 8, 8), torch.randint(10, (8,))
    ratios = {}
    for kind in ("plain", "residual", "pre-activation"):
        torch.manual_seed(0)
        flow = gradient_flow(depth_network(kind, 44), x, lambda y: F.cross_entropy(y, classes))
        ratios[kind] = flow.first_to_last
    assert ratios["plain"] > 10 * max(ratios["residual"], ratios["pre-activation"])


def test_the_model_is_left_as_it_was():
    model = models.cifar_resnet(8)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    gradient_flow(model, torch.randn(2, 3, 8, 8))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert not any(m._backward_pre_hooks for m in model.modules())


def test_a_block_that_runs_twice_and_classes_that_are_asked_for():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(1, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(x))

    model = Twice()
    nn.init.constant_(model.fc.weight, 2.0)
    flow = gradient_flow(model, torch.ones(1, 1), blocks=(nn.Linear,))
    assert flow.norms == pytest.approx([(1 + 4) ** 0.5])  # gradients 1 and 2


def test_a_block_that_no_gradient_reaches():
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(1, 1), nn.Linear(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.raises(ValueError, match="no gradient reaches unused"):
        gradient_flow(Unused(), torch.ones(1, 1), blocks=(nn.Linear,))


def test_the_command(tmp_path, capsys):
    figure, results = tmp_path / "figure.png", tmp_path / "results.json"
    assert main(["gradient-flow", "--depths", "8", "14", "--out", str(figure), "--json", str(results)]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    content = json.loads(results.read_text())
    assert [(r["kind"], r["depth"], len(r["norms"])) for r in content[3:]] == [
        ("plain", 14, 6),
        ("residual", 14, 6),
        ("pre-activation", 14, 6),
    ]
    assert "first / last" in capsys.readouterr().out
    assert main(["gradient-flow", "--depths", "9"]) == 2
