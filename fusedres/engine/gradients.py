"""Backward of pending values and of chains of convolutions, for one backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.activations import Activation
from ..ops.conv import adds_pointwise_dgrad, conv_backward, pointwise_dgrad_add_
from ..ops.conv_wgrad import fuses_wgrad
from ..ops.join_backward import JOIN_BACKWARD
from ..ops.layout import like
from .pending import Raw, applied, excitation, next_raw, squeezed
from .program import ExciteSlot, Link, NormSlot, Operands

Chain = tuple[Link, ...]


class Side(NamedTuple):
    """The other operand of a join: its chain, its last raw tensor, and whether its gradient is wanted."""

    chain: Chain
    raw: Raw
    needed: bool


class Gradients:
    """What one backward pass works with, and the gradients that it collects.

    Attributes:
        k: the kernels.
        tensors: weights and biases at their slots' places.
        needs: of each operand, whether its gradient is wanted.
        grads: of each operand, its gradient.
    """

    def __init__(
        self,
        k: SimpleNamespace,
        tensors: Operands,
        needs: Sequence[bool],
        parameter_dtypes: list[torch.dtype | None],
    ) -> None:
        self.k, self.tensors, self.needs, self.parameter_dtypes = k, tensors, needs, parameter_dtypes
        self.grads: list[Tensor | None] = [None] * len(tensors)

    # -- a pending value -----------------------------------------------------------------------------------------

    def _pending(
        self,
        chain: Chain,
        index: int,
        raw: Raw,
        grad: Tensor,
        act: Activation,
        emit: bool = False,
        side: Side | None = None,
        addend: Tensor | None = None,
        into: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Backward of ``value = dropout(act(gain * norm(raw) + norm(side)))``: ``(draw, dside, value if emit)``.

        With an ``addend``, ``draw + addend``; with ``into`` that is written there, and ``draw`` is empty.
        """
        link, y = chain[index], raw.tensor
        norm, side_norm = link.norm, None if side is None else side.chain[-1].norm
        residual, side_rows = (None, None) if side is None else (side.raw.tensor, side.raw.rows)
        operands = (like(grad, y), y, raw.rows, residual, side_rows, act.code, act.param)
        modifiers = (raw.gain, link.dropout, raw.seed)
        training = norm is not None and norm.batch_statistics
        side_training = side_norm is not None and side_norm.batch_statistics
        flags = (training, side_training, side is not None and side.needed)
        count = float(y.numel() // y.shape[1])
        sums, value, offset = None, None, None
        if emit or training or side_training or self._sums_needed(chain, index, side):
            if raw.gain is None and self.k.backend in JOIN_BACKWARD.kernels:
                rest = (link.dropout, raw.seed, addend, into)
                sums, value, draw, dside = self.k.join_backward(*operands, emit, count, *flags, *rest)
                self._from_sums(chain, index, raw.rows, sums, side)
                return draw, dside, value
            sums, value = self.k.join_backward_reduce(*operands, emit, *modifiers)
            if raw.gain is not None:
                sums, offset = self._behind_gain(link, raw, sums, y.shape[2] * y.shape[3])
            self._from_sums(chain, index, raw.rows, sums, side)
        draw, dside = self.k.join_backward_apply(*operands, sums, count, *flags, *modifiers, offset, addend, into)
        return draw, dside, value

    def _sums_needed(self, chain: Chain, index: int, side: Side | None) -> bool:
        """Whether a parameter's gradient comes from the sums, or the squeeze's."""
        gain, norm, conv = chain[index].gain, chain[index].norm, chain[index - 1].conv if index else None
        return (
            (gain is not None and gain.excite is not None)
            or (norm is not None and (self.needs[norm.first] or self.needs[norm.first + 1]))
            or (conv is not None and self.needs[conv.first + 1])
            or (side is not None and self._sums_needed(side.chain, len(side.chain) - 1, None))
        )

    def _from_sums(self, chain: Chain, index: int, rows: Tensor | None, sums: Tensor, side: Side | None) -> None:
        """Sets the gradients of norms and biases."""
        each = sums.unbind(0)
        self._affine(chain[index].norm, each[0], each[1])
        self._bias(chain, index, rows, each[0], None)
        if side is not None:
            # With a gain between them, what reaches the norm is not what reaches the side: that has a row of its own.
            total, last = each[3] if len(each) > 3 else each[0], len(side.chain) - 1
            self._affine(side.chain[last].norm, total.clone(), each[2])
            self._bias(side.chain, last, side.raw.rows, total, None)

    def _behind_gain(self, link: Link, raw: Raw, sums: Tensor, pixels: int) -> tuple[Tensor, Tensor | None]:
        """From the sums per sample of the gradient before the gain to the totals behind it, and the squeeze's gradient.

        With ``u = scale y + shift`` the gain's gradient is the sum of ``g u``; through the excitation it reaches the
        mean of ``u`` over height and width, and so every value alike. A few values in which much cancels: in double.
        """
        g, gy, gr = sums.double().unbind(0)
        u_sum, uy_sum, offset = raw.gain * g, raw.gain * gy, None
        if link.gain.excite is not None:
            dgain = gy
            if raw.rows is not None:
                mean, rstd, scale, shift = raw.rows.double().unbind(0)
                dgain = scale / rstd * gy + (scale * mean + shift) * g
            dsqueeze = self._excitation(link.gain.excite, raw, dgain if raw.mask is None else dgain * raw.mask)
            normalised = raw.means if raw.rows is None else (raw.means - mean) * rstd
            u_sum, uy_sum = u_sum + dsqueeze, uy_sum + dsqueeze * normalised
            offset = (dsqueeze / pixels).to(sums.dtype)
        return torch.stack([t.sum(0) for t in (u_sum, uy_sum, gr, g)]).to(sums.dtype), offset

    def _excitation(self, slot: ExciteSlot, raw: Raw, dgate: Tensor) -> Tensor:
        """Sets the gradients of the excitation's layers and returns the squeeze's; its few values are run again."""
        operands = self.tensors[slot.first : slot.first + 4]
        dtype = torch.float32 if operands[0].element_size() < 4 else torch.float64
        with torch.enable_grad():
            squeeze = squeezed(raw.rows, raw.means).detach().to(dtype).requires_grad_()
            operands = [t if t is None else t.detach().to(dtype) for t in operands]
            wanted = [i for i, t in enumerate(operands) if t is not None and self.needs[slot.first + i]]
            for i in wanted:
                operands[i].requires_grad_()
            gate = excitation(slot, squeeze, operands)
        leaves = (squeeze, *(operands[i] for i in wanted))
        dsqueeze, *grads = torch.autograd.grad(gate, leaves, dgate.to(gate.dtype))
        for i, grad in zip(wanted, grads):
            self.grads[slot.first + i] = grad
        return dsqueeze

    def _affine(self, norm: NormSlot | None, dbeta: Tensor, dgamma: Tensor) -> None:
        if norm is None:
            return
        if self.needs[norm.first]:
            self.grads[norm.first] = dgamma
        if self.needs[norm.first + 1]:
            self.grads[norm.first + 1] = dbeta

    def _bias(self, chain: Chain, index: int, rows: Tensor | None, total: Tensor | None, grad: Tensor | None) -> None:
        """The gradient of the bias of the convolution that made raw tensor ``index``.

        From the sum of the gradient behind the norm, which is there already, or from the raw tensor's gradient.

        A norm with batch statistics takes any constant out again, so its gradient is exactly zero.
        """
        conv = chain[index - 1].conv if index else None
        if conv is None or not self.needs[conv.first + 1]:
            return
        norm = chain[index].norm
        if norm is None:
            # The mean of the statistics pass is more accurate than a sum in the gradient's dtype.
            total = self.k.bn_stats(grad)[0] * (grad.numel() // grad.shape[1]) if total is None else total.clone()
        else:
            total = torch.zeros_like(total) if norm.batch_statistics else total * rows[2]
        self.grads[conv.first + 1] = total

    # -- a chain of convolutions ---------------------------------------------------------------------------------

    def _complete(self, chain: Chain, raws: list[Raw], end: int) -> list[Raw]:
        """The first ``end`` raw tensors with those recomputed that were not kept."""
        for i in range(1, end):
            if raws[i].tensor is None:
                value = applied(chain[i - 1], raws[i - 1], self.k)
                raws[i] = raws[i]._replace(tensor=next_raw(chain[i - 1], value, self.tensors))
        return raws

    def _chain(
        self,
        chain: Chain,
        raws: list[Raw],
        grad: Tensor,
        needs_input: bool,
        onto: Tensor | None = None,
        stop: int = 0,
    ) -> Tensor | None:
        """From the gradient of a chain's last raw tensor to that of its input, added to ``onto`` if that is given.

        Or to that of raw tensor ``stop``.
        """
        for index in range(len(chain) - 2, stop - 1, -1):
            needed = index > 0 or needs_input or self._norm_needed(chain[0])
            if index == 0 and needed and onto is not None:
                return self._first_link(chain, raws[0], grad, onto)
            grad = self._link(chain, index, raws[index], grad, needed)
        if not needs_input:
            return None
        return grad if onto is None else sum_(onto, grad)

    def _first_link(self, chain: Chain, raw: Raw, grad: Tensor, onto: Tensor) -> Tensor:
        """The link that reads the block's input, whose gradient the shortcut has a part in: ``onto``."""
        if self._adds(chain[0], grad, onto):
            return self._add_link(chain[0], raw, grad, onto)
        if chain[0].plain:
            return sum_(onto, self._link(chain, 0, raw, grad, True))
        if onto.dtype != raw.tensor.dtype:
            return onto + self._link(chain, 0, raw, grad, True)
        return self._link(chain, 0, raw, grad, True, like(onto, raw.tensor))

    def _norm_needed(self, link: Link) -> bool:
        return link.norm is not None and (self.needs[link.norm.first] or self.needs[link.norm.first + 1])

    def _link(
        self,
        chain: Chain,
        index: int,
        raw: Raw,
        grad: Tensor,
        needed: bool,
        addend: Tensor | None = None,
        into: Tensor | None = None,
    ) -> Tensor | None:
        """Backward of ``conv(value(raw))``: sets the weight's gradient, returns that of ``raw`` if needed.

        A link that is not plain adds the ``addend`` and writes ``into`` in its last pass, see :meth:`_pending`.
        """
        link = chain[index]
        if link.conv is None:
            return self._pending(chain, index, raw, grad, link.act, addend=addend, into=into)[0]
        conv, weight = link.conv, self.tensors[link.conv.first]
        grad = grad.to(weight.dtype)
        needs_weight = self.needs[conv.first] and not self._fused_wgrad(link, raw, grad)
        if link.plain or not needed:
            value = applied(link, raw, self.k).to(weight.dtype) if needs_weight else raw.tensor
            grad_raw, dweight = conv_backward(grad, value, weight, conv.geometry, needed, needs_weight)
            if needs_weight:
                self.grads[conv.first] = dweight
            if grad_raw is not None and index:
                self._bias(chain, index, None, None, grad_raw)
            return grad_raw
        # dgrad first: the pass that reduces over its result also recomputes the value that wgrad reads.
        grad_value, _ = conv_backward(grad, raw.tensor, weight, conv.geometry, True, False)
        grad_raw, _, value = self._pending(
            chain, index, raw, grad_value, link.act, needs_weight, addend=addend, into=into
        )
        if needs_weight:
            value = value.to(weight.dtype)
            _, self.grads[conv.first] = conv_backward(grad, value, weight, conv.geometry, False, True)
        return grad_raw

    def _fused_wgrad(self, link: Link, raw: Raw, grad: Tensor) -> bool:
        """Sets the weight's gradient in one pass over the raw tensor, where a kernel does that; else returns False."""
        conv, weight = link.conv, self.tensors[link.conv.first]
        if link.gain is not None or link.dropout:
            return False
        if not (self.needs[conv.first] and fuses_wgrad(self.k.backend, raw.tensor, grad, weight, conv.geometry)):
            return False
        dweight = torch.empty_like(weight, dtype=self.parameter_dtypes[conv.first])
        g, act = conv.geometry, link.act
        self.k.conv_wgrad(grad, raw.tensor, raw.rows, act.code, act.param, g.stride, g.padding, g.dilation, dweight)
        self.grads[conv.first] = dweight
        return True

    def _adds(self, link: Link, grad: Tensor, onto: Tensor) -> bool:
        if not link.plain or grad.dtype != onto.dtype:
            return False
        return adds_pointwise_dgrad(onto, grad, self.tensors[link.conv.first], link.conv.geometry)

    def _add_link(self, link: Link, raw: Raw, grad: Tensor, onto: Tensor) -> Tensor:
        """The first link of a chain where dgrad adds to the shortcut's gradient inside the convolution."""
        conv, weight = link.conv, self.tensors[link.conv.first]
        if self.needs[conv.first] and not self._fused_wgrad(link, raw, grad):
            _, self.grads[conv.first] = conv_backward(grad, raw.tensor, weight, conv.geometry, False, True)
        return pointwise_dgrad_add_(onto, grad, weight)


def sum_(onto: Tensor, grad: Tensor) -> Tensor:
    """``onto + grad``, in place where dtype and layout allow."""
    return onto.add_(like(grad, onto)) if onto.dtype == grad.dtype else onto + grad
