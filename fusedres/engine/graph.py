"""Inference in a graph that a compiler makes: a block is one op, behind which folded weights stay packed.

In training a compiler sees every op of the engine. In inference it would fold and pack the weights in every call, so
there the block is opaque: the op's one constant names the program, which is kept here, and what is folded is kept for
as long as the first of the weights lives.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .dense import DenseProgram, infer_dense
from .inference import infer
from .pending import compute_dtype
from .program import Operands, Program
from .stock import execute_stock, stock_dense

__all__ = ["infer_in_graph"]

_PROGRAMS: dict[str, Program | DenseProgram] = {}
_FOLDED: WeakIdKeyDictionary = WeakIdKeyDictionary()


def infer_in_graph(program: Program | DenseProgram, x: Tensor, residual: Tensor | None, tensors: Operands) -> Tensor:
    """A block with constant norms as one op."""
    # Compilers keep graphs on disk: in another process the name may not mean another program.
    name = hashlib.sha256(repr(program).encode()).hexdigest()[:32]
    _PROGRAMS[name] = program
    return torch.ops.fusedres.infer_block(name, x, residual, list(tensors), compute_dtype(x))


def _infer(name: str, x: Tensor, residual: Tensor | None, tensors: Operands, dtype: torch.dtype) -> Tensor:
    program = _PROGRAMS[name]
    folded = _folded(name, program, tensors)
    with torch.no_grad(), torch.autocast(x.device.type, dtype, enabled=dtype != x.dtype):
        if isinstance(program, DenseProgram):
            out = infer_dense(program, x, tensors, folded)
        else:
            out = infer(program, x, residual, tensors, folded)
    return out.contiguous(memory_format=_format_of(x))


def _folded(name: str, program: Program | DenseProgram, tensors: Operands) -> dict[int, Any]:
    """Where the folded weights of these operands are kept."""
    first = next((tensors[link.conv.first] for link in program.links if link.conv is not None), None)
    return {} if first is None else _FOLDED.setdefault(first, {}).setdefault(name, {})


def _fake(name: str, x: Tensor, residual: Tensor | None, tensors: Operands, dtype: torch.dtype) -> Tensor:
    program = _PROGRAMS[name]
    with torch.no_grad(), torch.autocast(x.device.type, dtype, enabled=dtype != x.dtype):
        if isinstance(program, DenseProgram):
            out = stock_dense(program.layers, x, tensors)
        else:
            out = execute_stock(program, x, residual, tensors)
    return torch.empty_like(out, memory_format=_format_of(x))


def _format_of(x: Tensor) -> torch.memory_format:
    """The layout of the result."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


_LIBRARY = torch.library.Library("fusedres", "FRAGMENT")
_LIBRARY.define(
    "infer_block(str name, Tensor x, Tensor? residual, Tensor?[] tensors, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.needs_exact_strides,) if hasattr(torch.Tag, "needs_exact_strides") else (),
)
_LIBRARY.impl("infer_block", _infer, "CompositeExplicitAutograd")
torch.library.register_fake("fusedres::infer_block", _fake, lib=_LIBRARY)
