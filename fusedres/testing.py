"""How correctness is measured here, for our tests and for yours: error budgets from float64, and awkward inputs.

The same computation is run three times on the same numbers: ours, stock PyTorch in the same dtype, and stock PyTorch
in float64. **Our error may be at most twice stock PyTorch's**, plus a floor of one rounding; no test has a tolerance of
its own. ::

    from fusedres.testing import channels_last, compare

    report = compare(
        torchvision.models.resnet.BasicBlock(64, 64),
        fuse=fusedres.patch,
        inputs=lambda seed: [channels_last((8, 64, 56, 56), seed=seed)],
    )
    print(report)      # every output, gradient and running statistic: our error, stock's, the budget
    report.check()     # raises where one is over its budget

Two things follow from the kinks of ReLU. Where a value is within rounding of zero, one implementation passes a
gradient and another does not, both rightly; float64 takes the side of either. Such a flip decides the maximum of a
tensor, so errors are root mean squares: a wrong element, channel or edge moves those as well. And in float32, where
flips are so rare that stock often has none at all, a single one exceeds any multiple of stock's error; so a module that
is over a budget is drawn twice more, and only what is over it in the median of the three draws counts. A gradient of
two values may still be over by luck alone, where stock's roundings cancel; the median of 31 draws decides. What is
wrong is wrong each time.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "DRAWS",
    "FACTOR",
    "INPUTS",
    "Comparison",
    "Entry",
    "assert_within_budget",
    "budget",
    "channels_last",
    "compare",
    "compare_results",
    "contiguous",
    "expanded",
    "rms",
    "run_and_collect",
    "sliced",
    "transposed",
]

FACTOR = 2.0
"""Our error over stock PyTorch's, at most."""

FLOOR = 0.5
"""What is always allowed, in units of the dtype's epsilon times the reference's root mean square: one rounding. Where
stock's error happens to be zero, twice that would leave nothing."""


# ---------------------------------------------------------------------------------------------------------------------
# Budgets
# ---------------------------------------------------------------------------------------------------------------------


def rms(x: Tensor) -> float:
    """The root mean square of a tensor, in float64; 0 for an empty one."""
    return float(x.double().square().mean().sqrt()) if x.numel() else 0.0


def budget(stock: Tensor, reference: Tensor, scale: float | None = None) -> float:
    """The error that is allowed: twice stock's, plus the floor, which is relative to ``scale``."""
    floor = FLOOR * torch.finfo(stock.dtype).eps * (rms(reference) if scale is None else scale)
    return FACTOR * rms(stock.double() - reference.double()) + floor


def assert_within_budget(
    ours: Tensor, stock: Tensor, reference: Tensor, name: str = "tensor", *, scale: float | None = None
) -> None:
    """Checks one tensor against its budget.

    Args:
        ours: the result to judge.
        stock: stock PyTorch's result on the same numbers, of the same shape and dtype.
        reference: the float64 result on the same numbers.
        name: for the message.
        scale: what one rounding is relative to, by default the reference's root mean square; for a sum of numbers
            that cancel, theirs.

    Raises:
        AssertionError: where the shape or the dtype differ from stock's, or the error exceeds the budget. A NaN or an
            infinity in any of the three exceeds it.
    """
    _entry(name, ours, stock, reference, scale).check()


@dataclass(frozen=True)
class Entry:
    """One tensor of a :class:`Comparison`; errors are absolute root mean squares.

    Attributes:
        scale: the root mean square of the reference.
        problem: why the tensors cannot be compared at all, or nothing.
    """

    name: str
    ours: float
    stock: float
    budget: float
    scale: float
    problem: str = ""

    @property
    def ok(self) -> bool:
        return not self.problem and self.ours <= self.budget

    def excess(self) -> float:
        """Our error over the budget."""
        if self.ok:
            return self.ours / self.budget if self.budget else 0.0
        return math.inf if self.problem or not self.ours < math.inf else self.ours / max(self.budget, 1e-300)

    def check(self) -> None:
        assert self.ok, str(self)

    def __str__(self) -> str:
        if self.problem:
            return f"{self.name}: {self.problem}"
        return (
            f"{self.name}: error {self.ours:.3e}, stock PyTorch's {self.stock:.3e}, budget {self.budget:.3e}, "
            f"reference {self.scale:.3e}{'' if self.ok else '  <-- over budget'}"
        )


