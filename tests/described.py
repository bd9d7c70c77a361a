"""Residual blocks that run either way: module by module in stock PyTorch, or as a description by the engine."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fusedres.block import Act, Block, Conv, Dense, Dropout, DropPath, Norm, Pool, SqueezeExcite, run, run_dense
from fusedres.block import Step as DescribedStep
from fusedres.ops.activations import IDENTITY, RELU, Activation, activation
from fusedres.ops.dropout import draw_seed, keep_scale

__all__ = ["BLOCKS", "DenseBlock", "Depth", "Described", "Gate", "basic", "bottleneck", "conv", "fuse", "norm", "norms"]
__all__ += ["replay"]

Step = nn.Module | str | Activation


class Gate(nn.Module):
    """Squeeze-excitation: ``x * gate(fc2(relu(fc1(mean(x)))))``."""

    def __init__(self, channels: int, hidden: int, linear: bool = False, bias: bool = True) -> None:
        super().__init__()
        make = nn.Linear if linear else lambda c, k, bias: nn.Conv2d(c, k, 1, bias=bias)
        self.fc1, self.fc2, self.linear = make(channels, hidden, bias=bias), make(hidden, channels, bias=bias), linear
        self.gate = "hardsigmoid" if linear else "sigmoid"

    def forward(self, x: Tensor) -> Tensor:
        s = self.fc2(torch.relu(self.fc1(x.mean((2, 3), keepdim=not self.linear))))
        s = nn.functional.hardsigmoid(s) if self.linear else torch.sigmoid(s)
        return x * s.view(*s.shape[:2], 1, 1)


class Depth(nn.Module):
    """Stochastic depth."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.p):
            return x
        kept = torch.empty((len(x), 1, 1, 1), dtype=x.dtype).bernoulli_(1 - self.p)
        return x * (kept / (1 - self.p) if self.p < 1 else kept)


class Described(nn.Module):
    """``act(branch(x) + shortcut(x))``; a step is a convolution, a batch norm, a dropout, a gate, stochastic depth, a
    max pooling, or an activation or its name. Either way it draws the same masks.

    Args:
        branch, shortcut: as in :class:`fusedres.block.Block`.
        act: the activation behind the addition.
        residual: what the shortcut reads, as in :class:`fusedres.block.Block`.
        in_place: whether the addition is written ``+=``.
        options: of :func:`fusedres.block.run`.
    """

    def __init__(
        self,
        branch: list[Step],
        shortcut: list[Step] | None = None,
        act: str = "relu",
        *,
        residual: str = "input",
        in_place: bool = False,
        **options: str,
    ) -> None:
        super().__init__()
        self.branch, self.branch_steps = _split(branch)
        self.shortcut, self.shortcut_steps = _split(shortcut or [])
        self.joins, self.act, self.in_place, self.options = shortcut is not None, activation(act), in_place, options
        self.fuses = False
        self.block = Block(
            _described("branch", self.branch, self.branch_steps),
            _described("shortcut", self.shortcut, self.shortcut_steps) if self.joins else None,
            self.act if self.joins else IDENTITY,
            residual,
            in_place,
        )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        torch.manual_seed(0)
        if self.fuses:
            return run(self.block, self, x, residual, **self.options)
        if self.block.residual == "pending":
            head = next(i for i, step in enumerate(self.block.branch) if isinstance(step, Conv))
            x = _called(self.branch, self.branch_steps[:head], x)
            out = _called(self.branch, self.branch_steps[head:], x)
        else:
            out = _called(self.branch, self.branch_steps, x)
        if not self.joins:
            return out
        side = _called(self.shortcut, self.shortcut_steps, x if residual is None else residual)
        if self.in_place:
            out += side
        else:
            out = out + side
        return self.act(out)


