"""The engine: runs any block, forward and backward, on any backend.

**A normalised tensor is never stored.** A batch norm followed by an activation is, per channel,
``z = act(scale[c] * y + shift[c])``, with ``y`` the raw output of a convolution. Between two convolutions the engine
carries a *pending* value: the raw tensor, its affine, its activation, none of it applied yet; whoever reads the value
next applies it. Autograd keeps the raw tensors and four numbers per channel, and backward recomputes the rest.

A chain is a tuple of :class:`Link`: pending value, convolution, pending value, convolution, ..., pending value. A block
is a chain, the branch; perhaps a second one, the shortcut, a single plain link where it is the identity; and an
activation behind their sum. What else a block may have is pending too: a *gain* per sample and channel, which is
squeeze-excitation's gate or stochastic depth's mask, between the norm and the activation, and a dropout behind the
activation. Every op here comes from :func:`fusedres.select.kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops.activations import IDENTITY, Activation
from .ops.bn_stats import statistics_dtype
from .ops.conv import (
    ConvGeometry,
    adds_pointwise_dgrad,
    conv_backward,
    conv_fprop,
    onednn_refuses,
    output_size,
    pointwise_dgrad_add_,
)
from .ops.conv_affine_act import FoldedConv, fold
from .ops.conv_wgrad import fuses_wgrad
from .ops.dropout import draw_seed
from .select import backend_for, kernels, too_small

__all__ = [
    "GATES",
    "IDENTITY_SHORTCUT",
    "ConvSlot",
    "ExciteSlot",
    "GainSlot",
    "Link",
    "NormSlot",
    "Program",
    "execute",
    "execute_stock",
]

# What may end an excitation.
GATES = {"sigmoid": torch.sigmoid, "hardsigmoid": F.hardsigmoid}


# ---------------------------------------------------------------------------------------------------------------------
# A block with its operands
# ---------------------------------------------------------------------------------------------------------------------


class ConvSlot(NamedTuple):
    """A convolution whose weight and bias are ``tensors[first]`` and ``tensors[first + 1]``."""

    first: int
    geometry: ConvGeometry


class NormSlot(NamedTuple):
    """A batch norm whose gamma, beta, running_mean and running_var are the four tensors from ``tensors[first]`` on.

    Attributes:
        batch_statistics: whether it normalises with the statistics of the batch, or with the running ones.
        momentum: the weight of the batch in the running statistics.
    """

    first: int
    batch_statistics: bool
    momentum: float
    eps: float


class ExciteSlot(NamedTuple):
    """Two dense layers from squeeze to gate; weight and bias of each are the four tensors from ``tensors[first]`` on.

    Attributes:
        act: between the layers.
        gate: behind them, a key of :data:`GATES`.
    """

    first: int
    act: Activation
    gate: str


class GainSlot(NamedTuple):
    """A multiplier per sample and channel.

    Attributes:
        excite: makes it from the mean over height and width, or ``None``.
        drop_path: the probability with which a sample is dropped; what survives is scaled by ``1 / (1 - drop_path)``.
    """

    excite: ExciteSlot | None
    drop_path: float


class Link(NamedTuple):
    """A pending value and its reader: ``conv(dropout(act(gain * norm(raw))))``.

    The last link of a chain has no convolution.
    """

    norm: NormSlot | None
    act: Activation
    conv: ConvSlot | None
    gain: GainSlot | None = None
    dropout: float = 0.0

    @property
    def plain(self) -> bool:
        """Whether the raw tensor is the value itself."""
        return self.norm is None and self.act == IDENTITY and self.gain is None and not self.dropout


IDENTITY_SHORTCUT = (Link(None, IDENTITY, None),)

Operands = Sequence[Tensor | None]


class Program(NamedTuple):
    """A block bound to the slots of its operands, which lie in one flat list beside it.

    Attributes:
        act: the activation behind the join.
        shares: whether the shortcut reads the branch's first pending value, not the input.
        in_place: whether the join keeps the branch's dtype, as ``+=`` does, or takes the common one.
        memory: ``"low"`` drops the last raw tensor of a chain where a 1x1 convolution made it, and recomputes it.
        backend: forced, or ``"auto"``.
    """

    branch: tuple[Link, ...]
    shortcut: tuple[Link, ...] | None
    act: Activation
    in_place: bool = False
    memory: str = "auto"
    backend: str = "auto"
    shares: bool = False

    @property
    def links(self) -> tuple[Link, ...]:
        return self.branch if self.shortcut is None else self.branch + self.shortcut

    @property
    def constant(self) -> bool:
        """Whether the result depends on nothing but the input and the parameters: no batch statistics, no chance."""
        for norm, _, _, gain, dropout in self.links:
            if (norm is not None and norm.batch_statistics) or dropout or (gain is not None and gain.drop_path):
                return False
        return True


def execute(
    program: Program, x: Tensor, residual: Tensor | None, tensors: Operands, folded: dict[int, Any] | None = None
) -> Tensor:
    """Runs a block.

    Args:
        x: the input, ``[N, C, H, W]``.
        residual: what the shortcut reads where that is not ``x``.
        tensors: the operands of the program's slots.
        folded: where folded and packed weights are kept between inference calls.
    """
    stock = backend_for(x.device, _compute_dtype(x), program.backend) == "stock"
    inference = program.constant and not _needs_gradient(x, residual, tensors)
    small = program.memory != "low" and too_small(x, "inference" if inference else "training", program.backend)
    if stock or small or x.numel() == 0 or torch.compiler.is_compiling() or _broadcasts(program, x, residual, tensors):
        return execute_stock(program, x, residual, tensors)
    if inference:
        return _infer(program, x, residual, tensors, {} if folded is None else folded)
    return BlockFunction.apply(program, x, residual, *tensors)


def _broadcasts(program: Program, x: Tensor, residual: Tensor | None, tensors: Operands) -> bool:
    """Whether the join's two sides differ in shape."""
    if program.shortcut is None:
        return False
    side = x if residual is None else residual
    return _shape(program.branch, x.shape, tensors) != _shape(program.shortcut, side.shape, tensors)