def _entry(
    name: str, ours: Tensor | None, stock: Tensor | None, reference: Tensor | None, scale: float | None = None
) -> Entry:
    if ours is None or stock is None or reference is None:
        missing = [which for which, t in (("ours", ours), ("stock", stock), ("reference", reference)) if t is None]
        return Entry(name, 0.0, 0.0, 0.0, 0.0, "" if len(missing) == 3 else f"is missing in {', '.join(missing)}")
    if ours.shape != stock.shape or ours.dtype != stock.dtype:
        sides = f"{tuple(ours.shape)} {ours.dtype} against stock's {tuple(stock.shape)} {stock.dtype}"
        return Entry(name, 0.0, 0.0, 0.0, 0.0, sides)
    if not stock.dtype.is_floating_point:
        return Entry(name, 0.0, 0.0, 0.0, 0.0, "" if torch.equal(ours, stock) else f"{ours} against stock's {stock}")
    error, stock_error = rms(ours.double() - reference.double()), rms(stock.double() - reference.double())
    return Entry(name, error, stock_error, budget(stock, reference, scale), rms(reference))


# ---------------------------------------------------------------------------------------------------------------------
# Modules
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found: one :class:`Entry` per output, gradient and buffer. Printing it gives a list."""

    entries: tuple[Entry, ...]

    @classmethod
    def of(
        cls, ours: dict[str, Tensor | None], stock: dict[str, Tensor | None], exact: dict[str, Tensor | None]
    ) -> Comparison:
        """From three results of :func:`run_and_collect` on the same numbers."""
        assert ours.keys() == stock.keys(), f"{sorted(ours)} against stock's {sorted(stock)}"
        return cls(tuple(_entry(name, ours[name], stock[name], exact[name]) for name in stock))

    @classmethod
    def median(cls, draws: Sequence[Comparison]) -> Comparison:
        """Each tensor in the draw where its error over its budget is the median."""
        by_name = zip(*(draw.entries for draw in draws))
        return cls(tuple(sorted(entries, key=Entry.excess)[len(draws) // 2] for entries in by_name))

    @property
    def ok(self) -> bool:
        return all(entry.ok for entry in self.entries)

    def check(self) -> None:
        """Raises AssertionError, with the whole list, where a tensor is over its budget."""
        assert self.ok, str(self)

    def __str__(self) -> str:
        return "\n".join(str(entry) for entry in self.entries)


Results = dict[str, Tensor | None]

DRAWS = (3, 31)
"""How many draws decide where the first is over a budget, and how many where their median is, too."""


def compare(
    stock: nn.Module,
    fuse: Callable[[nn.Module], Any],
    inputs: Callable[[int], Sequence[Tensor]],
    *,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    cotangent: Callable[[Tensor], Tensor] | None = None,
    backward: bool = True,
    input_gradients: bool = True,
) -> Comparison:
    """Runs a stock module and its fused form against the stock module in float64.

    Compared are the output, the gradients of every input and parameter that requires one, and every buffer. All three
    start from the same numbers: parameters and inputs are rounded to ``dtype`` first.

    Args:
        stock: the module, in the training or evaluation mode that is wanted; it is copied, not touched.
        fuse: makes the fused form from a copy of ``stock``; may return it, or change it in place and return something
            else (as ``fusedres.patch`` does).
        inputs: from a seed, the tensors that the module is called with.
        dtype: of parameters and inputs.
        autocast: run ours and stock under autocast to this dtype.
        cotangent: makes the gradient that enters backward from the output, for gradients with strides of their own; by
            default, random numbers in the output's layout.
        backward: whether to run it; without it everything runs under ``torch.no_grad()``.
        input_gradients: whether the inputs ask for their gradients.
    """

    def draw(seed: int) -> tuple[Results, Results, Results]:
        rounded = [x.detach().to(dtype) if x.is_floating_point() else x for x in inputs(seed)]
        for x in rounded:
            x.requires_grad_(input_gradients and backward and x.is_floating_point())
        return _draw(copy.deepcopy(stock).to(dtype), fuse, rounded, autocast, cotangent, backward)

    return compare_results(draw)


def compare_results(
    draw: Callable[[int], tuple[Results, Results, Results]], counts: Sequence[int] = DRAWS
) -> Comparison:
    """Judges tensors by name against their budgets, for runs that :func:`compare` does not cover.

    Args:
        draw: from a seed, what ours, stock PyTorch and stock PyTorch in float64 have made of the same numbers.
        counts: as :data:`DRAWS`.

    Raises:
        AssertionError: where ours and stock PyTorch's names differ.
    """
    drawn = [judged := Comparison.of(*draw(0))]
    for count in counts:
        if judged.ok:
            break
        drawn += [Comparison.of(*draw(seed)) for seed in range(len(drawn), count)]
        judged = Comparison.median(drawn)
    return judged


def _draw(
    plain: nn.Module,
    fuse: Callable[[nn.Module], Any],
    inputs: Sequence[Tensor],
    autocast: torch.dtype | None,
    cotangent: Callable[[Tensor], Tensor] | None,
    backward: bool,
) -> tuple[Results, Results, Results]:
    exact_module = copy.deepcopy(plain).double()
    fused = copy.deepcopy(plain)
    made = fuse(fused)
    fused = made if isinstance(made, nn.Module) else fused
    with torch.autocast(inputs[0].device.type, autocast) if autocast else nullcontext():
        expected = run_and_collect(plain, inputs, cotangent, backward)
        ours = run_and_collect(fused, inputs, cotangent, backward)
    exact_inputs = [_widened(x).detach().requires_grad_(x.requires_grad) for x in inputs]
    exact = run_and_collect(exact_module, exact_inputs, cotangent, backward, like=expected["output"])
    return ours, expected, exact


def _widened(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def run_and_collect(
    module: nn.Module,
    inputs: Sequence[Tensor],
    cotangent: Callable[[Tensor], Tensor] | None = None,
    backward: bool = True,
    like: Tensor | None = None,
) -> Results:
    """One forward and backward: the output, all gradients and buffers, by name.

    Args:
        inputs: those that require a gradient get one, in copies that share their memory.
        like: the output from whose dtype the gradient takes its precision, so that several dtypes get the same numbers.
    """
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
    with nullcontext() if backward else torch.no_grad():
        out = module(*leaves)
    found: Results = {"output": out.detach()}
    if backward:
        with torch.autocast(out.device.type, enabled=False):
            out.backward(_cotangent(out, out if like is None else like, cotangent))
        found |= {f"grad of input {i}": leaf.grad for i, leaf in enumerate(leaves)}
        found |= {f"grad of {name}": p.grad for name, p in module.named_parameters()}
    return found | {name: buffer.clone() for name, buffer in module.named_buffers()}


def _cotangent(out: Tensor, like: Tensor, make: Callable[[Tensor], Tensor] | None) -> Tensor:
    if make is not None:
        return make(out.detach())
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(out.shape, generator=generator).to(like.dtype).to(out.device, out.dtype)
    return torch.empty_like(out).copy_(values)


# ---------------------------------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------------------------------


Shape = tuple[int, int, int, int]


def _values(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)).to(dtype)


def contiguous(shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers ``[N, C, H, W]``, contiguous. All of these functions give the same numbers for the same seed."""
    return _values(shape, dtype, seed)


def channels_last(shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers, channels_last."""
    return _values(shape, dtype, seed).contiguous(memory_format=torch.channels_last)


def sliced(shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers in the middle of a larger channels_last tensor of NaN, as a slice behind a concatenation is."""
    n, c, h, w = shape
    outer = torch.full((n, c + 5, h, w), float("nan"), dtype=dtype).contiguous(memory_format=torch.channels_last)
    inner = outer[:, 2 : 2 + c]
    return inner.copy_(_values(shape, dtype, seed))


def transposed(shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers whose width and height are swapped in memory: dense, and neither layout."""
    return _values(shape, dtype, seed).transpose(2, 3).contiguous().transpose(2, 3)


def expanded(shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """One number per channel and row, with strides of zero elsewhere, as a gradient behind a sum or a mean has them."""
    return _values((1, shape[1], shape[2], 1), dtype, seed).expand(shape)


INPUTS: dict[str, Callable[..., Tensor]] = {
    "contiguous": contiguous,
    "channels_last": channels_last,
    "sliced": sliced,
    "transposed": transposed,
    "expanded": expanded,
}
"""The factories by name; each takes ``(shape, dtype, seed)``."""
