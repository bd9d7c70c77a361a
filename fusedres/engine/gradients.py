"""Backward of pending values and of chains of convolutions, for one backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.activations import IDENTITY, Activation
from ..ops.conv import adds_pointwise_dgrad, conv_backward, pointwise_dgrad_add_
from ..ops.conv_wgrad import fuses_wgrad
from ..ops.excite import squeezed
from ..ops.join_backward import JOIN_BACKWARD
from ..ops.layout import like
from .convolution import UNFUSED, Chain, Fusion, Operand, convolved, fusion_of, measures, pending_operand
from .pending import Raw, applied, excitation
from .program import ConvSlot, ExciteSlot, Link, NormSlot, Operands
from .synchronised import summed


class Path(NamedTuple):
    """A chain in one backward pass.

    Attributes:
        raws: of every link, its raw tensor and what is pending on it.
        fusions: of every link but the last, how its convolution runs.
    """

    chain: Chain
    raws: list[Raw]
    fusions: Sequence[Fusion]

    def pends(self, index: int) -> bool:
        """Whether the gradient of raw tensor ``index`` may stay pending."""
        return index > 0 and self.fusions[index - 1].pends


class RawGradient(NamedTuple):
    """The gradient of a raw tensor ``y``, which may be pending as that is: ``scale g - slope (y - mean) - offset``.

    Attributes:
        g: the gradient behind the norm, or, without rows, of the raw tensor itself.
        rows: see :data:`fusedres.ops.conv_fused_backward.BN_GRAD_ROWS`.
    """

    g: Tensor
    y: Tensor | None = None
    rows: Tensor | None = None


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
        pends: bool = False,
    ) -> tuple[RawGradient, RawGradient | None, Tensor | None]:
        """Backward of ``value = dropout(act(gain * norm(raw) + norm(side)))``: ``(draw, dside, value if emit)``.

        With an ``addend``, ``draw + addend``; with ``into`` that is written there, and ``draw`` is empty. With
        ``pends``, which has neither, both gradients stay pending.
        """
        link, y = chain[index], raw.tensor
        norm, side_norm = link.norm, None if side is None else side.chain[-1].norm
        residual, side_rows = (None, None) if side is None else (side.raw.tensor, side.raw.rows)
        operands = (like(grad, y), y, raw.rows, residual, side_rows, act.code, act.param)
        if pends:
            g, sums, value = self.k.join_backward_mask(*operands, emit, link.dropout, raw.seed)
            self._from_sums(chain, index, raw.rows, sums, side)
            sums = self._over_processes(norm, raw, sums, side)
            draw = self._unapplied(norm, raw, g, sums)
            return draw, None if side is None else self._unapplied(side_norm, side.raw, g, sums[0::2]), value
        modifiers = (raw.gain, link.dropout, raw.seed)
        training = norm is not None and norm.batch_statistics
        side_training = side_norm is not None and side_norm.batch_statistics
        flags = (training, side_training, side is not None and side.needed)
        count = y.numel() // y.shape[1]
        sums, value, offset = None, None, None
        if emit or training or side_training or self._sums_needed(chain, index, side):
            alone = all(n is None or n.group is None for n in (norm, side_norm))
            if raw.gain is None and alone and self.k.backend in JOIN_BACKWARD.kernels:
                rest = (link.dropout, raw.seed, addend, into)
                sums, value, draw, dside = self.k.join_backward(*operands, emit, count, *flags, *rest)
                self._from_sums(chain, index, raw.rows, sums, side)
                return RawGradient(draw), RawGradient(dside), value
            sums, value = self.k.join_backward_reduce(*operands, emit, *modifiers)
            if raw.gain is not None:
                sums, offset = self._behind_gain(link, raw, sums, y.shape[2] * y.shape[3])
            self._from_sums(chain, index, raw.rows, sums, side)
            sums = self._over_processes(norm, raw, sums, side)
        draw, dside = self.k.join_backward_apply(*operands, sums, count, *flags, *modifiers, offset, addend, into)
        return RawGradient(draw), RawGradient(dside), value

    def _unapplied(self, norm: NormSlot | None, raw: Raw, g: Tensor, sums: Tensor) -> RawGradient:
        """The gradient of ``raw`` from ``g`` behind its norm, the sums of ``g`` and of ``g`` times the normalised."""
        if norm is None:
            return RawGradient(g)
        count = g.numel() // g.shape[1]
        rows = self.k.bn_grad_rows(raw.rows, sums if norm.batch_statistics else None, count)
        return RawGradient(g, raw.tensor, rows)

    def _masked(
        self, path: Path, index: int, g: Tensor, sums: Tensor, addend: Tensor | None, into: Tensor | None
    ) -> RawGradient:
        """Backward of a pending value from what a fused dgrad yields: ``g`` behind its norm, and the sums.

        ``addend`` and ``into`` as in :meth:`_pending`.
        """
        chain, raw, norm = path.chain, path.raws[index], path.chain[index].norm
        if norm is None:
            self._bias(chain, index, None, None, g)
            return RawGradient(g if addend is None else g.add_(addend))
        self._from_sums(chain, index, raw.rows, sums, None)
        sums = self._over_processes(norm, raw, sums, None)
        if path.pends(index):
            return self._unapplied(norm, raw, g, sums)
        operands = (g, raw.tensor, raw.rows, None, None, IDENTITY.code, IDENTITY.param)
        count, flags = g.numel() // g.shape[1], (norm.batch_statistics, False, False)
        modifiers = (None, 0.0, None, None)
        draw, _ = self.k.join_backward_apply(*operands, sums, count, *flags, *modifiers, addend, into)
        return RawGradient(draw)

    def _over_processes(self, norm: NormSlot | None, raw: Raw, sums: Tensor, side: Side | None) -> Tensor:
        """The sums with those of the other processes in them, where a norm is synchronised."""
        group = None if norm is None else norm.group
        side_norm = None if side is None else side.chain[-1].norm
        side_group = None if side_norm is None else side_norm.group
        if group is None and side_group is None:
            return sums
        count = raw.tensor.numel() // raw.tensor.shape[1]
        if group == side_group or side_norm is None or not side_norm.batch_statistics:
            return summed(sums, group, count / raw.total)
        # The norms share statistics with different processes: the sum of g is one for the one, another for the other.
        of_main, of_side = sums[:2], torch.stack((sums[2], sums[3] if len(sums) > 3 else sums[0]))
        of_main = of_main if group is None else summed(of_main, group, count / raw.total)
        of_side = of_side if side_group is None else summed(of_side, side_group, count / side.raw.total)
        return torch.cat((of_main, of_side))

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
            parameter = self.tensors[slot.first + i]
            if grad.stride() != parameter.stride():  # as autograd leaves it, and DistributedDataParallel lays it out
                grad = torch.empty_like(parameter, dtype=grad.dtype).copy_(grad)
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

        A norm with batch statistics takes any constant out again, so its gradient is exactly zero; where the batch is
        that of several processes, so is the sum, which their average is made of.
        """
        conv = chain[index - 1].conv if index else None
        if conv is None or not self.needs[conv.first + 1]:
            return
        norm = chain[index].norm
        if norm is None:
            total = self._channel_sums(grad) if total is None else total.clone()
        else:
            total = torch.zeros_like(total) if norm.batch_statistics else total * rows[2]
        self.grads[conv.first + 1] = total

    def _channel_sums(self, grad: Tensor) -> Tensor:
        if grad.numel() == 0:
            return grad.new_zeros(grad.shape[1])
        # The mean of the statistics pass is more accurate than a sum in the gradient's dtype.
        return self.k.bn_stats(grad)[0] * (grad.numel() // grad.shape[1])

    # -- a chain of convolutions ---------------------------------------------------------------------------------

    def _complete(self, chain: Chain, raws: list[Raw], end: int) -> list[Raw]:
        """The first ``end`` raw tensors with those recomputed that were not kept."""
        for i in range(1, end):
            if raws[i].tensor is None:
                link, measured = chain[i - 1], measures(chain[i])
                tensor, _ = convolved(link, raws[i - 1], None, self.tensors, self.k, measured, again=True)
                raws[i] = raws[i]._replace(tensor=tensor)
        return raws

    def _path(self, chain: Chain, raws: list[Raw], needs_input: bool, start: int = 0) -> Path:
        """A chain and how its convolutions run, those from link ``start`` on."""
        if self.k.fuses is None:
            return Path(chain, raws, (UNFUSED,) * len(chain))
        fusions = [UNFUSED] * len(chain)
        for i, (link, reader) in enumerate(zip(chain, chain[1:])):
            if link.conv is None or i < start:
                continue
            weight, needs_weight = self.tensors[link.conv.first], self.needs[link.conv.first]
            if link.plain:
                raws[i] = raws[i]._replace(tensor=raws[i].tensor.to(weight.dtype))
            needed = i > 0 or needs_input or self._makers_needed(link)
            fusions[i] = fusion_of(link, raws[i], reader, raws[i + 1].tensor, weight, needed, needs_weight, self.k)
        return Path(chain, raws, fusions)

    def _chain(self, path: Path, grad: RawGradient, needs_input: bool, onto: Tensor | None = None) -> Tensor | None:
        """From the gradient of a chain's last raw tensor to that of its input, added to ``onto`` if that is given."""
        if onto is not None and len(path.chain) > 1:
            return self._first_link(path, self._links(path, grad, 1), onto)
        grad = self._links(path, grad, 0, needs_input or self._makers_needed(path.chain[0]))
        if not needs_input:
            return None
        return grad.g if onto is None else sum_(onto, grad.g)

    def _links(self, path: Path, grad: RawGradient, stop: int, needed: bool = True) -> RawGradient | None:
        """From the gradient of a chain's last raw tensor to that of raw tensor ``stop``, ``None`` if not ``needed``."""
        for index in range(len(path.chain) - 2, stop - 1, -1):
            grad = self._link(path, index, grad, needed or index > stop)
        return grad

    def _first_link(self, path: Path, grad: RawGradient, onto: Tensor) -> Tensor:
        """The link that reads the block's input, whose gradient the shortcut has a part in: ``onto``."""
        link, raw, fused = path.chain[0], path.raws[0], path.fusions[0].dgrad
        if not fused and self._adds(link, grad.g, onto):
            return self._add_link(link, raw, grad.g, onto)
        if onto.dtype != raw.tensor.dtype or (link.plain and not fused):
            found = self._link(path, 0, grad, True).g
            return sum_(onto, found) if link.plain else onto + found
        if not link.plain:
            return self._link(path, 0, grad, True, like(onto, raw.tensor)).g
        onto = like(onto, raw.tensor)
        # In place, but for a join's gradient that this very convolution reads.
        return self._link(path, 0, grad, True, onto, None if onto is grad.g else onto).g

    def _makers_needed(self, link: Link) -> bool:
        """Whether the gradient of a parameter is wanted that makes the link's value: its norm's or excitation's."""
        slots = [] if link.norm is None else [(link.norm.first, 2)]
        if link.gain is not None and link.gain.excite is not None:
            slots.append((link.gain.excite.first, 4))
        return any(self.needs[first + i] for first, count in slots for i in range(count))

    def _link(
        self,
        path: Path,
        index: int,
        grad: RawGradient,
        needed: bool,
        addend: Tensor | None = None,
        into: Tensor | None = None,
    ) -> RawGradient | None:
        """Backward of ``conv(value(raw))``: sets the weight's gradient, returns that of ``raw`` if needed.

        The last pass adds the ``addend`` and writes ``into``, see :meth:`_pending`; of a plain link only a fused one.
        """
        chain, raw, fusion = path.chain, path.raws[index], path.fusions[index]
        link = chain[index]
        if link.conv is None:
            return self._pending(chain, index, raw, grad.g, link.act, False, None, addend, into, path.pends(index))[0]
        conv, weight = link.conv, self.tensors[link.conv.first]
        grad = self._as_read(grad, weight, fusion)
        needs_weight = self.needs[conv.first] and not self._wgrad_of_pending(link, raw, grad, fusion)
        if not needed:
            if needs_weight:
                self._wgrad(conv, grad, applied(link, raw, self.k), fusion)
            return None
        if link.plain:
            return self._plain_link(path, index, grad, needs_weight, addend, into)
        if fusion.dgrad and fusion.absorbs:
            if needs_weight:
                self._wgrad(conv, grad, applied(link, raw, self.k), fusion)
            g, sums = self._fused_dgrad(conv, grad, pending_operand(link, raw))
            return self._masked(path, index, g, sums, addend, into)
        # dgrad first: the pass that reduces over its result also recomputes the value that wgrad reads.
        if fusion.dgrad:
            grad_value = self._fused_dgrad(conv, grad, Operand(raw.tensor))[0]
        else:
            grad_value, _ = conv_backward(grad.g, raw.tensor, weight, conv.geometry, True, False)
        pends = path.pends(index)
        grad_raw, _, value = self._pending(
            chain, index, raw, grad_value, link.act, needs_weight, None, addend, into, pends
        )
        if needs_weight:
            self._wgrad(conv, grad, value, fusion)
        return grad_raw

    def _as_read(self, grad: RawGradient, weight: Tensor, fusion: Fusion) -> RawGradient:
        """A gradient in the dtype of the convolution that reads it, and in a fused one's layout."""
        if grad.rows is not None:
            return grad
        g = grad.g.to(weight.dtype)
        return RawGradient(g.contiguous(memory_format=torch.channels_last) if fusion is not UNFUSED else g)

    def _plain_link(
        self,
        path: Path,
        index: int,
        grad: RawGradient,
        needs_weight: bool,
        addend: Tensor | None,
        into: Tensor | None,
    ) -> RawGradient:
        """The link of a convolution that reads the raw tensor as it is."""
        conv, x, fusion = path.chain[index].conv, path.raws[index].tensor, path.fusions[index]
        weight = self.tensors[conv.first]
        if fusion.dgrad:
            g, _ = self._fused_dgrad(conv, grad, Operand(x), addend, into)
            if needs_weight:
                self._wgrad(conv, grad, x, fusion)
        else:
            x = x.to(weight.dtype) if needs_weight else x
            g, dweight = conv_backward(grad.g, x, weight, conv.geometry, True, needs_weight)
            if needs_weight:
                self.grads[conv.first] = dweight
        if index:
            self._bias(path.chain, index, None, None, g)
        return RawGradient(g)

    def _fused_dgrad(
        self,
        conv: ConvSlot,
        grad: RawGradient,
        operand: Operand,
        addend: Tensor | None = None,
        into: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        g, weight = conv.geometry, self.tensors[conv.first]
        geometry = (g.stride, g.padding, g.dilation)
        dx, sums = self.k.conv_fused_dgrad(*grad, weight, *operand, *geometry, addend, into)
        return dx if into is None else into, sums

    def _wgrad_of_pending(self, link: Link, raw: Raw, grad: RawGradient, fusion: Fusion) -> bool:
        """Sets the weight's gradient in one pass over the raw tensor, where a kernel does that; else returns False."""
        if fusion.wgrad and fusion.absorbs:
            self._fused_wgrad(link.conv, grad, pending_operand(link, raw))
            return True
        conv, weight = link.conv, self.tensors[link.conv.first]
        if link.gain is not None or link.dropout or grad.rows is not None:
            return False
        if not (self.needs[conv.first] and fuses_wgrad(self.k.backend, raw.tensor, grad.g, weight, conv.geometry)):
            return False
        dweight = torch.empty_like(weight, dtype=self.parameter_dtypes[conv.first])
        g, act = conv.geometry, link.act
        self.k.conv_wgrad(grad.g, raw.tensor, raw.rows, act.code, act.param, g.stride, g.padding, g.dilation, dweight)
        self.grads[conv.first] = dweight
        return True

    def _fused_wgrad(self, conv: ConvSlot, grad: RawGradient, operand: Operand) -> None:
        g, weight = conv.geometry, self.tensors[conv.first]
        dweight = torch.empty_like(weight, dtype=self.parameter_dtypes[conv.first])
        self.k.conv_fused_wgrad(*grad, *operand, g.stride, g.padding, g.dilation, dweight)
        self.grads[conv.first] = dweight

    def _wgrad(self, conv: ConvSlot, grad: RawGradient, value: Tensor, fusion: Fusion) -> None:
        """The weight's gradient from the value that the convolution read."""
        weight = self.tensors[conv.first]
        value = value.to(weight.dtype)
        if fusion.wgrad:
            self._fused_wgrad(conv, grad, Operand(value))
        else:
            _, self.grads[conv.first] = conv_backward(grad.g, value, weight, conv.geometry, False, True)

    def _adds(self, link: Link, grad: Tensor, onto: Tensor) -> bool:
        if not link.plain or grad.dtype != onto.dtype:
            return False
        return adds_pointwise_dgrad(onto, grad, self.tensors[link.conv.first], link.conv.geometry)

    def _add_link(self, link: Link, raw: Raw, grad: Tensor, onto: Tensor) -> Tensor:
        """The first link of a chain where dgrad adds to the shortcut's gradient inside the convolution."""
        conv, weight = link.conv, self.tensors[link.conv.first]
        if self.needs[conv.first] and not self._wgrad_of_pending(link, raw, RawGradient(grad), UNFUSED):
            _, self.grads[conv.first] = conv_backward(grad, raw.tensor, weight, conv.geometry, False, True)
        return pointwise_dgrad_add_(onto, grad, weight)


def sum_(onto: Tensor, grad: Tensor) -> Tensor:
    """``onto + grad``, in place where dtype and layout allow."""
    return onto.add_(like(grad, onto)) if onto.dtype == grad.dtype else onto + grad
