"""An op's contestants: its reference and its compiled kernel, called on the same operands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedres import select
from fusedres.ops.registry import Op
from fusedres.testing import assert_within_budget

__all__ = ["BACKENDS", "affine_rows", "check", "nbytes", "require"]

BACKENDS = ("reference", "cpu")


def require(backend: str, dtype: torch.dtype) -> None:
    """Skips where the backend does not run here, saying why."""
    if (reason := select.why_not(backend, "cpu", dtype)) is not None:
        pytest.skip(reason)


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