class DenseBlock(nn.Module):
    """A dense block, by concatenation or from one buffer; drawn masks are the same."""

    def __init__(
        self,
        count: int = 3,
        channels: int = 10,
        growth: int = 6,
        *,
        inner: bool = True,
        dropout: float = 0.0,
        **options,
    ) -> None:
        super().__init__()
        self.layers, self.options, self.fuses = nn.ModuleList(), options, False
        self.dropout = nn.Dropout(dropout)
        steps = []
        for i in range(count):
            c = channels + i * growth
            path = f"layers.{i}"
            head = (Norm(f"{path}.0"), Act(RELU), Conv(f"{path}.2"))
            if inner:
                last = [norm(4 * growth), nn.ReLU(), conv(4 * growth, growth, 3)]
                self.layers.append(nn.Sequential(norm(c), nn.ReLU(), conv(c, 4 * growth, 1), *last))
                steps.append((*head, Norm(f"{path}.3"), Act(RELU), Conv(f"{path}.5"), Dropout("dropout")))
            else:
                self.layers.append(nn.Sequential(norm(c), nn.ReLU(), conv(c, growth, 3, bias=True)))
                steps.append(head)
        self.dense = Dense(tuple(steps))

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(0)
        if self.fuses:
            return run_dense(self.dense, self, x, **self.options)
        # The buffer is channels_last, and oneDNN rounds differently in each layout: like is compared with like.
        features = [x.contiguous(memory_format=torch.channels_last)]
        for layer in self.layers:
            features.append(replay(self.dropout, layer(torch.cat(features, 1))))
        return torch.cat(features, 1)


def fuse(module: Described | DenseBlock) -> None:
    module.fuses = True


def _split(steps: list[Step]) -> tuple[nn.ModuleList, list[int | Activation]]:
    """The modules, and for every step its module's number or its activation."""
    modules, order = nn.ModuleList(), []
    for step in steps:
        if isinstance(step, (str, Activation)):
            order.append(activation(step))
        else:
            order.append(len(modules))
            modules.append(step)
    return modules, order


def _described(name: str, modules: nn.ModuleList, order: list[int | Activation]) -> tuple:
    kinds = {nn.BatchNorm2d: Norm, nn.Conv2d: Conv, nn.Dropout: Dropout, Depth: DropPath, nn.MaxPool2d: Pool}

    def step(entry: int | Activation) -> DescribedStep:
        if isinstance(entry, Activation):
            return Act(entry)
        module, path = modules[entry], f"{name}.{entry}"
        if isinstance(module, Gate):
            return SqueezeExcite(f"{path}.fc1", f"{path}.fc2", RELU, module.gate)
        return kinds[type(module)](path)

    return tuple(step(entry) for entry in order)


def _called(modules: nn.ModuleList, order: list[int | Activation], x: Tensor) -> Tensor:
    for entry in order:
        if isinstance(entry, Activation):
            x = entry(x)
        elif isinstance(modules[entry], nn.Dropout):
            x = replay(modules[entry], x)
        else:
            x = modules[entry](x)
    return x


def replay(dropout: nn.Dropout, x: Tensor) -> Tensor:
    """``dropout(x)`` with the mask that a fused block draws."""
    if not (dropout.training and dropout.p):
        return x
    return x * keep_scale(x.shape, dropout.p, draw_seed(), x.dtype, x.device)


def norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


def conv(c: int, k: int, size: int, stride: int = 1, bias: bool = False, **options) -> nn.Conv2d:
    options.setdefault("padding", size // 2)
    return nn.Conv2d(c, k, size, stride, bias=bias, **options)


def norm(channels: int, **options) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, **options)
    with torch.no_grad():
        for t, low, high in (
            (norm.weight, 0.5, 1.5),
            (norm.bias, -0.5, 0.5),
            (norm.running_mean, -0.3, 0.3),
            (norm.running_var, 0.5, 1.5),
        ):
            if t is not None:
                t.uniform_(low, high)
    return norm


def basic(c: int = 24, k: int | None = None, stride: int = 1, bias: bool = True, **options) -> Described:
    """Two 3x3 convolutions; keyword arguments that start with ``norm_`` go to the norms, others to the convolutions."""
    k = k or c
    of_norm = {name[5:]: options.pop(name) for name in list(options) if name.startswith("norm_")}
    branch = [
        conv(c, k, 3, stride, bias, **options),
        norm(k, **of_norm),
        "relu",
        conv(k, k, 3, 1, bias, **options),
        norm(k, **of_norm),
    ]
    projection = [conv(c, k, 1, stride, bias), norm(k, **of_norm)] if (k, stride) != (c, 1) else []
    return Described(branch, projection)


def bottleneck(c: int = 32, k: int | None = None, stride: int = 1, **options) -> Described:
    """1x1, 3x3 and 1x1, without biases, as torchvision writes it."""
    k = k or c
    branch = [
        conv(c, 16, 1),
        norm(16),
        "relu",
        conv(16, 16, 3, stride),
        norm(16),
        "relu",
        conv(16, k, 1),
        norm(k),
    ]
    projection = [conv(c, k, 1, stride), norm(k)] if (k, stride) != (c, 1) else []
    return Described(branch, projection, in_place=True, **options)


