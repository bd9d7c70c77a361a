"""Every convolution block on a grid of shapes, down to the smallest: nowhere may fusing cost time."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..models.densenet import DenseStage
from ..models.preresnet import PreActBottleneck
from ..models.resnet import BasicBlock, Bottleneck
from ..models.wrn import WideBlock
from ..testing import INPUTS
from .agreement import verdict
from .memory import peak_allocated, saved_bytes
from .peers import BASELINE, OURS, Peer
from .race import Entrant, Finish, joined, race
from .referee import Referee
from .results import Measurement
from .rotation import copies
from .shapes import BLOCK_INPUTS as SHAPES
from .timing import Timing, speedup
from .workloads import FORMATS, Workload

if TYPE_CHECKING:
    from ..analysis.traffic import Traffic

__all__ = [
    "BLOCKS",
    "NOT_SLOWER",
    "SHAPES",
    "Case",
    "Cell",
    "ConvNormAct",
    "cases",
    "entrants",
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
    """A block, the shape and the layout of its input, what is timed, and the dtype of autocast, if any."""

    block: str
    shape: tuple[int, int, int, int]
    training: bool
    autocast: torch.dtype | None = None
    layout: str = "channels_last"

    @property
    def group(self) -> str:
        """The case without its shape."""
        mode = "train" if self.training else "inference"
        layout = "" if self.layout == "channels_last" else f" {self.layout}"
        return f"{self.block} {mode} {'fp32' if self.autocast is None else 'bf16'}{layout}"

    def input(self, seed: int) -> Tensor:
        """Normal numbers of its shape in its layout."""
        return INPUTS[self.layout](self.shape, seed=seed)

    @property
    def workload(self) -> Workload:
        """The case as what is done to a network."""
        return Workload(self.group, self.training, self.autocast)

    def __str__(self) -> str:
        return f"{self.group} {'x'.join(map(str, self.shape))}"


@dataclass(frozen=True)
class Cell:
    """A case, measured. Without agreement there are no times."""

    case: Case
    check: str
    times: dict[str, Timing]
    measurements: tuple[Measurement, ...] = ()

    @property
    def ratio(self) -> float | None:
        """How many times faster than eager."""
        return speedup(self.times["eager"], self.times["fusedres"]) if "fusedres" in self.times else None

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


def entrants(
    case: Case,
    peers: Sequence[Peer] = (BASELINE, OURS),
    *,
    device: torch.device | str = "cpu",
    memory: bool = False,
    modelled: Traffic | None = None,
) -> list[Entrant]:
    """A block's contestants, the first of them the baseline, each on copies of the block.

    Args:
        memory: whether bytes saved for backward and bytes allocated are measured.
        modelled: what the model of memory traffic says of the block.
    """
    found = _Course.of(case, device).entrants(peers, memory)
    return [replace(e, about=_with_costs(e.about, peer, modelled)) for e, peer in zip(found, peers)]


def _with_costs(about: Measurement, peer: Peer, modelled: Traffic | None) -> Measurement:
    if modelled is None or peer.schedule is None:
        return about
    cost = modelled.total(peer.schedule)
    return replace(about, moved=cost.nbytes, flops=cost.flops, roofline=cost.seconds)


def measure(case: Case, seconds: float = 0.5, peers: Sequence[Peer] = (BASELINE, OURS)) -> Cell:
    """Checks a case, then times it for about so long. What looks too slow is timed on, three times as long.

    The turns are shared by several sets of copies of the block: where in memory its weights happen to lie decides up to
    a fifth of the time of a small one, for as long as they lie there.
    """
    course = _Course.of(case)
    sets = [course.entrants(peers) for _ in range(_SETS)]
    heats = [_heat(entrants, seconds) for entrants in sets]
    cell = _cell(case, joined(heats))
    if cell.ratio is not None and cell.ratio < NOT_SLOWER:
        cell = _cell(case, joined([*heats, *(_heat(entrants, 3 * seconds) for entrants in sets)]))
    return cell


_SETS = 3
_MOST_TURNS = 60
"""In a heat: a hundred samples say what a thousand say."""


def _heat(entrants: Sequence[Entrant], seconds: float) -> tuple[Finish, ...]:
    """A race that takes a set's share of these seconds; samples are short, for there to be many."""
    return race(entrants, turns=_MOST_TURNS, warmup=2, sample_seconds=2e-3, left=lambda: seconds / _SETS)


