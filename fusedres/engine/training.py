"""Training: one autograd node for a block, which keeps raw tensors and recomputes the rest."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from ..ops.activations import IDENTITY
from ..ops.conv import conv_backward
from ..ops.layout import dense, like
from ..select import kernels
from .convolution import run_chain
from .gradients import Gradients, Path, RawGradient, Side, sum_
from .pending import Raw, aligned, applied, apply_pending, cast_weights, compute_dtype, ended, pend, pend_ends
from .program import IDENTITY_SHORTCUT, Link, Operands, Program, weight_indices


class BlockFunction(torch.autograd.Function):
    """A whole block as one node: ``(program, x, residual, *tensors) -> out``."""

    @staticmethod
    def forward(ctx: Any, program: Program, x: Tensor, residual: Tensor | None, *tensors: Tensor | None) -> Tensor:
        dtype = compute_dtype(x)
        k = kernels(x.device.type, dtype, program.backend)
        operands = cast_weights(program.links, tensors, dtype)
        x = dense(x)
        record = any(ctx.needs_input_grad)
        out, branch, shortcut = forward_block(program, x, residual, operands, k, record)
        if record:
            _save(ctx, program, x, residual, operands, branch, shortcut)
            ctx.kernels = k
            ctx.parameter_dtypes = [None if t is None else t.dtype for t in tensors]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        refuse_more_than_once(grad)
        return _Backward(ctx).run(grad)


def refuse_more_than_once(grad: Tensor) -> None:
    """Raises inside a backward pass that is itself differentiated or batched.

    With ``create_graph=True`` a gradient that looks constant would be wrong, and kernels know nothing of batches.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a fused block is differentiable once; where second derivatives are wanted (create_graph=True), run it "
            "under fusedres.use_backend('stock')"
        )
    if is_legacy_batchedtensor(grad) or torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "a fused block takes one gradient at a time; where several are wanted at once (is_grads_batched=True, "
            "vectorize=True), run it under fusedres.use_backend('stock')"
        )


def forward_block(
    program: Program,
    x: Tensor,
    residual: Tensor | None,
    tensors: Operands,
    k: SimpleNamespace,
    record: bool = False,
) -> tuple[Tensor, list[Raw], list[Raw]]:
    """The block's output, and the raw tensors of its two chains; ``record`` where backward will follow."""
    first = pend(program.branch[0], x, tensors, k)
    value = applied(program.branch[0], first, k) if program.shares else None
    apart, last = not program.exchanges_once, program.branch[-1]
    branch = run_chain(program.branch, first, value, tensors, k, apart)
    if program.shortcut is None:
        out, branch[-1] = ended(last, branch[-1], k, record)
        return out, branch, []
    side_input = value if program.shares else x if residual is None else dense(residual)
    shortcut = run_chain(program.shortcut, pend(program.shortcut[0], side_input, tensors, k), None, tensors, k, apart)
    if not apart:
        pend_ends(program, branch, shortcut, tensors, k)
    raw = branch[-1]
    y, side = aligned(raw.tensor, shortcut[-1].tensor)
    out = apply_pending(last, raw._replace(tensor=y), program.act, k, side, shortcut[-1].rows)
    return out.to(raw.tensor.dtype) if program.in_place else out, branch, shortcut


def _save(
    ctx: Any,
    program: Program,
    x: Tensor,
    residual: Tensor | None,
    tensors: Operands,
    branch: list[Raw],
    shortcut: list[Raw],
) -> None:
    """Keeps the block's input, its raw tensors and what is pending on them.

    A chain's first raw tensor is the input itself, or, where the shortcut shares it, the branch's first pending value.
    """
    if residual is not None:
        residual = shortcut[0].tensor
    # Nothing of a norm but its rows: a later forward may update the running statistics before this backward.
    operands: list[Tensor | None] = [None] * len(tensors)
    for i in weight_indices(program.links):
        operands[i] = tensors[i]
    kept: list[Tensor | None] = [x, residual, *operands]
    for chain, raws in ((program.branch, branch), (program.shortcut, shortcut)):
        if chain is None:
            continue
        inner = [None if recomputes(chain, i, program.memory, tensors) else raws[i].tensor for i in range(1, len(raws))]
        if inner and only_adds(program):
            inner[-1] = None
        kept += inner
        for raw in raws:
            kept += raw[1:]
    ctx.program = program
    ctx.operand_count = len(tensors)
    ctx.save_for_backward(*kept)