BLOCKS: dict[str, Callable[[], Described]] = {
    "basic": basic,
    "basic, projection": lambda: basic(24, 32, 2),
    "bottleneck": bottleneck,
    "bottleneck, projection": lambda: bottleneck(24, 48, 2),
    "plain shortcut": lambda: Described([conv(24, 32, 3, bias=True), norm(32)], [conv(24, 32, 1, bias=True)]),
    "chain": lambda: Described([conv(24, 32, 3, 2), norm(32), "relu", conv(32, 24, 1, bias=True), norm(24), "silu"]),
    "pre-activation": lambda: Described(
        [norm(24), "relu", conv(24, 24, 3, bias=True), norm(24), "relu", conv(24, 24, 3, bias=True)], [], "identity"
    ),
    "no norm": lambda: Described([conv(24, 24, 3, bias=True), "relu", conv(24, 24, 3, bias=True)], []),
    "pre-activation, projection": lambda: Described(
        [norm(24), "relu", conv(24, 32, 3, 2), norm(32), "relu", conv(32, 32, 3)], [conv(24, 32, 1, 2)], "identity"
    ),
    "pre-activation, shared": lambda: Described(
        [norm(24), "relu", conv(24, 16, 1, bias=True), norm(16), "relu", conv(16, 32, 3, 2)],
        [conv(24, 32, 1, 2, bias=True)],
        "identity",
        residual="pending",
    ),
    "pre-activation, shared identity": lambda: Described(
        [norm(24), "relu", conv(24, 24, 3, bias=True)], [], "identity", residual="pending"
    ),
    "dropout": lambda: Described(
        [norm(24), "relu", conv(24, 24, 3), norm(24), "relu", nn.Dropout(0.3), conv(24, 24, 3)], [], "identity"
    ),
    "squeeze-excitation": lambda: Described(
        [conv(24, 24, 3), norm(24), "relu", conv(24, 24, 3), norm(24), Gate(24, 6)], []
    ),
    "squeeze-excitation, projection": lambda: Described(
        [conv(24, 32, 3, 2), norm(32), Gate(32, 8, linear=True, bias=False)], [conv(24, 32, 1, 2), norm(32)]
    ),
    "squeeze-excitation, no norm": lambda: Described([conv(24, 24, 3, bias=True), Gate(24, 6)], []),
    "squeeze-excitation chain": lambda: Described([conv(24, 24, 3), norm(24), Gate(24, 6), "silu", conv(24, 16, 1)]),
    "inverted residual": lambda: Described(
        [
            *[conv(24, 48, 1), norm(48), "silu", conv(48, 48, 3, groups=48), norm(48), "silu", Gate(48, 6)],
            *[conv(48, 24, 1), norm(24), Depth(0.4)],
        ],
        [],
        "identity",
    ),
    "squeeze-excitation behind an activation": lambda: Described(
        [conv(24, 32, 3, 2), norm(32), "relu", Gate(32, 8)], [conv(24, 32, 1, 2), norm(32)]
    ),
    "squeeze-excitation of the input": lambda: Described([norm(24), "relu", Gate(24, 6), conv(24, 24, 3)], []),
    "stochastic depth": lambda: Described([conv(24, 24, 3), norm(24), Depth(0.4)], []),
    "stem": lambda: Described([conv(24, 32, 3, 2), norm(32), "relu", nn.MaxPool2d(3, 2, 1)]),
    "stem, deep": lambda: Described(
        [
            conv(24, 16, 3),
            norm(16),
            "silu",
            conv(16, 32, 1, bias=True),
            norm(32),
            "gelu",
            nn.MaxPool2d(2, ceil_mode=True),
        ]
    ),
    "stem, no norm": lambda: Described([conv(24, 32, 3, bias=True), "relu", nn.MaxPool2d(3, 2)]),
    "stem, pool alone": lambda: Described([conv(24, 32, 3, bias=True), nn.MaxPool2d((3, 2), (2, 1), (1, 0))]),
    "stem, squeeze-excitation": lambda: Described(
        [conv(24, 32, 3), norm(32), Gate(32, 8), "relu", nn.MaxPool2d(3, 2, 1)]
    ),
    "stochastic depth, squeeze-excitation": lambda: Described([conv(24, 24, 3), norm(24), Gate(24, 6), Depth(0.4)], []),
}
"""One of each kind, all with 24 input channels, but for ``bottleneck`` with 32."""
