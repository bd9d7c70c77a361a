"""Dense blocks: every layer reads all channels before it from one buffer and appends its own, without concatenation.

The buffer is channels_last, so that what a layer reads is a slice of its channels. The statistics of a channel are
taken once, in the pass that copies it there, and serve the batch norm of every later layer; gradients are summed in a
second buffer, in the pass that makes them. Autograd keeps the buffer and the layers' inner raw tensors: linear in the
depth, where the concatenations of Huang et al. (2017, "Densely Connected Convolutional Networks", eq. 2) are quadratic.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.layout import dense
from ..select import kernels
from .gradients import Chain, Gradients
from .inference import infer_chain, swallows
from .pending import Raw, applied, cast_weights, compute_dtype, norm_rows, pend, run_chain
from .program import Operands, weight_indices
from .training import refuse_second_derivatives

__all__ = ["DenseFunction", "DenseProgram", "infer_dense"]


class DenseProgram(NamedTuple):
    """A dense block bound to its operands' slots.

    Attributes:
        layers: a chain each, from all channels before it to those that it appends; it begins with a norm.
        memory: ``"low"`` drops what 1x1 convolutions made inside the layers, and recomputes it.
        backend: forced, or ``"auto"``.
    """

    layers: tuple[Chain, ...]
    memory: str = "auto"
    backend: str = "auto"

    @property
    def links(self) -> Chain:
        return tuple(link for layer in self.layers for link in layer)

    def bounds(self, channels: int, tensors: Operands) -> list[int]:
        """Channels that are there before the first layer, before the second, ..., and in the end."""
        grown = [tensors[layer[-2].conv.first].shape[0] for layer in self.layers]
        return list(accumulate(grown, initial=channels))


# ---------------------------------------------------------------------------------------------------------------------
# The buffer
# ---------------------------------------------------------------------------------------------------------------------


class _Buffer:
    """Channels appended so far, and their statistics where a norm wants the batch's."""

    def __init__(self, x: Tensor, channels: int, dtype: torch.dtype, k: SimpleNamespace, measures: bool) -> None:
        n, _, h, w = x.shape
        self.tensor = torch.empty((n, channels, h, w), dtype=dtype, device=x.device, memory_format=torch.channels_last)
        self.stats: Tensor | None = None
        self.filled, self.k, self.measures = 0, k, measures

    def append(self, y: Tensor) -> None:
        start, self.filled = self.filled, self.filled + y.shape[1]
        into = self.tensor[:, start : self.filled]
        if not self.measures:
            into.copy_(y)
            return
        y = y.to(self.tensor.dtype).contiguous(memory_format=torch.channels_last)
        stats = self.k.bn_stats(y, False, into)
        if self.stats is None:
            self.stats = stats.new_empty((2, self.tensor.shape[1]))
        self.stats[:, start : self.filled] = stats

    def read(self) -> tuple[Tensor, Tensor | None]:
        stats = None if self.stats is None else self.stats[:, : self.filled].contiguous()
        return self.tensor[:, : self.filled], stats


def _grow(
    program: DenseProgram,
    x: Tensor,
    tensors: Operands,
    dtype: torch.dtype,
    k: SimpleNamespace,
    run: Callable[[Chain, Tensor, Tensor | None], Tensor],
) -> Tensor:
    """The buffer after all layers; ``run`` makes a layer's channels from those before it and their statistics."""
    dtype = torch.promote_types(x.dtype, dtype)
    measures = any(layer[0].norm.batch_statistics for layer in program.layers)
    buffer = _Buffer(x, program.bounds(x.shape[1], tensors)[-1], dtype, k, measures)
    buffer.append(x)
    for layer in program.layers:
        buffer.append(run(layer, *buffer.read()))
    return buffer.tensor


def _in_layout_of(x: Tensor, buffer: Tensor) -> Tensor:
    """Stock PyTorch's result has the input's layout; without channels_last, that is a copy of the buffer."""
    return buffer if x.is_contiguous(memory_format=torch.channels_last) else buffer.contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# Inference and training
# ---------------------------------------------------------------------------------------------------------------------


def infer_dense(program: DenseProgram, x: Tensor, tensors: Operands, folded: dict[int, Any]) -> Tensor:
    """The dense block with constant norms; ``folded`` as in ``infer``."""
    dtype = compute_dtype(x)
    k = kernels(x.device.type, dtype, program.backend)
    x = dense(x)
    if swallows(k, dtype, x):
        operands = cast_weights(program.links, tensors, dtype)
        return _in_layout_of(x, _forward(program, x, operands, dtype, k)[0])

    def run(layer: Chain, channels: Tensor, stats: Tensor | None) -> Tensor:
        return infer_chain(layer, channels, None, layer[-1].act, dtype, tensors, folded, k)

    return _in_layout_of(x, _grow(program, x, tensors, dtype, k, run))


