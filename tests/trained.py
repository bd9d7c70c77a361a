"""A few steps of training of a small network, patched, stock and in float64, and what becomes of its parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision_shim import torchvision_models

import fusedres
from fusedres.testing import Results, compare_results

__all__ = ["check_training", "images", "small_resnet", "steps"]

CLASSES = 8


def small_resnet(seed: int = 0) -> nn.Module:
    """torchvision's ResNet with one basic block per stage."""
    torch.manual_seed(seed)
    resnet = torchvision_models().resnet
    return resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)


def images(seed: int, dtype: torch.dtype = torch.float32, count: int = 4) -> tuple[Tensor, Tensor]:
    """Images and classes, the same for each seed."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 32, 32, generator=generator)
    return x.to(dtype), torch.randint(CLASSES, (count,), generator=generator)


def steps(model: nn.Module, seed: int, forward: Callable[[nn.Module, Tensor], Tensor] | None = None) -> None:
    """Two steps of SGD, in the model's dtype."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for step in range(2):
        x, y = images(10 * seed + step, next(model.parameters()).dtype)
        out = model(x) if forward is None else forward(model, x)
        optimizer.zero_grad()
        nn.functional.cross_entropy(out, y).backward()
        optimizer.step()


def check_training(
    fit: Callable[[nn.Module, int], nn.Module | None], build: Callable[[int], nn.Module] = small_resnet
) -> None:
    """Asserts that ``fit`` leaves a patched model with the state of a stock one, within the budgets.

    Args:
        fit: trains a model, given a seed, in the dtype of its parameters; may return another one, to be compared.
        build: makes a stock model from a seed.
    """

    def draw(seed: int) -> tuple[Results, Results, Results]:
        stock = build(seed).train()
        patched, exact = copy.deepcopy(stock), copy.deepcopy(stock).double()
        assert fusedres.patch(patched).coverage == 1.0
        found = []
        for model in (patched, stock, exact):
            fitted = fit(model, seed)
            found.append({name: t.clone() for name, t in (fitted or model).state_dict().items()})
        assert any(not torch.equal(t, build(seed).state_dict()[name]) for name, t in stock.state_dict().items())
        return tuple(found)

    compare_results(draw).check()
