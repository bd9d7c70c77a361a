"""Programs in the graphs that compilers make.

A graph takes numbers, words and tuples of them for constants, and that is what a program becomes. In training a
compiler then sees every op of the engine. In inference it would fold and pack the weights in every call, so there a
block is one op, with the program written out as its first argument; what is folded is kept for as long as the first of
the weights lives.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..ops.activations import Activation
from ..ops.conv import ConvGeometry
from ..ops.registry import define
from .dense import DenseProgram, infer_dense
from .inference import infer
from .pending import compute_dtype
from .program import ConvSlot, ExciteSlot, GainSlot, Link, NormSlot, Operands, Program
from .stock import execute_stock, stock_dense

__all__ = ["as_constants", "from_constants", "infer_in_graph"]


# ---------------------------------------------------------------------------------------------------------------------
# Programs as constants
# ---------------------------------------------------------------------------------------------------------------------

_KINDS: dict[str, Any] = {"Activation": Activation.from_spelled} | {
    kind.__name__: kind
    for kind in (ConvGeometry, ConvSlot, DenseProgram, ExciteSlot, GainSlot, Link, NormSlot, Program)
}


def as_constants(value: Any) -> Any:
    """A program, or a part of one, as nested tuples that begin with the name of their kind. Compilers follow this."""
    if isinstance(value, Activation):
        return "Activation", value.spelled
    if not isinstance(value, tuple):
        return value
    return (type(value).__name__, *[as_constants(item) for item in value])


def from_constants(value: Any) -> Any:
    """What :func:`as_constants` was given."""
    if not isinstance(value, (tuple, list)):
        return value
    kind, *items = value
    made = tuple(from_constants(item) for item in items)
    return made if kind == "tuple" else _KINDS[kind](*made)


@cache
def _read(program: str) -> Program | DenseProgram:
    return from_constants(json.loads(program))


# ---------------------------------------------------------------------------------------------------------------------
# Inference
# ---------------------------------------------------------------------------------------------------------------------

_FOLDED: WeakIdKeyDictionary = WeakIdKeyDictionary()


def infer_in_graph(program: Program | DenseProgram, x: Tensor, residual: Tensor | None, tensors: Operands) -> Tensor:
    """A block with constant norms as one op."""
    text = json.dumps(as_constants(program))
    return torch.ops.fusedres.infer_block(text, x, residual, list(tensors), compute_dtype(x))


def _infer(program: str, x: Tensor, residual: Tensor | None, tensors: Operands, dtype: torch.dtype) -> Tensor:
    found, folded = _read(program), _folded(program, tensors)
    with torch.no_grad(), torch.autocast(x.device.type, dtype, enabled=dtype != x.dtype):
        if isinstance(found, DenseProgram):
            out = infer_dense(found, x, tensors, folded)
        else:
            out = infer(found, x, residual, tensors, folded)
    return out.contiguous(memory_format=_format_of(x))


def _folded(program: str, tensors: Operands) -> dict[int, Any]:
    """Where the folded weights of these operands are kept."""
    first = next((tensors[link.conv.first] for link in _read(program).links if link.conv is not None), None)
    return {} if first is None else _FOLDED.setdefault(first, {}).setdefault(program, {})


def _fake(program: str, x: Tensor, residual: Tensor | None, tensors: Operands, dtype: torch.dtype) -> Tensor:
    found = _read(program)
    with torch.no_grad(), torch.autocast(x.device.type, dtype, enabled=dtype != x.dtype):
        if isinstance(found, DenseProgram):
            out = stock_dense(found.layers, x, tensors)
        else:
            out = execute_stock(found, x, residual, tensors)
    return torch.empty_like(out, memory_format=_format_of(x))


def _format_of(x: Tensor) -> torch.memory_format:
    """The layout of the result."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


define(
    "infer_block(str program, Tensor x, Tensor? residual, Tensor?[] tensors, ScalarType dtype) -> Tensor",
    _infer,
    _fake,
    tags=[torch.Tag.needs_exact_strides] if hasattr(torch.Tag, "needs_exact_strides") else [],
)
