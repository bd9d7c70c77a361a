"""Which of the ways a block is executed."""

from __future__ import annotations

from functools import lru_cache, reduce
from typing import Any

import torch
from torch import Tensor

from ..ops.conv import output_size
from ..select import backend_for, by_measurement, too_small
from .dense import DenseFunction, DenseProgram, infer_dense
from .graph import infer_in_graph
from .inference import infer
from .pending import compute_dtype
from .program import Link, Operands, Program, is_constant, is_synchronised, needs_gradient, promoting_norm
from .stock import execute_stock, stock_dense
from .training import BlockFunction
from .verdict import winner


def execute(
    program: Program, x: Tensor, residual: Tensor | None, tensors: Operands, folded: dict[int, Any] | None = None
) -> Tensor:
    """Runs a block.

    Args:
        x: the input, ``[N, C, H, W]``.
        residual: what the shortcut reads where that is not ``x``.
        tensors: the operands of the program's slots.
        folded: where folded and packed weights are kept between inference calls; only of a constant block.
    """
    if torch.is_autocast_enabled(x.device.type) and (norm := promoting_norm(program)) is not None:
        dtype = reduce(torch.promote_types, [t.dtype for t in tensors[norm.first : norm.first + 4]], compute_dtype(x))
        if dtype != compute_dtype(x):
            return _promoted(program, x, residual, tensors, folded, dtype)
    return _execute(program, x, residual, tensors, folded)


def _promoted(
    program: Program,
    x: Tensor,
    residual: Tensor | None,
    tensors: Operands,
    folded: dict[int, Any] | None,
    dtype: torch.dtype,
) -> Tensor:
    """A block whose last norm has a result of another ``dtype``: convolutions cast what they read, joins promote."""
    x, residual = x.to(dtype), None if residual is None else residual.to(dtype)
    return _execute(program._replace(in_place=False), x, residual, tensors, folded).to(dtype)


def _execute(
    program: Program, x: Tensor, residual: Tensor | None, tensors: Operands, folded: dict[int, Any] | None
) -> Tensor:
    # Who has kept folded weights has asked.
    inference = (folded is not None or program.constant) and not needs_gradient((x, residual, *tensors))
    chosen: Program | None = program
    if is_for_stock(program, x, x.numel(), inference):
        chosen = _measured(program, x, residual, tensors, inference)
    if chosen is None or _broadcasts(program, x, residual, tensors):
        return execute_stock(program, x, residual, tensors)
    program = chosen
    if inference and folded is None and torch.compiler.is_compiling():  # a call that keeps them is in no graph
        return infer_in_graph(program, x, residual, tensors)
    if inference:
        return infer(program, x, residual, tensors, {} if folded is None else folded)
    return BlockFunction.apply(program, x, residual, *tensors)


def execute_dense(program: DenseProgram, x: Tensor, tensors: Operands, folded: dict[int, Any] | None = None) -> Tensor:
    """Runs a dense block: ``[N, C, H, W]`` to ``[N, C + growth, H, W]``; arguments as in :func:`execute`."""
    inference = is_constant(program.links) and not needs_gradient((x, *tensors))
    n, channels, h, w = x.shape
    elements = n * program.bounds(channels, tensors)[-1] * h * w
    if len(program.layers) <= 2 and not inference:
        elements = 0  # copies into and out of the buffer cost what the concatenations of two layers do
    if is_for_stock(program, x, elements, inference):
        measured = _measured(program, x, None, tensors, inference)
        if measured is None:
            return stock_dense(program.layers, x, tensors)
        program = measured
    if inference and folded is None and torch.compiler.is_compiling():
        return infer_in_graph(program, x, None, tensors)
    if inference:
        return infer_dense(program, x, tensors, {} if folded is None else folded)
    return DenseFunction.apply(program, x, *tensors)


def is_for_stock(program: Program | DenseProgram, x: Tensor, elements: int, inference: bool) -> bool:
    """Whether PyTorch's own ops run this; ``elements`` says how much there is to gain.

    A graph for many sizes is for the large ones, too, and a comparison would make it one for some.
    """
    if torch.compiler.is_dynamo_compiling() or backend_for(x.device, compute_dtype(x), program.backend) == "stock":
        return True
    mode = "inference" if inference else "training"
    small = not isinstance(elements, torch.SymInt) and too_small(elements, mode, program.backend)
    nothing_to_gain = x.numel() == 0 or (program.memory != "low" and small)
    # Processes that share statistics must all do the same, whatever their parts of the batch.
    return nothing_to_gain and not is_synchronised(program.links)


def _measured(
    program: Program | DenseProgram, x: Tensor, residual: Tensor | None, tensors: Operands, inference: bool
) -> Program | DenseProgram | None:
    """The block on the backend that was measured fastest for this call, where measurements decide; else ``None``."""
    if torch.compiler.is_dynamo_compiling() or x.numel() == 0 or not by_measurement(x.device.type, program.backend):
        return None
    backend = winner(program, x, residual, tensors, not inference)
    return None if backend == "stock" else program._replace(backend=backend)


def _broadcasts(program: Program, x: Tensor, residual: Tensor | None, tensors: Operands) -> bool:
    """Whether the join's two sides differ in shape."""
    if program.shortcut is None:
        return False
    side = x if residual is None else residual
    return _shape(program.branch, x.shape, tensors) != _shape(program.shortcut, side.shape, tensors)


# Asked for every block at every call, of the same few sizes; but a compiler's have no hash.
_output_size = lru_cache(maxsize=4096)(output_size)


def _shape(chain: tuple[Link, ...], shape: tuple[int, ...], tensors: Operands) -> tuple[Any, ...]:
    """The shape of what a chain makes of an input of this one."""
    channels, size = shape[1], shape[2:]
    for link in chain:
        conv = link.conv
        if conv is not None:
            weight = tensors[conv.first].shape
            try:
                size = _output_size(size, weight[2:], conv.geometry)
            except TypeError:
                size = output_size(size, weight[2:], conv.geometry)
            channels = weight[0]
    return shape[0], channels, *size