def _forward(
    program: DenseProgram, x: Tensor, tensors: Operands, dtype: torch.dtype, k: SimpleNamespace
) -> tuple[Tensor, list[list[Raw]]]:
    """The buffer, and every layer's raw tensors."""
    kept = []

    def run(layer: Chain, channels: Tensor, stats: Tensor | None) -> Tensor:
        first, norm = layer[0], layer[0].norm
        rows = norm_rows(norm, channels, tensors, k, stats if norm.batch_statistics else None)
        raws = run_chain(layer, pend(first, channels, tensors, k, rows), None, tensors, k)
        kept.append(raws)
        return applied(layer[-1], raws[-1], k)

    return _grow(program, x, tensors, dtype, k, run), kept


class DenseFunction(torch.autograd.Function):
    """A whole dense block as one node: ``(program, x, *tensors) -> out``."""

    @staticmethod
    def forward(ctx: Any, program: DenseProgram, x: Tensor, *tensors: Tensor | None) -> Tensor:
        dtype = compute_dtype(x)
        k = kernels(x.device.type, dtype, program.backend)
        operands = cast_weights(program.links, tensors, dtype)
        x = dense(x)
        buffer, kept = _forward(program, x, operands, dtype, k)
        if any(ctx.needs_input_grad):
            _save(ctx, program, x, buffer, operands, kept)
            ctx.kernels = k
            ctx.parameter_dtypes = [None if t is None else t.dtype for t in tensors]
        return _in_layout_of(x, buffer)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        refuse_second_derivatives()
        return _DenseBackward(ctx).run(grad)


def _save(ctx: Any, program: DenseProgram, x: Tensor, buffer: Tensor, tensors: Operands, kept: list[list[Raw]]) -> None:
    operands: list[Tensor | None] = [None] * len(tensors)
    for i in weight_indices(program.links):
        operands[i] = tensors[i]
    saved = [buffer, *operands]
    for layer, raws in zip(program.layers, kept):
        for index, raw in enumerate(raws):
            inner = 0 < index < len(raws) - 1  # the first and the last are in the buffer
            dropped = not inner or _recomputes(program, layer, index, tensors)
            saved += (None if dropped else raw.tensor, *raw[1:])
    ctx.program, ctx.operand_count = program, len(tensors)
    ctx.channels, ctx.dtype = x.shape[1], x.dtype
    ctx.save_for_backward(*saved)


def _recomputes(program: DenseProgram, layer: Chain, index: int, tensors: Operands) -> bool:
    """Whether an inner raw tensor is recomputed in backward.

    Where no convolution made it, and, if memory is to be low, where a 1x1 convolution did, which is wide and cheap.
    """
    conv = layer[index - 1].conv
    return conv is None or (program.memory == "low" and tuple(tensors[conv.first].shape[2:]) == (1, 1))


class _DenseBackward(Gradients):
    """One backward pass of a dense block, from its last layer to its first."""

    def __init__(self, ctx: Any) -> None:
        self.program: DenseProgram = ctx.program
        self.channels, self.dtype, self.needs_x = ctx.channels, ctx.dtype, ctx.needs_input_grad[1]
        self.buffer, *saved = ctx.saved_tensors
        self._rest = saved[ctx.operand_count :]
        tensors, needs = saved[: ctx.operand_count], ctx.needs_input_grad[2:]
        super().__init__(ctx.kernels, tensors, needs, ctx.parameter_dtypes)

    def run(self, grad: Tensor) -> tuple[Any, ...]:
        bounds = self.program.bounds(self.channels, self.tensors)
        layers = [(layer, self._raws(layer, *ends)) for layer, *ends in zip(self.program.layers, bounds, bounds[1:])]
        total = torch.empty_like(self.buffer).copy_(grad)
        for index in range(len(layers) - 1, -1, -1):
            layer, raws = layers.pop()
            self._layer(layer, raws, total, bounds[index], bounds[index + 1], needed=index > 0 or self.needs_x)
        grad_x = total[:, : self.channels].to(self.dtype) if self.needs_x else None
        return (None, grad_x, *self.grads)

    def _raws(self, layer: Chain, start: int, stop: int) -> list[Raw]:
        """A layer's saved raw tensors; its first is the channels before it.

        The last is what it made of them behind a dropout, which backward does not look into.
        """
        width, count = len(Raw._fields), len(layer)
        fields, self._rest = self._rest[: width * count], self._rest[width * count :]
        raws = [Raw(*fields[i * width : (i + 1) * width]) for i in range(count)]
        raws[0] = raws[0]._replace(tensor=self.buffer[:, :start])
        raws[-1] = raws[-1]._replace(tensor=self.buffer[:, start:stop])
        return raws

    def _layer(self, layer: Chain, raws: list[Raw], total: Tensor, start: int, stop: int, needed: bool) -> None:
        """Adds the gradient of the channels before the layer to ``total``, from that of the channels it made."""
        self._complete(layer, raws, len(raws))
        grad, last = total[:, start:stop].contiguous(memory_format=torch.channels_last), len(layer) - 1
        if layer[last].plain:
            self._bias(layer, last, None, None, grad)
        else:
            grad = self._pending(layer, last, raws[last], grad, layer[last].act)[0]
        grad = self._chain(layer, raws, grad, needs_input=True, stop=1)
        before = total[:, :start]
        self._link(layer, 0, raws[0], grad, needed or self._makers_needed(layer[0]), before, before)
