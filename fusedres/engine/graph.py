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
from ..ops.join_pool import PoolWindow
from ..ops.layout import dense
from ..ops.registry import define
from ..select import by_measurement, kernels, too_small
from .dense import DenseProgram, infer_dense
from .inference import infer
from .pending import cast_weights, compute_dtype
from .program import ConvSlot, ExciteSlot, GainSlot, Link, NormSlot, Operands, Program, weight_indices
from .stock import execute_stock, stock_dense
from .training import forward_block

__all__ = ["as_constants", "from_constants", "infer_in_graph"]


# ---------------------------------------------------------------------------------------------------------------------
# Programs as constants
# ---------------------------------------------------------------------------------------------------------------------

_KINDS: dict[str, Any] = {"Activation": Activation.from_spelled} | {
    kind.__name__: kind
    for kind in (ConvGeometry, ConvSlot, DenseProgram, ExciteSlot, GainSlot, Link, NormSlot, PoolWindow, Program)
}


def as_constants(value: Any) -> Any:
    """A program, or a part of one, as nested tuples that begin with the name of their kind. Compilers follow this."""
    if isinstance(value, Activation):
        return "Activation", value.spelled
    if not isinstance(value, tuple):
        return value
    return (type(value).__name__, *[as_constants(item) for item in value])


def from_constants(value: Any) -> Any:
    """What :func:`as_constants` was given.

    A number that a compiler took for a variable, as ``eps`` with ``dynamic=True``, is one from here on, by a guard.
    """
    if not isinstance(value, (tuple, list)):
        return float(value) if isinstance(value, torch.SymFloat) else value
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
    found = _read(program)
    casts = any(t is not None and t.dtype != dtype for t in (x, *(tensors[i] for i in weight_indices(found.links))))
    with torch.no_grad(), torch.autocast(x.device.type, dtype, enabled=casts):
        if _is_small(found, x, tensors):
            out = _stock(found, x, residual, tensors)
        elif isinstance(found, DenseProgram):
            out = infer_dense(found, x, tensors, _folded(program, tensors))
        else:
            out = infer(found, x, residual, tensors, _folded(program, tensors))
    return out.contiguous(memory_format=_format_of(x))


def _is_small(program: Program | DenseProgram, x: Tensor, tensors: Operands) -> bool:
    """Whether stock is faster for this input, which a graph for many sizes leaves open."""
    if program.memory == "low" or by_measurement(x.device.type, program.backend):
        return False
    elements = x.numel()
    if isinstance(program, DenseProgram):
        elements = elements // x.shape[1] * program.bounds(x.shape[1], tensors)[-1]
    return too_small(elements, "inference", program.backend)


def _stock(program: Program | DenseProgram, x: Tensor, residual: Tensor | None, tensors: Operands) -> Tensor:
    if isinstance(program, DenseProgram):
        return stock_dense(program.layers, x, tensors)
    return execute_stock(program, x, residual, tensors)


def _folded(program: str, tensors: Operands) -> dict[int, Any]:
    """Where the folded weights of these operands are kept."""
    first = next((tensors[link.conv.first] for link in _read(program).links if link.conv is not None), None)
    return {} if first is None else _FOLDED.setdefault(first, {}).setdefault(program, {})


def _fake(program: str, x: Tensor, residual: Tensor | None, tensors: Operands, dtype: torch.dtype) -> Tensor:
    found = _read(program)
    if isinstance(found, DenseProgram):
        n, channels, *size = x.shape
        shape = n, found.bounds(channels, tensors)[-1], *size
        out = x.new_empty(shape, dtype=torch.promote_types(x.dtype, dtype))
    else:
        # What casts by itself: autocast does nothing below the op.
        operands, k = cast_weights(found.links, tensors, dtype), kernels(x.device.type, dtype, "reference")
        with torch.no_grad():
            out = forward_block(found, dense(x), residual, operands, k)[0]
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
