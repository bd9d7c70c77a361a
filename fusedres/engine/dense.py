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

from ..ops.bn_stats import statistics_dtype
from ..ops.layout import dense
from ..select import kernels
from .convolution import Chain, convolved, run_chain
from .gradients import Gradients, RawGradient
from .inference import infer_chain, swallows
from .pending import Raw, Statistics, applied, cast_weights, compute_dtype, pend
from .program import Operands, weight_indices
from .synchronised import GroupStatistics, merge
from .training import refuse_more_than_once

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
    """Channels appended so far, and their statistics where a norm wants the batch's.

    Where one group of processes shares all of these, every channel's are merged once, as it is appended.
    """

    def __init__(self, program: DenseProgram, x: Tensor, channels: int, dtype: torch.dtype, k: SimpleNamespace) -> None:
        n, _, h, w = x.shape
        self.tensor = torch.empty((n, channels, h, w), dtype=dtype, device=x.device, memory_format=torch.channels_last)
        norms = [layer[0].norm for layer in program.layers if layer[0].norm.batch_statistics]
        self.measures, groups = bool(norms), {norm.group for norm in norms}
        self.group = groups.pop() if len(groups) == 1 else None
        self.own: Tensor | None = None
        self.merged: GroupStatistics | None = None
        self.filled, self.k = 0, k

    def room(self, channels: int) -> Tensor:
        """Where the next channels go."""
        return self.tensor[:, self.filled : self.filled + channels]

    def append(self, y: Tensor, into: Tensor, stats: Tensor | None = None) -> None:
        """Appends ``y``, which may be the room ``into`` itself, written by what made it and measured if need be."""
        start, self.filled = self.filled, self.filled + y.shape[1]
        if not self.measures:
            if y is not into:
                into.copy_(y)
            return
        if y is not into:
            y = y.to(self.tensor.dtype).contiguous(memory_format=torch.channels_last)
            if y.numel():
                stats = self.k.bn_stats(y, False, into)
            else:
                stats = y.new_zeros((2, y.shape[1]), dtype=statistics_dtype(y.dtype))
        self.own = self._with(self.own, stats, start)
        if self.group is not None:
            part = merge(self.group, [(stats, y.numel() // y.shape[1])])[0]
            known = None if self.merged is None else self.merged.values
            self.merged = GroupStatistics(self._with(known, part.values, start), part.count)

    def _with(self, stats: Tensor | None, of_new: Tensor, start: int) -> Tensor:
        stats = of_new.new_empty((2, self.tensor.shape[1])) if stats is None else stats
        stats[:, start : self.filled] = of_new
        return stats

    def read(self) -> tuple[Tensor, Statistics | None]:
        channels = self.tensor[:, : self.filled]
        if self.own is None:
            return channels, None
        own, merged = self.own[:, : self.filled].contiguous(), self.merged
        if merged is not None:
            merged = merged._replace(values=merged.values[:, : self.filled])
        return channels, Statistics(own, merged)


# From a layer, the channels before it, their statistics and the room for its own to its channels, which may be that
# room, and their statistics where they are known.
_Run = Callable[[Chain, Tensor, Statistics | None, Tensor], tuple[Tensor, Tensor | None]]


def _grow(
    program: DenseProgram,
    x: Tensor,
    tensors: Operands,
    dtype: torch.dtype,
    k: SimpleNamespace,
    run: _Run,
) -> Tensor:
    """The buffer after all layers; ``run`` runs one."""
    dtype = torch.promote_types(x.dtype, dtype)
    bounds = program.bounds(x.shape[1], tensors)
    buffer = _Buffer(program, x, bounds[-1], dtype, k)
    buffer.append(x, buffer.room(x.shape[1]))
    for layer, start, stop in zip(program.layers, bounds, bounds[1:]):
        into = buffer.room(stop - start)
        made, made_stats = run(layer, *buffer.read(), into)
        buffer.append(made, into, made_stats)
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

    def run(layer: Chain, channels: Tensor, stats: Statistics | None, into: Tensor) -> tuple[Tensor, Tensor | None]:
        return infer_chain(layer, channels, None, layer[-1].act, dtype, tensors, folded, k, into), None

    return _in_layout_of(x, _grow(program, x, tensors, dtype, k, run))


def _forward(
    program: DenseProgram, x: Tensor, tensors: Operands, dtype: torch.dtype, k: SimpleNamespace
) -> tuple[Tensor, list[list[Raw]]]:
    """The buffer, and every layer's raw tensors."""
    kept = []

    def run(layer: Chain, channels: Tensor, stats: Statistics | None, into: Tensor) -> tuple[Tensor, Tensor | None]:
        first, last = layer[0], layer[-1]
        known = stats if first.norm.batch_statistics and not first.excites else None
        raws = run_chain(layer[:-1], pend(first, channels, tensors, k, known), None, tensors, k)
        fits = last.plain and into.dtype == dtype
        made = convolved(layer[-2], raws[-1], None, tensors, k, fits and stats is not None, into=into if fits else None)
        raws.append(pend(last, made[0], tensors, k))
        kept.append(raws)
        return (applied(last, raws[-1], k), None) if last.dropout else made

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
        refuse_more_than_once(grad)
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
        path = self._path(layer, self._complete(layer, raws, len(raws)), needed)
        grad, last = total[:, start:stop].contiguous(memory_format=torch.channels_last), len(layer) - 1
        if layer[last].plain:
            self._bias(layer, last, None, None, grad)
            behind = RawGradient(grad)
        else:
            behind = self._pending(layer, last, raws[last], grad, layer[last].act)[0]
        before = total[:, :start]
        self._link(path, 0, self._links(path, behind, 1), needed or self._makers_needed(layer[0]), before, before)
