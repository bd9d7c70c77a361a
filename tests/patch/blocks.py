"""Layers for forwards that a test writes, and the comparison of a patched model with its stock twin.

The comparison runs in float64 on the reference backend: what is tested here is the rewriting, not the kernels.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fusedres.patch import PatchReport, patch


class Layers(nn.Module):
    """Two convolutions with batch norms, for forwards that a test writes into a subclass; ``C`` channels throughout."""

    C = 4

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(self.C, self.C, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(self.C)
        self.conv2 = nn.Conv2d(self.C, self.C, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(self.C)
        self.relu = nn.ReLU(inplace=True)

    def branch(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.branch(x) + x)


def settled(model: nn.Module, seed: int = 0) -> nn.Module:
    """``model`` in float64 with reproducible parameters and statistics that are not those of a fresh batch norm."""
    generator = torch.Generator().manual_seed(seed)
    model.double()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) * 0.4 + 0.1)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                noise = torch.randn(module.weight.shape, generator=generator, dtype=torch.float64)
                module.weight.copy_(noise / module.weight[0].numel() ** 0.5)
    return model


def images(channels: int = Layers.C, size: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, size, size, generator=generator, dtype=torch.float64)


def check_patched(model: nn.Module, *inputs: Tensor, **options) -> PatchReport:
    """Patches ``model`` and asserts that outputs, gradients, buffers and the inputs stay as in a stock twin."""
    stock = settled(model)
    patched = copy.deepcopy(stock)
    report = patch(patched, **options)
    assert_same(patched, stock, *inputs or (images(),))
    return report


def assert_same(patched: nn.Module, stock: nn.Module, *inputs: Tensor) -> None:
    for training in (True, False):
        ours, theirs = (_observe(model.train(training), inputs) for model in (patched, stock))
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def _observe(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor | None]:
    """Everything that a step computes: outputs, gradients of parameters and inputs, buffers, inputs after the call."""
    model.zero_grad()
    leaves = [x.clone().requires_grad_() for x in inputs]
    given = [x * 1 for x in leaves]
    out = model(*given)
    outputs = out if isinstance(out, (tuple, list)) else (out,)
    sum((o * torch.arange(o.numel()).view_as(o).cos()).sum() for o in outputs).backward()
    seen = {f"output {i}": o for i, o in enumerate(outputs)}
    seen.update({f"input {i} after": x for i, x in enumerate(given)})
    seen.update({f"gradient of input {i}": x.grad for i, x in enumerate(leaves)})
    seen.update({f"gradient of {n}": p.grad for n, p in model.named_parameters()})
    seen.update({f"buffer {n}": b.clone() for n, b in model.named_buffers()})
    return seen
