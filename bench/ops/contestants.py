"""An op's contestants, called on the same operands: stock PyTorch, what torch.compile makes of it, the op's reference
and its compiled kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fusedres import select
from fusedres.benchmarking.memory import peak_allocated
from fusedres.benchmarking.peers import COMPILE
from fusedres.benchmarking.race import Entrant
from fusedres.benchmarking.results import Measurement
from fusedres.benchmarking.rotation import copies, rotating
from fusedres.ops.registry import Op
from fusedres.testing import assert_within_budget

__all__ = ["BACKENDS", "COMPILED", "Contest", "affine_rows", "backward_of", "check", "group_of", "nbytes"]

BACKENDS = ("reference", "cpu")
COMPILED = COMPILE.name

Call = Callable[[], Any]


def group_of(
    op: str, dtype: torch.dtype, shape: Sequence[int], variant: str = "", layout: str = "channels_last"
) -> Measurement:
    """A group: an op on a shape, in a variant."""
    name = str(dtype).removeprefix("torch.")
    return Measurement("op", op, "call", name, tuple(shape), "", variant=variant, layout=layout)


@dataclass
class Contest:
    """Contestants of one op on one set of operands.

    Attributes:
        group: what they share.
        operands: anything with tensors in it; calls rotate through copies of it, past the last-level cache.
        calls: by contestant, what makes a call from the operands; ``eager`` is the measure where there is one.
        checks: by contestant, what raises AssertionError where its results are wrong.
        moved: bytes that a single pass over operands and results moves.
        flops: of matrix products.
        absent: by contestant, why it cannot run, besides what its backend says.
    """

    group: Measurement
    operands: Any
    calls: Mapping[str, Callable[[Any], Call]]
    checks: Mapping[str, Callable[[], Any]]
    moved: int = 0
    flops: int = 0
    absent: Mapping[str, str | None] | None = None
    memory: bool = True

    def with_compiled(self, make: Callable[[Any], Call] | None = None) -> Contest:
        """With what torch.compile makes of stock PyTorch's composition, checked as the backends are.

        Args:
            make: makes its call, where that is more than stock's call compiled.
        """
        eager = self.calls["eager"]

        def of_eager(operands: Any) -> Call:
            return torch.compile(eager(operands))

        def holds() -> None:
            wide = tree_map(_wide, self.operands)
            calls = (make or of_eager)(self.operands), eager(self.operands), eager(wide)
            found = ([t for t in tree_leaves(call()) if t is not None] for call in calls)
            for i, results in enumerate(zip(*found, strict=True)):
                assert_within_budget(*results, name=f"{COMPILED}, result {i}")

        calls, checks = {**self.calls, COMPILED: make or of_eager}, {**self.checks, COMPILED: holds}
        return replace(self, calls=calls, checks=checks)

    def entrants(self) -> list[Entrant]:
        torch.compiler.reset()  # else the eighth group of an op would run as eager
        size = nbytes(*tree_leaves(self.operands))
        # Calls that have operands of their own, such as a graph's, are made once.
        count = copies(size) if size else 1
        sets = [self.operands, *(tree_map(_copy, self.operands) for _ in range(count - 1))]
        return [self._entrant(name, make, sets) for name, make in self.calls.items()]

    def _entrant(self, name: str, make: Callable[[Any], Call], sets: Sequence[Any]) -> Entrant:
        about = replace(self.group, contestant=name, baseline=name == "eager")
        about = replace(about, moved=self.moved or None, flops=self.flops or None, images=self._images())
        if reason := self._missing(name):
            return Entrant(replace(about, missing=reason))
        calls = [make(operands) for operands in sets]
        if self.memory:
            about = replace(about, peak=peak_allocated(calls[0]))
        check = self.checks.get(name)
        return Entrant(about, rotating(calls), None if check is None else partial(_verdict, check))

    def _images(self) -> int | None:
        """In a call; nothing where the operands are no images, or the call's own, as are a graph's of many calls."""
        has_operands = any(isinstance(t, Tensor) for t in tree_leaves(self.operands))
        return self.group.shape[0] if has_operands and len(self.group.shape) >= 4 else None

    def _missing(self, name: str) -> str | None:
        if self.absent is not None and (reason := self.absent.get(name)):
            return reason
        return select.why_not(name, "cpu", getattr(torch, self.group.dtype)) if name in BACKENDS else None


def backward_of(forward: Callable[..., Tensor], grad: Tensor, *inputs: Tensor, compiles: bool = False) -> Call:
    """Autograd's backward of ``forward``, without the forward, which runs once here; ``compiles`` compiles both."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    # A compiled backward that runs again and again may not write into what it was given.
    with torch._functorch.config.patch(donated_buffer=False):
        out = torch.compile(forward)(*leaves) if compiles else forward(*leaves)
        torch.autograd.grad(out, leaves, grad, retain_graph=True)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def _verdict(check: Callable[[], Any]) -> str:
    try:
        check()
    except AssertionError as error:
        return f"RED: {error}"
    return "ok"


def check(op: Op, backend: str, arguments: Sequence[Any]) -> None:
    """Holds a backend's results to the error budget: the reference's own error in this dtype, twice.

    Raises:
        AssertionError: where a result is over its budget.
    """
    ours, plain = (_results(op, name, arguments) for name in (backend, "reference"))
    exact = _results(op, "reference", [_wide(argument) for argument in arguments])
    for i, results in enumerate(zip(ours, plain, exact, strict=True)):
        assert_within_budget(*results, name=f"{op.name} on {backend}, result {i}")


def _results(op: Op, backend: str, arguments: Sequence[Any]) -> list[Tensor]:
    """What the op returns, then what it writes to."""
    fresh = [_copy(argument) for argument in arguments]
    overload = op.overload(backend)
    returned = overload(*fresh)
    written = [
        value
        for value, argument in zip(fresh, overload._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write and value is not None
    ]
    returned = [returned] if isinstance(returned, Tensor) else list(returned or ())
    return [*returned, *written]


def _copy(argument: Any) -> Any:
    """A tensor in the same strides, so that a slice is still one."""
    if isinstance(argument, list):
        return [_copy(each) for each in argument]
    if not isinstance(argument, Tensor):
        return argument
    extent = 1 + sum((n - 1) * s for n, s in zip(argument.shape, argument.stride()))
    room = torch.zeros(extent, dtype=argument.dtype, device=argument.device)
    return room.as_strided(argument.shape, argument.stride()).copy_(argument)


def _wide(argument: Any) -> Any:
    if isinstance(argument, list):
        return [_wide(each) for each in argument]
    return argument.double() if isinstance(argument, Tensor) and argument.is_floating_point() else argument


def nbytes(*tensors: Any) -> int:
    """What a single pass over these tensors moves."""
    return sum(t.nbytes for t in tensors if isinstance(t, Tensor))


def affine_rows(channels: int, seed: int = 0) -> Tensor:
    """The ``[4, C]`` rows of a norm: mean, rstd, scale and shift."""
    return torch.randn(4, channels, generator=torch.Generator().manual_seed(seed)).abs() + 0.1
