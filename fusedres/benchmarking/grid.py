"""Every convolution block on a grid of shapes, down to the smallest: nowhere may fusing cost time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..models.densenet import DenseStage
from ..models.preresnet import PreActBottleneck
from ..models.resnet import BasicBlock, Bottleneck
from ..models.wrn import WideBlock
from ..patch import patch
from ..testing import Comparison, channels_last, compare
from .agreement import verdict
from .shapes import BLOCK_INPUTS as SHAPES
from .timing import Timing, interleave, speedup

__all__ = [
    "BLOCKS",
    "NOT_SLOWER",
    "SHAPES",
    "Case",
    "Cell",
    "ConvNormAct",
    "cases",
    "compared",
    "contestants",
    "measure",
]


class ConvNormAct(nn.Module):
    """``relu(bn(conv3x3(x)))``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


def _bottleneck(channels: int, groups: int = 1, base_width: int = 64, reduction: int = 0) -> Bottleneck:
    return Bottleneck(channels, channels // Bottleneck.expansion, 1, None, groups, base_width, reduction)


BLOCKS: dict[str, Callable[[int], nn.Module]] = {
    "conv-bn-relu": ConvNormAct,
    "basic": lambda channels: BasicBlock(channels, channels, 1, None, 1, 64),
    "bottleneck": _bottleneck,
    "grouped bottleneck": lambda channels: _bottleneck(channels, groups=4, base_width=16),
    "bottleneck with squeeze-excitation": lambda channels: _bottleneck(channels, reduction=4),
    "pre-activation bottleneck": lambda channels: PreActBottleneck(channels, channels),
    "wide": lambda channels: WideBlock(channels, channels, 1, 0.0),
    "dense": lambda channels: DenseStage(2, channels, channels // 4, 4, 0.0),
}

NOT_SLOWER = 0.97
"""The ratio over eager below which a block counts as slower."""


@dataclass(frozen=True)
class Case:
    """A block, the shape of its input, what is timed, and the dtype of autocast, if any."""

    block: str
    shape: tuple[int, int, int, int]
    training: bool
    autocast: torch.dtype | None = None

    @property
    def group(self) -> str:
        """The case without its shape."""
        mode = "train" if self.training else "inference"
        return f"{self.block} {mode} {'fp32' if self.autocast is None else 'bf16'}"

    def __str__(self) -> str:
        return f"{self.group} {'x'.join(map(str, self.shape))}"


@dataclass(frozen=True)
class Cell:
    """A case, measured. Without agreement there are no times."""

    case: Case
    check: str
    times: dict[str, Timing]

    @property
    def ratio(self) -> float | None:
        """How many times faster than eager."""
        return speedup(self.times["eager"], self.times["fusedres"]) if self.times else None

    def to_dict(self) -> dict[str, Any]:
        times = {name: timing.to_dict() for name, timing in self.times.items()}
        return {"case": str(self.case), "ratio": self.ratio, "check": self.check, "seconds": times}


def cases(dtypes: Iterable[torch.dtype | None] = (None,), blocks: Iterable[str] = tuple(BLOCKS)) -> Iterator[Case]:
    """Every one of these blocks on every shape, in training and inference."""
    blocks = tuple(blocks)
    for dtype in dtypes:
        for training in (True, False):
            for block in blocks:
                for shape in SHAPES:
                    yield Case(block, shape, training, dtype)


def compared(case: Case, backend: str = "auto") -> Comparison:
    """The errors of the fused block against float64."""
    return compare(
        _stock(case),
        partial(patch, backend=backend),
        lambda seed: [channels_last(case.shape, seed=seed)],
        autocast=case.autocast,
        backward=case.training,
    )


def contestants(case: Case, backend: str = "auto") -> dict[str, Callable[[], None]]:
    """What is timed: one step of the stock block and one of the fused block."""
    stock = _stock(case)
    ours = copy.deepcopy(stock)
    patch(ours, backend=backend)
    x = channels_last(case.shape)
    with torch.no_grad():
        grad = channels_last(copy.deepcopy(stock)(x).shape, seed=1)
    step = partial(_train_step if case.training else _inference_step, case, x=x, grad=grad)
    return {"eager": partial(step, stock), "fusedres": partial(step, ours)}


def measure(case: Case, turns: int = 9) -> Cell:
    """Checks a case, then times it. What looks too slow is measured once more, three times as long."""
    check = verdict(compared(case))
    if check != "ok":
        return Cell(case, check, {})
    calls = contestants(case)
    cell = Cell(case, check, interleave(calls, turns=turns, warmup=3, sample_seconds=2e-3))
    if cell.ratio < NOT_SLOWER:
        cell = Cell(case, check, interleave(calls, turns=3 * turns, warmup=1, sample_seconds=4e-3))
    return cell


def _stock(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return BLOCKS[case.block](case.shape[1]).to(memory_format=torch.channels_last).train(case.training)


def _train_step(case: Case, module: nn.Module, x: Tensor, grad: Tensor) -> None:
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, case.autocast, enabled=case.autocast is not None):
        out = module(x)
    out.backward(grad.to(out.dtype))
    module.zero_grad()


def _inference_step(case: Case, module: nn.Module, x: Tensor, grad: Tensor) -> None:
    with torch.no_grad(), torch.autocast(x.device.type, case.autocast, enabled=case.autocast is not None):
        module(x)
