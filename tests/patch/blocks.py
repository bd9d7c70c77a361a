"""Networks as people write them, and the comparison of a patched model with its stock twin.

The comparison runs in float64 on the reference backend: what is tested here is the rewriting, not the kernels.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fusedres.patch import PatchReport, patch


class ResidualBlock(nn.Module):
    """The survey's basic block: ``out += residual``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = torch.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        out += residual
        return torch.relu(out)


class BottleneckBlock(nn.Module):
    """The survey's bottleneck: an empty ``Sequential`` as the identity shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        mid = out_channels // self.expansion
        self.conv1 = nn.Conv2d(in_channels, mid, 1)
        self.bn1 = nn.BatchNorm2d(mid)
        self.conv2 = nn.Conv2d(mid, mid, 3, stride=stride, padding=1)
        self.bn2 = nn.BatchNorm2d(mid)
        self.conv3 = nn.Conv2d(mid, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += self.shortcut(x)
        return torch.relu(out)


class MyResNet(nn.Module):
    """The survey's stack in a ``ModuleList``."""

    def __init__(self, in_channels: int, hidden: int, num_blocks: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_channels, hidden, 3, padding=1), nn.BatchNorm2d(hidden), nn.ReLU())
        self.layers = nn.ModuleList([ResidualBlock(hidden) for _ in range(num_blocks)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return x


class SurveyResNet(nn.Module):
    """A stem with a pooling in its ``Sequential``, bottlenecks, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 7, stride=2, padding=3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)
        )
        self.layer1 = nn.Sequential(BottleneckBlock(8, 16, stride=2), BottleneckBlock(16, 16))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(self.stem(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


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