def _shape(chain: tuple[Link, ...], shape: tuple[int, ...], tensors: Operands) -> tuple[int, ...]:
    """What a chain makes of an input of this shape."""
    for link in chain:
        if link.conv is not None:
            weight = tensors[link.conv.first].shape
            shape = (shape[0], weight[0], *output_size(shape[2:], weight[2:], link.conv.geometry))
    return tuple(shape)


def _needs_gradient(x: Tensor, residual: Tensor | None, tensors: Operands) -> bool:
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(t is not None and t.requires_grad for t in (residual, *tensors))


# ---------------------------------------------------------------------------------------------------------------------
# Pieces that forward and backward share
# ---------------------------------------------------------------------------------------------------------------------


class Raw(NamedTuple):
    """A raw tensor and what is pending on it.

    Attributes:
        rows: ``(mean, rstd, scale, shift)`` of the norm, ``[4, C]``.
        gain: ``[N, C]``.
        mask: stochastic depth's part of the gain, ``[N, 1]``.
        means: of every sample's channels, ``[N, C]``, where the gain is made from them.
        seed: of the dropout.
    """

    tensor: Tensor
    rows: Tensor | None = None
    gain: Tensor | None = None
    mask: Tensor | None = None
    means: Tensor | None = None
    seed: Tensor | None = None


def _compute_dtype(x: Tensor) -> torch.dtype:
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def _cast_convolutions(program: Program, tensors: Operands, dtype: torch.dtype) -> list[Tensor | None]:
    """The operands with the convolutions' in ``dtype``, as autocast would have them."""
    result = list(tensors)
    for i in _weights(program):
        t = result[i]
        result[i] = None if t is None else t.to(dtype)
    return result


def _weights(program: Program) -> list[int]:
    """Where the weights and biases of convolutions and excitations lie."""
    indices: list[int] = []
    for link in program.links:
        if link.conv is not None:
            indices += (link.conv.first, link.conv.first + 1)
        if link.gain is not None and link.gain.excite is not None:
            indices += range(link.gain.excite.first, link.gain.excite.first + 4)
    return indices