def recomputes(chain: tuple[Link, ...], index: int, memory: str, tensors: Operands) -> bool:
    """Whether raw tensor ``index`` is recomputed in backward.

    Where no convolution made it, and, if memory is to be low, the last one where a 1x1 convolution did: the widest.
    """
    conv = chain[index - 1].conv
    if conv is None or memory != "low" or index < len(chain) - 1:
        return conv is None
    return tuple(tensors[conv.first].shape[2:]) == (1, 1)


def only_adds(program: Program) -> bool:
    """Whether at most an addition follows the chains, so that backward reads nothing of what they made."""
    chains = (program.branch,) if program.shortcut is None else (program.branch, program.shortcut)
    return program.act == IDENTITY and all(chain[-1].plain for chain in chains)


class _Backward(Gradients):
    """One backward pass of a block: walks the chains from the join to the input and collects every gradient."""

    def __init__(self, ctx: Any) -> None:
        saved = list(ctx.saved_tensors)
        self.program: Program = ctx.program
        self.x, self.residual = saved[:2]
        self._rest = saved[2 + ctx.operand_count :]
        self.needs_x, self.needs_residual = ctx.needs_input_grad[1:3]
        super().__init__(ctx.kernels, saved[2 : 2 + ctx.operand_count], ctx.needs_input_grad[3:], ctx.parameter_dtypes)

    def run(self, grad: Tensor) -> tuple[Any, ...]:
        program, has_shortcut = self.program, self.program.shortcut is not None
        needs_side_input = self.needs_x if self.residual is None else self.needs_residual
        if program.shares:
            needs_side_input = needs_side_input or self._makers_needed(program.branch[0])
        needs_side = has_shortcut and (needs_side_input or self._any_needed(program.shortcut))

        # Two chains that share their first value have that in common with its gradient: their first links go together.
        start = 1 if program.shares else 0
        raws = self._raws(program.branch, self.x)
        branch = self._path(program.branch, raws, self.needs_x, start)
        shortcut = None
        if has_shortcut:
            of_side = self._raws(program.shortcut, self._side_input(raws))
            shortcut = self._path(program.shortcut, of_side, needs_side_input, start)
        grad_y, grad_side = self._join(grad, branch, shortcut, needs_side)
        if program.shares:
            return (None, self._shared_input(branch, shortcut, grad_y, grad_side, needs_side_input), None, *self.grads)
        onto = self._chain(shortcut, grad_side, needs_side_input) if needs_side else None
        if self.residual is not None:
            return (None, self._chain(branch, grad_y, self.needs_x), onto, *self.grads)
        # Both chains read x: the branch adds its gradient to the shortcut's.
        return (None, self._chain(branch, grad_y, self.needs_x, onto), None, *self.grads)

    def _side_input(self, branch: list[Raw]) -> Tensor:
        """The shortcut's first raw tensor; of a shared value, which is not kept, only where others are made from it."""
        program, shortcut = self.program, self.program.shortcut
        if program.shares and not only_adds(program):
            inner = range(1, len(shortcut))
            if any(recomputes(shortcut, index, program.memory, self.tensors) for index in inner):
                return applied(program.branch[0], branch[0], self.k)
        return self.x if self.residual is None else self.residual

    def _raws(self, chain: tuple[Link, ...], x: Tensor) -> list[Raw]:
        """A chain's raw tensors as the forward had them, those recomputed that were dropped."""
        inner = len(chain) - 1
        tensors = [x, *self._rest[:inner]]
        width = len(Raw._fields) - 1
        pending = self._rest[inner : inner + width * len(chain)]
        self._rest = self._rest[inner + width * len(chain) :]
        raws = [Raw(t, *pending[i * width : (i + 1) * width]) for i, t in enumerate(tensors)]
        return self._complete(chain, raws, len(raws) - only_adds(self.program))

    def _any_needed(self, chain: tuple[Link, ...]) -> bool:
        slots = [(link.conv, 2) for link in chain if link.conv] + [(link.norm, 2) for link in chain if link.norm]
        return any(self.needs[slot.first + i] for slot, width in slots for i in range(width))

    def _shared_input(
        self,
        branch: Path,
        shortcut: Path,
        grad: RawGradient,
        grad_side: RawGradient | None,
        needed: bool,
    ) -> Tensor | None:
        """Both chains from their last raw tensors to the pending value that both read, and from there to the input."""
        first, raw = branch.chain[0], branch.raws[0]
        readers = []
        for path, g in ((branch, grad), (shortcut, grad_side)):
            if len(path.chain) > 1 and g is not None:
                readers.append((path.chain[0].conv, self._links(path, g, 1).g))
        grad_value = grad_side.g if len(shortcut.chain) == 1 and needed else None
        for conv, g in readers if needed else ():
            weight = self.tensors[conv.first]
            dgrad, _ = conv_backward(g.to(weight.dtype), raw.tensor, weight, conv.geometry, True, False)
            grad_value = dgrad if grad_value is None else sum_(grad_value, dgrad)
        readers = [(conv, g) for conv, g in readers if self.needs[conv.first]]
        grad_x, value = None, None
        if grad_value is not None:
            found, _, value = self._pending(branch.chain, 0, raw, grad_value, first.act, bool(readers))
            grad_x = found.g
        elif readers:
            value = applied(first, raw, self.k)
        for conv, g in readers:
            weight = self.tensors[conv.first]
            _, self.grads[conv.first] = conv_backward(
                g.to(weight.dtype), value.to(weight.dtype), weight, conv.geometry, False, True
            )
        return grad_x if self.needs_x else None

    def _join(
        self, grad: Tensor, branch: Path, shortcut: Path | None, needs_side: bool
    ) -> tuple[RawGradient, RawGradient | None]:
        """The gradients of both sides of the join."""
        chain, main, last = branch.chain, branch.raws[-1], len(branch.chain) - 1
        if only_adds(self.program):
            return self._addition(dense(grad), needs_side)
        if shortcut is None:
            if (pool := chain[-1].pool) is not None:
                window = (pool.kernel, pool.stride, pool.padding)
                grad = self.k.join_pool_backward(like(grad, main.tensor), main.taken, main.tensor, *window)
            pends = branch.pends(last)
            return self._pending(chain, last, main, grad, chain[-1].act, pends=pends)[0], None
        side = shortcut.raws[-1]
        y, residual = aligned(main.tensor, side.tensor)
        other = Side(shortcut.chain, side._replace(tensor=residual), needs_side)
        pends = branch.pends(last) and y.dtype == main.tensor.dtype and residual.dtype == side.tensor.dtype
        if needs_side and shortcut.chain[-1].norm is not None:
            pends = pends and shortcut.pends(len(shortcut.chain) - 1)
        main = main._replace(tensor=y)
        grad_y, grad_side, _ = self._pending(chain, last, main, grad, self.program.act, side=other, pends=pends)
        return grad_y, grad_side

    def _addition(self, grad: Tensor, needs_side: bool) -> tuple[RawGradient, RawGradient | None]:
        for chain in (self.program.branch, self.program.shortcut or IDENTITY_SHORTCUT):
            self._bias(chain, len(chain) - 1, None, None, grad)
        # An identity shortcut's gradient is added to in place, but where a pass over the input reads it.
        in_place = self.program.shares or self.program.branch[0].plain
        return RawGradient(grad), RawGradient(grad.clone() if in_place else grad) if needs_side else None