def _cell(case: Case, finishes: Sequence[Finish]) -> Cell:
    ours = next(f.measurement for f in finishes if f.measurement.contestant == OURS.name)
    times = {f.measurement.contestant: f.timing for f in finishes if f.timing is not None}
    return Cell(case, ours.check, times if OURS.name in times else {}, tuple(f.measurement for f in finishes))


@dataclass(frozen=True)
class _Course:
    """What the contestants of a case share."""

    case: Case
    stock: nn.Module
    xs: Sequence[Tensor]
    grad: Tensor
    referee: Referee

    @classmethod
    def of(cls, case: Case, device: torch.device | str = "cpu") -> _Course:
        torch.compiler.reset()  # else the eighth block of a class would run as eager
        torch.manual_seed(0)
        stock = BLOCKS[case.block](case.shape[1]).to(memory_format=FORMATS[case.layout])
        stock.train(case.training).to(device)
        xs = [case.input(seed).to(device) for seed in range(copies(4 * math.prod(case.shape), device))]
        with torch.no_grad():
            grad = INPUTS[case.layout](copy.deepcopy(stock)(xs[0]).shape, seed=1).to(device)
        referee = Referee(
            stock,
            lambda seed: case.input(seed).to(device),
            autocast=case.autocast,
            backward=case.training,
            input_gradients=case.training,
        )
        return cls(case, stock, xs, grad, referee)

    def entrants(self, peers: Sequence[Peer], memory: bool = False) -> list[Entrant]:
        """Each on a copy of the block that nobody had before; the first is the baseline."""
        return [self._entrant(peer, place == 0, memory) for place, peer in enumerate(peers)]

    def _entrant(self, peer: Peer, baseline: bool, memory: bool) -> Entrant:
        case, xs = self.case, self.xs
        about = Measurement(
            "block",
            case.block,
            "train step" if case.training else "inference",
            str(case.autocast or torch.float32).removeprefix("torch."),
            case.shape,
            peer.name,
            autocast=case.autocast is not None,
            layout=case.layout,
            baseline=baseline,
            images=case.shape[0],
        )
        if reason := peer.refuses(case.workload, xs[0].device):
            return Entrant(replace(about, missing=reason))
        twin = copy.deepcopy(self.stock)
        start = perf_counter()
        call = peer.prepare(twin, xs[0])
        step = _step(case, twin, call, xs, self.grad)
        step()
        about = replace(about, first_step=perf_counter() - start)
        if memory:
            saved = saved_bytes(twin, lambda: _forward(case, call, xs[0].detach().requires_grad_()))
            about = replace(about, saved=saved if case.training else None, peak=peak_allocated(step, xs[0].device))
        return Entrant(about, step, None if baseline else lambda: verdict(self.referee.judge(twin, call)))


def _step(
    case: Case, model: nn.Module, call: Callable[[Tensor], Tensor], xs: Sequence[Tensor], grad: Tensor
) -> Callable[[], None]:
    inputs = itertools.cycle(xs)

    def train() -> None:
        out = _forward(case, call, next(inputs).detach().requires_grad_())
        out.backward(grad.to(out.dtype))
        model.zero_grad()

    def infer() -> None:
        with torch.no_grad():
            _forward(case, call, next(inputs))

    return train if case.training else infer


def _forward(case: Case, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, case.autocast, enabled=case.autocast is not None):
        return call(x)