def _dense(x: Tensor) -> Tensor:
    """``x``, or a copy where its layout is neither channels_last nor contiguous."""
    if x.is_contiguous(memory_format=torch.channels_last) or x.is_contiguous():
        return x
    # A channel stride of one says channels_last even where rows are padded or sliced.
    last = x.stride(1) == 1 and x.shape[1] > 1
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _like(x: Tensor, y: Tensor) -> Tensor:
    """``x`` in the dtype and the dense layout of ``y``, which has the same shape."""
    if x.dtype != y.dtype:
        x = x.to(y.dtype)
    if x.stride() == y.stride():
        return x
    last = y.is_contiguous(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _aligned(y: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both sides of a join in the dtype in which stock PyTorch adds them, and in ``y``'s layout."""
    if residual is None:
        return y, None
    if residual.dtype != y.dtype:
        y = y.to(torch.promote_types(y.dtype, residual.dtype))
    return y, _like(residual, y)


def _pend(link: Link, tensor: Tensor, tensors: Operands, k: SimpleNamespace) -> Raw:
    """A raw tensor with what ``link`` makes pending on it: statistics are taken, masks and seeds drawn."""
    if link.gain is None:
        rows = _norm_rows(link.norm, tensor, tensors, k)
        return Raw(tensor, rows, seed=draw_seed() if link.dropout else None)
    means = rows = None
    if link.gain.excite is None:
        rows = _norm_rows(link.norm, tensor, tensors, k)
    else:  # one pass for the batch's statistics and the squeeze
        stats = k.bn_stats(tensor, True)
        means, rows = stats[0], _norm_rows(link.norm, tensor, tensors, k, stats)
    mask = _survivors(tensor, link.gain.drop_path)
    gain = _gain(link.gain.excite, rows, means, mask, tensors, tensor)
    return Raw(tensor, rows, gain, mask, means, draw_seed() if link.dropout else None)


def _norm_rows(
    norm: NormSlot | None, raw: Tensor, tensors: Operands, k: SimpleNamespace, stats: Tensor | None = None
) -> Tensor | None:
    if norm is None:
        return None
    affine_and_buffers = tensors[norm.first : norm.first + 4]
    if not norm.batch_statistics:
        return k.bn_norm(None, 1.0, *affine_and_buffers, 0.0, norm.eps)
    count = raw.numel() // raw.shape[1]
    if count <= 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {raw.shape}")
    stats = k.bn_stats(raw) if stats is None else stats
    rows = k.bn_norm(stats, float(count), *affine_and_buffers, norm.momentum, norm.eps)
    # A kernel's write goes by unnoticed; folded weights and autograd's checks rely on the count.
    torch.autograd.graph.increment_version([t for t in affine_and_buffers[2:] if t is not None])
    return rows


def _survivors(x: Tensor, drop_path: float) -> Tensor | None:
    """Stochastic depth's mask, ``[N, 1]``, drawn as torchvision's and timm's modules draw it."""
    if not drop_path:
        return None
    kept = torch.empty((x.shape[0], 1), dtype=x.dtype, device=x.device).bernoulli_(1 - drop_path)
    return kept.to(statistics_dtype(x.dtype)) / (1 - drop_path if drop_path < 1 else 1)


def _gain(
    excite: ExciteSlot | None,
    rows: Tensor | None,
    means: Tensor | None,
    mask: Tensor | None,
    tensors: Operands,
    raw: Tensor,
) -> Tensor:
    if excite is None:
        return mask.expand(raw.shape[:2]).contiguous()
    gate = _excite(excite, _squeeze(rows, means), tensors[excite.first : excite.first + 4]).to(means.dtype)
    return gate if mask is None else gate * mask


def _squeeze(rows: Tensor | None, means: Tensor) -> Tensor:
    """The mean of a batch-normalised tensor is the affine of the raw tensor's mean."""
    return means if rows is None else torch.addcmul(rows[3], rows[2], means)


def _excite(slot: ExciteSlot, squeeze: Tensor, tensors: Operands) -> Tensor:
    w1, b1, w2, b2 = tensors
    hidden = slot.act(F.linear(squeeze.to(w1.dtype), w1.flatten(1), b1))
    return GATES[slot.gate](F.linear(hidden, w2.flatten(1), b2))


def _apply_pending(link: Link, raw: Raw, act: Activation, k: SimpleNamespace, *side: Tensor | None) -> Tensor:
    """``dropout(act(gain * norm(raw) + side))``; a side is a tensor and the rows of its norm."""
    residual, res_rows = side or (None, None)
    if raw.gain is None and raw.seed is None:
        return k.join(raw.tensor, raw.rows, residual, res_rows, act.code, act.param)
    return k.join(raw.tensor, raw.rows, residual, res_rows, act.code, act.param, raw.gain, link.dropout, raw.seed)


def _value(link: Link, raw: Raw, k: SimpleNamespace) -> Tensor:
    """The pending value, applied."""
    return raw.tensor if link.plain else _apply_pending(link, raw, link.act, k)


def _convolve(conv: ConvSlot, value: Tensor, tensors: Operands) -> Tensor:
    weight = tensors[conv.first]
    return conv_fprop(value.to(weight.dtype), weight, tensors[conv.first + 1], conv.geometry)


def _recomputes(chain: tuple[Link, ...], memory: str, tensors: Operands) -> bool:
    """Whether the last raw tensor of a chain is recomputed in backward: cheap for a 1x1 convolution, and the widest."""
    if memory != "low" or len(chain) < 2:
        return False
    return tuple(tensors[chain[-2].conv.first].shape[2:]) == (1, 1)


def _only_adds(program: Program) -> bool:
    """Whether at most an addition follows the chains, so that backward reads nothing of what they made."""
    chains = (program.branch,) if program.shortcut is None else (program.branch, program.shortcut)
    return program.act == IDENTITY and all(chain[-1].plain for chain in chains)


# ---------------------------------------------------------------------------------------------------------------------
# Training: one autograd node for the block
# ---------------------------------------------------------------------------------------------------------------------


def _run_chain(
    chain: tuple[Link, ...], first: Raw, value: Tensor | None, tensors: Operands, k: SimpleNamespace
) -> list[Raw]:
    """The raw tensors of a chain, each with what is pending on it; ``value`` is the first one's, if it is there yet."""
    raws = [first]
    for link, reader in zip(chain, chain[1:]):
        value = _value(link, raws[-1], k) if value is None else value
        raws.append(_pend(reader, _convolve(link.conv, value, tensors), tensors, k))
        value = None
    return raws


class BlockFunction(torch.autograd.Function):
    """A whole block as one node: ``(program, x, residual, *tensors) -> out``."""

    @staticmethod
    def forward(ctx: Any, program: Program, x: Tensor, residual: Tensor | None, *tensors: Tensor | None) -> Tensor:
        dtype = _compute_dtype(x)
        k = kernels(x.device.type, dtype, program.backend)
        operands = _cast_convolutions(program, tensors, dtype) if torch.is_autocast_enabled(x.device.type) else tensors
        x = _dense(x)
        out, branch, shortcut = _forward(program, x, residual, operands, k)
        if any(ctx.needs_input_grad):
            _save(ctx, program, x, residual, operands, branch, shortcut)
            ctx.kernels = k
            ctx.parameter_dtypes = [None if t is None else t.dtype for t in tensors]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # only with create_graph=True; a gradient that looks constant would be wrong
            raise RuntimeError(
                "a fused block is differentiable once; where second derivatives are wanted (create_graph=True), run it "
                "under fusedres.use_backend('stock')"
            )
        return _Backward(ctx).run(grad)


def _forward(
    program: Program, x: Tensor, residual: Tensor | None, tensors: Operands, k: SimpleNamespace
) -> tuple[Tensor, list[Raw], list[Raw]]:
    """The block's output, and the raw tensors of its two chains."""
    first = _pend(program.branch[0], x, tensors, k)
    value = _value(program.branch[0], first, k) if program.shares else None
    branch = _run_chain(program.branch, first, value, tensors, k)
    last, raw = program.branch[-1], branch[-1]
    if program.shortcut is None:
        return _value(last, raw, k), branch, []
    side_input = value if program.shares else x if residual is None else _dense(residual)
    shortcut = _run_chain(program.shortcut, _pend(program.shortcut[0], side_input, tensors, k), None, tensors, k)
    y, side = _aligned(raw.tensor, shortcut[-1].tensor)
    out = _apply_pending(last, raw._replace(tensor=y), program.act, k, side, shortcut[-1].rows)
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
    for i in _weights(program):
        operands[i] = tensors[i]
    kept: list[Tensor | None] = [x, residual, *operands]
    for chain, raws in ((program.branch, branch), (program.shortcut, shortcut)):
        if chain is None:
            continue
        inner = [raw.tensor for raw in raws[1:]]
        if inner and (_only_adds(program) or _recomputes(chain, program.memory, tensors)):
            inner[-1] = None
        kept += inner
        for raw in raws:
            kept += raw[1:]
    ctx.program = program
    ctx.operand_count = len(tensors)
    ctx.save_for_backward(*kept)


class _Backward:
    """One backward pass of a block: walks the chains from the join to the input and collects every gradient."""

    def __init__(self, ctx: Any) -> None:
        saved = list(ctx.saved_tensors)
        self.program: Program = ctx.program
        self.k: SimpleNamespace = ctx.kernels
        self.parameter_dtypes: list[torch.dtype | None] = ctx.parameter_dtypes
        self.x, self.residual = saved[:2]
        self.tensors = saved[2 : 2 + ctx.operand_count]
        self._rest = saved[2 + ctx.operand_count :]
        self.needs_x, self.needs_residual = ctx.needs_input_grad[1:3]
        self.needs = ctx.needs_input_grad[3:]
        self.grads: list[Tensor | None] = [None] * ctx.operand_count

    def run(self, grad: Tensor) -> tuple[Any, ...]:
        program, has_shortcut = self.program, self.program.shortcut is not None
        branch = self._raws(program.branch, self.x)
        side_input = self.x if self.residual is None else self.residual
        shortcut = self._raws(program.shortcut, side_input) if has_shortcut else []
        needs_side_input = self.needs_x if self.residual is None else self.needs_residual
        if program.shares:
            needs_side_input = needs_side_input or self._norm_needed(program.branch[0])
        needs_side = has_shortcut and (needs_side_input or self._any_needed(program.shortcut))

        grad_y, grad_side = self._join(grad, branch[-1], shortcut[-1] if has_shortcut else None, needs_side)
        if program.shares:
            return (None, self._shared_input(branch, shortcut, grad_y, grad_side, needs_side_input), None, *self.grads)
        if needs_side:
            grad_side = self._chain(program.shortcut, shortcut, grad_side, needs_side_input)
        if self.residual is not None:
            return (None, self._chain(program.branch, branch, grad_y, self.needs_x), grad_side, *self.grads)
        # Both chains read x: the branch adds its gradient to the shortcut's.
        onto = grad_side if needs_side else None
        return (None, self._chain(program.branch, branch, grad_y, self.needs_x, onto), None, *self.grads)

    def _raws(self, chain: tuple[Link, ...], x: Tensor) -> list[Raw]:
        """A chain's raw tensors as the forward had them, the last one recomputed if it was dropped."""
        inner = len(chain) - 1
        tensors = [x, *self._rest[:inner]]
        width = len(Raw._fields) - 1
        pending = self._rest[inner : inner + width * len(chain)]
        self._rest = self._rest[inner + width * len(chain) :]
        raws = [Raw(t, *pending[i * width : (i + 1) * width]) for i, t in enumerate(tensors)]
        if raws[-1].tensor is None and not _only_adds(self.program):
            value = _value(chain[-2], raws[-2], self.k)
            raws[-1] = raws[-1]._replace(tensor=_convolve(chain[-2].conv, value, self.tensors))
        return raws

    def _any_needed(self, chain: tuple[Link, ...]) -> bool:
        slots = [(link.conv, 2) for link in chain if link.conv] + [(link.norm, 2) for link in chain if link.norm]
        return any(self.needs[slot.first + i] for slot, width in slots for i in range(width))

    def _shared_input(
        self,
        branch: list[Raw],
        shortcut: list[Raw],
        grad: Tensor,
        grad_side: Tensor | None,
        needed: bool,
    ) -> Tensor | None:
        """Both chains from their last raw tensors to the pending value that both read, and from there to the input."""
        first = self.program.branch[0]
        readers = []
        for chain, raws, g in ((self.program.branch, branch, grad), (self.program.shortcut, shortcut, grad_side)):
            if len(chain) > 1 and g is not None:
                readers.append((chain[0].conv, self._chain(chain, raws, g, needs_input=True, stop=1)))
        grad_value = grad_side if len(self.program.shortcut) == 1 and needed else None
        for conv, g in readers if needed else ():
            weight = self.tensors[conv.first]
            dgrad, _ = conv_backward(g.to(weight.dtype), branch[0].tensor, weight, conv.geometry, True, False)
            grad_value = dgrad if grad_value is None else _sum_(grad_value, dgrad)
        readers = [(conv, g) for conv, g in readers if self.needs[conv.first]]
        grad_x, value = None, None
        if grad_value is not None:
            raw = branch[0]
            grad_x, _, value = self._pending(
                self.program.branch, 0, raw, raw.tensor, grad_value, first.act, emit=bool(readers)
            )
        elif readers:
            value = _value(first, branch[0], self.k)
        for conv, g in readers:
            weight = self.tensors[conv.first]
            _, self.grads[conv.first] = conv_backward(
                g.to(weight.dtype), value.to(weight.dtype), weight, conv.geometry, False, True
            )
        return grad_x if self.needs_x else None

    # -- the join, and any pending value -------------------------------------------------------------------------

    def _join(self, grad: Tensor, main: Raw, side: Raw | None, needs_side: bool) -> tuple[Tensor, Tensor | None]:
        chain, shortcut = self.program.branch, self.program.shortcut
        if _only_adds(self.program):
            return self._addition(_dense(grad), needs_side)
        act = chain[-1].act if shortcut is None else self.program.act
        y, residual = _aligned(main.tensor, None if side is None else side.tensor)
        grad_y, grad_side, _ = self._pending(
            chain, len(chain) - 1, main, y, grad, act, False, residual, side, needs_side
        )
        return grad_y, grad_side

    def _addition(self, grad: Tensor, needs_side: bool) -> tuple[Tensor, Tensor | None]:
        for chain in (self.program.branch, self.program.shortcut or IDENTITY_SHORTCUT):
            self._bias(chain, len(chain) - 1, None, None, grad)
        # An identity shortcut's gradient is added to in place, but where a pass over the input reads it.
        in_place = self.program.shares or self.program.branch[0].plain
        return grad, (grad.clone() if in_place else grad) if needs_side else None

    def _pending(
        self,
        chain: tuple[Link, ...],
        index: int,
        raw: Raw,
        y: Tensor,
        grad: Tensor,
        act: Activation,
        emit: bool,
        residual: Tensor | None = None,
        side: Raw | None = None,
        needs_side: bool = False,
        addend: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Backward of ``value = dropout(act(gain * norm(y) + norm(residual)))``: ``(dy, dresidual, value if emit)``.

        ``y`` is the tensor of ``raw``, perhaps in another dtype or layout; an ``addend`` is added to ``dy``.
        """
        link = chain[index]
        norm = link.norm
        side_chain = self.program.shortcut if side is not None else None
        side_norm = side_chain[-1].norm if side_chain else None
        side_rows = side.rows if side is not None else None
        operands = (_like(grad, y), y, raw.rows, residual, side_rows, act.code, act.param)
        modifiers = (raw.gain, link.dropout, raw.seed)
        training = norm is not None and norm.batch_statistics
        side_training = side_norm is not None and side_norm.batch_statistics
        sums, value, offset, side_dbeta = None, None, None, 0
        excites = link.gain is not None and link.gain.excite is not None
        if (
            training
            or side_training
            or emit
            or excites
            or self._sums_needed(chain, index)
            or self._side_sums_needed(side_chain)
        ):
            sums, value = self.k.join_backward_reduce(*operands, emit, *modifiers)
            if raw.gain is not None:
                sums, offset = self._behind_gain(link, raw, sums, y.shape[2] * y.shape[3])
                side_dbeta = 3
            each = sums.unbind(0)
            self._affine(norm, each, 0, 1)
            self._bias(chain, index, raw.rows, each[0], None)
            if side_chain is not None:
                self._affine(side_norm, each, side_dbeta, 2)
                self._bias(side_chain, len(side_chain) - 1, side_rows, each[side_dbeta], None)
        count = float(y.numel() // y.shape[1])
        flags = (training, side_training, residual is not None and needs_side)
        grad_y, grad_side = self.k.join_backward_apply(*operands, sums, count, *flags, *modifiers, offset, addend)
        return grad_y, grad_side, value

    def _behind_gain(self, link: Link, raw: Raw, sums: Tensor, pixels: int) -> tuple[Tensor, Tensor | None]:
        """From the sums per sample of the gradient before the gain to the totals behind it, and the squeeze's gradient.

        With ``u = scale y + shift`` the gain's gradient is the sum of ``g u``; through the excitation it reaches the
        mean of ``u`` over height and width, and so every value alike.
        """
        g, gy, gr = sums.unbind(0)
        u_sum, uy_sum, offset = raw.gain * g, raw.gain * gy, None
        if link.gain.excite is not None:
            dgain = gy
            if raw.rows is not None:
                mean, rstd, scale, shift = raw.rows.unbind(0)
                dgain = scale / rstd * gy + (scale * mean + shift) * g
            dsqueeze = self._excitation(link.gain.excite, raw, dgain if raw.mask is None else dgain * raw.mask)
            normalised = raw.means if raw.rows is None else (raw.means - mean) * rstd
            u_sum, uy_sum, offset = u_sum + dsqueeze, uy_sum + dsqueeze * normalised, dsqueeze / pixels
        return torch.stack([t.sum(0) for t in (u_sum, uy_sum, gr, g)]), offset

    def _excitation(self, slot: ExciteSlot, raw: Raw, dgate: Tensor) -> Tensor:
        """Sets the gradients of the excitation's layers and returns the squeeze's; its few values are run again."""
        with torch.enable_grad():
            squeeze = _squeeze(raw.rows, raw.means).detach().requires_grad_()
            operands = [t if t is None else t.detach() for t in self.tensors[slot.first : slot.first + 4]]
            wanted = [i for i, t in enumerate(operands) if t is not None and self.needs[slot.first + i]]
            for i in wanted:
                operands[i].requires_grad_()
            gate = _excite(slot, squeeze, operands)
        leaves = (squeeze, *(operands[i] for i in wanted))
        dsqueeze, *grads = torch.autograd.grad(gate, leaves, dgate.to(gate.dtype))
        for i, grad in zip(wanted, grads):
            self.grads[slot.first + i] = grad
        return dsqueeze

    def _sums_needed(self, chain: tuple[Link, ...], index: int) -> bool:
        norm, conv = chain[index].norm, chain[index - 1].conv if index else None
        return (norm is not None and (self.needs[norm.first] or self.needs[norm.first + 1])) or (
            conv is not None and self.needs[conv.first + 1]
        )

    def _side_sums_needed(self, chain: tuple[Link, ...] | None) -> bool:
        return chain is not None and self._sums_needed(chain, len(chain) - 1)

    def _affine(self, norm: NormSlot | None, sums: tuple[Tensor, ...], dbeta: int, dgamma: int) -> None:
        if norm is None:
            return
        if self.needs[norm.first]:
            self.grads[norm.first] = sums[dgamma]
        if self.needs[norm.first + 1]:
            self.grads[norm.first + 1] = sums[dbeta] if dgamma == 1 else sums[dbeta].clone()

    def _bias(
        self, chain: tuple[Link, ...], index: int, rows: Tensor | None, total: Tensor | None, grad: Tensor | None
    ) -> None:
        """The gradient of the bias of the convolution that made raw tensor ``index``.

        From the sum of the gradient behind the norm, which is there already, or from the raw tensor's gradient.

        A norm with batch statistics takes any constant out again, so its gradient is exactly zero.
        """
        conv = chain[index - 1].conv if index else None
        if conv is None or not self.needs[conv.first + 1]:
            return
        norm = chain[index].norm
        if norm is None:
            total = grad.sum((0, 2, 3)) if total is None else total.clone()
        else:
            total = torch.zeros_like(total) if norm.batch_statistics else total * rows[2]
        self.grads[conv.first + 1] = total

    # -- a chain of convolutions ---------------------------------------------------------------------------------

    def _chain(
        self,
        chain: tuple[Link, ...],
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
        return grad if onto is None else _sum_(onto, grad)

    def _first_link(self, chain: tuple[Link, ...], raw: Raw, grad: Tensor, onto: Tensor) -> Tensor:
        """The link that reads the block's input, whose gradient the shortcut has a part in: ``onto``."""
        if self._adds(chain[0], grad, onto):
            return self._add_link(chain[0], raw, grad, onto)
        if chain[0].plain:
            return _sum_(onto, self._link(chain, 0, raw, grad, True))
        if onto.dtype != raw.tensor.dtype:
            return onto + self._link(chain, 0, raw, grad, True)
        return self._link(chain, 0, raw, grad, True, _like(onto, raw.tensor))

    def _norm_needed(self, link: Link) -> bool:
        return link.norm is not None and (self.needs[link.norm.first] or self.needs[link.norm.first + 1])

    def _link(
        self,
        chain: tuple[Link, ...],
        index: int,
        raw: Raw,
        grad: Tensor,
        needed: bool,
        addend: Tensor | None = None,
    ) -> Tensor | None:
        """Backward of ``conv(value(raw))``: sets the weight's gradient, returns that of ``raw`` if needed.

        A link that is not plain adds the ``addend`` in the pass that writes it.
        """
        link = chain[index]
        conv, weight = link.conv, self.tensors[link.conv.first]
        grad = grad.to(weight.dtype)
        needs_weight = self.needs[conv.first] and not self._fused_wgrad(link, raw, grad)
        if link.plain or not needed:
            value = _value(link, raw, self.k).to(weight.dtype) if needs_weight else raw.tensor
            grad_raw, dweight = conv_backward(grad, value, weight, conv.geometry, needed, needs_weight)
            if needs_weight:
                self.grads[conv.first] = dweight
            if grad_raw is not None and index:
                self._bias(chain, index, None, None, grad_raw)
            return grad_raw
        # dgrad first: the pass that reduces over its result also recomputes the value that wgrad reads.
        grad_value, _ = conv_backward(grad, raw.tensor, weight, conv.geometry, True, False)
        grad_raw, _, value = self._pending(
            chain, index, raw, raw.tensor, grad_value, link.act, needs_weight, addend=addend
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
        weight = self.tensors[link.conv.first]
        return link.plain and grad.dtype == onto.dtype and adds_pointwise_dgrad(onto, grad, weight, link.conv.geometry)

    def _add_link(self, link: Link, raw: Raw, grad: Tensor, onto: Tensor) -> Tensor:
        """The first link of a chain where dgrad adds to the shortcut's gradient inside the convolution."""
        conv, weight = link.conv, self.tensors[link.conv.first]
        if self.needs[conv.first] and not self._fused_wgrad(link, raw, grad):
            _, self.grads[conv.first] = conv_backward(grad, raw.tensor, weight, conv.geometry, False, True)
        return pointwise_dgrad_add_(onto, grad, weight)


def _sum_(onto: Tensor, grad: Tensor) -> Tensor:
    """``onto + grad``, in place where dtype and layout allow."""
    return onto.add_(_like(grad, onto)) if onto.dtype == grad.dtype else onto + grad


# ---------------------------------------------------------------------------------------------------------------------
# Inference: norms, residual and activation inside the convolutions
# ---------------------------------------------------------------------------------------------------------------------


def _infer(program: Program, x: Tensor, residual: Tensor | None, tensors: Operands, folded: dict[int, Any]) -> Tensor:
    dtype = _compute_dtype(x)
    k = kernels(x.device.type, dtype, program.backend)
    x = _dense(x)
    # Without a convolution there is nothing to fold the join into; and NaN would not come out of oneDNN's ReLU.
    if len(program.branch) == 1 or (_may_swallow(x, dtype) and not _finite(k, x, residual)):
        return _forward(program, x, residual, tensors, k)[0]
    branch = program.branch
    if program.shortcut is None:
        return _infer_chain(branch, x, None, branch[-1].act, dtype, tensors, folded, k)
    if program.shares:
        x = _value(branch[0], _pend(branch[0], x, tensors, k), k)
        branch = (Link(None, IDENTITY, branch[0].conv), *branch[1:])
    side_input = x if residual is None else _dense(residual)
    side = _infer_chain(program.shortcut, side_input, None, IDENTITY, dtype, tensors, folded, k)
    if program.in_place:
        side = side.to(dtype)
    return _infer_chain(branch, x, side, program.act, dtype, tensors, folded, k)


def _may_swallow(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether oneDNN's fused convolutions, which turn NaN into 0, may run on this input."""
    return x.is_contiguous(memory_format=torch.channels_last) and onednn_refuses(x.device.type, dtype) is None


def _finite(k: SimpleNamespace, *tensors: Tensor | None) -> bool:
    return all(k.all_finite(_dense(t)) for t in tensors if t is not None)


def _infer_chain(
    chain: tuple[Link, ...],
    x: Tensor,
    side: Tensor | None,
    act: Activation,
    dtype: torch.dtype,
    tensors: Operands,
    folded: dict[int, Any],
    k: SimpleNamespace,
) -> Tensor:
    """``act(chain(x) + side)`` with constant norms."""
    first = chain[0]
    value = x if first.plain else _value(first, _pend(first, x, tensors, k), k)
    for index in range(len(chain) - 1):
        reader = chain[index + 1]
        last = index == len(chain) - 2
        value = value.to(dtype)
        conv = _folded(chain[index].conv, reader.norm, value, tensors, folded, k)
        step_act, step_side = (act, side) if last else (reader.act, None)
        if reader.gain is None and (step_side is None or step_side.dtype == dtype):
            value = conv(value, _residual_for(conv, value, step_side), step_act, k.join)
            continue
        # A gain needs the whole of the convolution's result, and a sum that promotes is none of oneDNN's: a join.
        raw = _pend(reader._replace(norm=None), conv(value, None, IDENTITY, k.join), tensors, k)
        y, other = _aligned(raw.tensor, step_side)
        of_sum = kernels(x.device.type, y.dtype, "auto") if y.dtype != dtype else k
        value = _apply_pending(reader, raw._replace(tensor=y), step_act, of_sum, other, None)
    return value


def _residual_for(conv: FoldedConv, value: Tensor, side: Tensor | None) -> Tensor | None:
    """``side`` in the layout of the convolution's result, which is the layout of its input."""
    if side is None:
        return None
    last = value.is_contiguous(memory_format=torch.channels_last)
    return side.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _folded(
    conv: ConvSlot, norm: NormSlot | None, x: Tensor, tensors: Operands, cache: dict[int, Any], k: SimpleNamespace
) -> FoldedConv:
    """The convolution with its norm folded in, made again whenever an operand, the dtype or the layout has changed."""
    weight, bias = tensors[conv.first : conv.first + 2]
    affine = () if norm is None else tuple(tensors[norm.first : norm.first + 4])
    last = x.is_contiguous(memory_format=torch.channels_last)
    operands = (weight, bias, *affine)
    key = (_identity_of(operands, k), x.dtype, last, norm.eps if norm else None, conv.geometry)
    entry = cache.get(conv.first)
    if entry is None or entry[0] != key or key[0] is None:
        rows = None if norm is None else k.bn_norm(None, 1.0, *affine, 0.0, norm.eps)
        # The operands and their memory are held on to, so that nothing else can come to lie at their addresses.
        held = [(t, t.detach()) for t in operands if t is not None]
        entry = cache[conv.first] = (key, fold(weight, bias, rows, conv.geometry, x), held)
    return entry[1]


def _identity_of(tensors: tuple[Tensor | None, ...], k: SimpleNamespace) -> tuple[Any, ...] | None:
    """What changes when a tensor is replaced or written to; ``None`` where PyTorch does not count writes.

    The count misses writes through ``.data``, for which there is a sample of the values.
    """
    present = [t for t in tensors if t is not None]
    if any(t.is_inference() for t in present):
        return None
    return k.fingerprint(present), *((t.data_ptr(), t._version) for t in present)


# ---------------------------------------------------------------------------------------------------------------------
# Stock: the same block from PyTorch's own ops
# ---------------------------------------------------------------------------------------------------------------------


def execute_stock(program: Program, x: Tensor, residual: Tensor | None, tensors: Operands) -> Tensor:
    """The block in plain PyTorch, differentiated by autograd: what a block means, and what it falls back to."""
    branch = program.branch
    if program.shares:
        x = _stock_value(branch[0], x, tensors)
        branch = (Link(None, IDENTITY, branch[0].conv), *branch[1:])
    out = _stock_chain(branch, x, tensors)
    if program.shortcut is None:
        return out
    side = _stock_chain(program.shortcut, x if residual is None else residual, tensors)
    return program.act((out + side).to(out.dtype) if program.in_place else out + side)


def _stock_chain(chain: tuple[Link, ...], x: Tensor, tensors: Operands) -> Tensor:
    for link in chain:
        x = _stock_value(link, x, tensors)
        if link.conv is not None:
            x = conv_fprop(x, tensors[link.conv.first], tensors[link.conv.first + 1], link.conv.geometry)
    return x


def _stock_value(link: Link, x: Tensor, tensors: Operands) -> Tensor:
    if link.norm is not None:
        x = _stock_norm(link.norm, x, tensors)
    if link.gain is not None:
        x = _stock_gain(link.gain, x, tensors)
    if link.act != IDENTITY:
        x = link.act(x)
    return F.dropout(x, link.dropout) if link.dropout else x


def _stock_gain(slot: GainSlot, x: Tensor, tensors: Operands) -> Tensor:
    if slot.excite is not None:
        gate = _excite(slot.excite, x.mean((2, 3)), tensors[slot.excite.first : slot.excite.first + 4])
        x = x * gate[:, :, None, None]
    mask = _survivors(x, slot.drop_path)
    return x if mask is None else x * mask[:, :, None, None].to(x.dtype)


def _stock_norm(norm: NormSlot, x: Tensor, tensors: Operands) -> Tensor:
    gamma, beta, mean, var = tensors[norm.first : norm.first + 4]
    return F.batch_norm(x, mean, var, gamma, beta, norm.batch_statistics, norm.momentum, norm.eps)
