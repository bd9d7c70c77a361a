"""A residual block as data: its steps, the modules that hold their parameters, and the call that runs it.

A :class:`Block` is a small frozen description. ``fusedres.nn`` builds one directly, ``fusedres.patch`` from a user's
code; :func:`run` binds it to a module's parameters as they are at that moment and hands it to :mod:`fusedres.engine`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .engine import IDENTITY_SHORTCUT, ConvSlot, Link, NormSlot, Program, execute
from .ops.activations import IDENTITY, RELU, Activation
from .ops.conv import geometry
from .select import too_small

__all__ = [
    "Act",
    "Block",
    "Conv",
    "DropPath",
    "Dropout",
    "Norm",
    "SqueezeExcite",
    "Step",
    "link_plans",
    "run",
    "unsupported",
]


# ---------------------------------------------------------------------------------------------------------------------
# A block as data
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conv:
    """The convolution held by the ``nn.Conv2d`` at ``path`` below the block's module."""

    path: str


@dataclass(frozen=True)
class Norm:
    """The batch norm held by the ``nn.BatchNorm2d`` at ``path``."""

    path: str


@dataclass(frozen=True)
class Act:
    """An elementwise activation."""

    activation: Activation


@dataclass(frozen=True)
class Dropout:
    """The elementwise dropout held by the ``nn.Dropout`` at ``path``."""

    path: str


@dataclass(frozen=True)
class SqueezeExcite:
    """A gate per sample and channel, ``x * gate(fc2(act(fc1(mean(x)))))`` (Hu et al. 2018, eq. 2 to 4).

    Args:
        fc1, fc2: paths of the two layers, each an ``nn.Conv2d`` of kernel size 1 or an ``nn.Linear``.
        act: between them.
        gate: ``"sigmoid"`` or ``"hardsigmoid"``.
    """

    fc1: str
    fc2: str
    act: Activation = RELU
    gate: str = "sigmoid"


GATES = {"sigmoid": torch.sigmoid, "hardsigmoid": torch.nn.functional.hardsigmoid}


@dataclass(frozen=True)
class DropPath:
    """Stochastic depth by the module at ``path``: in training, samples are dropped with its probability ``p``."""

    path: str


Step = Conv | Norm | Act | Dropout | SqueezeExcite | DropPath


@dataclass(frozen=True)
class Block:
    """A block: ``act(branch(x) + shortcut(r))``, or ``branch(x)`` where there is no join.

    Args:
        branch: the steps from the input to the join (or to the output), in the order in which they run.
        shortcut: ``None`` for no join, ``()`` for an identity shortcut, otherwise the steps of the projection.
        act: the activation after the join; identity without a join (an activation is then the branch's last step).
        residual: what the shortcut reads: ``"input"``, the block's own input; ``"argument"``, a second tensor that the
            caller passes; or ``"pending"``, the input behind the norm and activation with which the branch begins.
        in_place: whether the join is ``branch += shortcut``, whose result has the branch's dtype, rather than
            ``branch + shortcut``, whose result has the common one. They differ under autocast.
    """

    branch: tuple[Step, ...]
    shortcut: tuple[Step, ...] | None = None
    act: Activation = IDENTITY
    residual: str = "input"
    in_place: bool = False

    def __post_init__(self) -> None:
        # Blocks are looked up in every call.
        parts = (self.branch, self.shortcut, self.act, self.residual, self.in_place)
        object.__setattr__(self, "_hash", hash(parts))

    def __hash__(self) -> int:
        return self._hash


class _LinkPlan(NamedTuple):
    """A :class:`~fusedres.engine.Link` with the modules' paths, split, in the place of operands."""

    norm: tuple[str, ...] | None
    act: Activation
    conv: tuple[str, ...] | None


class _Plan(NamedTuple):
    branch: tuple[_LinkPlan, ...]
    shortcut: tuple[_LinkPlan, ...] | None


class UnsupportedBlock(ValueError):
    """A sequence of steps that the engine cannot express."""


def unsupported(block: Block) -> str | None:
    """``None`` where the engine can run this block, else why not, in words."""
    try:
        link_plans(block)
    except UnsupportedBlock as error:
        return str(error)
    return None


@cache
def link_plans(block: Block) -> _Plan:
    """The steps grouped into links; raises :class:`UnsupportedBlock` where the engine cannot express them."""
    if block.shortcut is None:
        if block.act != IDENTITY:
            raise UnsupportedBlock("an activation after the join needs a join")
        return _Plan(_links(block.branch), None)
    plan = _Plan(_links(block.branch), _links(block.shortcut))
    for name, chain in (("branch", plan.branch), ("shortcut", plan.shortcut)):
        if chain[-1].act != IDENTITY:
            raise UnsupportedBlock(f"the {name} ends with an activation before the addition")
    if len(plan.shortcut) == 1 and plan.shortcut[0].norm is not None:
        raise UnsupportedBlock("the shortcut is a norm without a convolution")
    return plan


def _links(steps: tuple[Step, ...]) -> tuple[_LinkPlan, ...]:
    """Groups steps into links, each ``[norm] [activation] [convolution]``."""
    links: list[_LinkPlan] = []
    norm: tuple[str, ...] | None = None
    act = IDENTITY
    for step in steps:
        if isinstance(step, Conv):
            links.append(_LinkPlan(norm, act, _names(step.path)))
            norm, act = None, IDENTITY
        elif isinstance(step, Norm):
            if norm is not None or act != IDENTITY:
                raise UnsupportedBlock("a norm that follows a norm or an activation, without a convolution between")
            norm = _names(step.path)
        elif isinstance(step, Act):
            if act != IDENTITY:
                raise UnsupportedBlock("two activations in a row")
            act = step.activation
        else:
            raise UnsupportedBlock(f"a {type(step).__name__}")
    return (*links, _LinkPlan(norm, act, None))


# ---------------------------------------------------------------------------------------------------------------------
# Running a block on a module
# ---------------------------------------------------------------------------------------------------------------------


# Folded and packed weights, per module and block. Not on the module, where copies and pickles would meet them.
_FOLDED: WeakKeyDictionary[nn.Module, dict[Block, dict[int, Any]]] = WeakKeyDictionary()


def run(
    block: Block,
    root: nn.Module,
    x: Tensor,
    residual: Tensor | None = None,
    *,
    backend: str = "auto",
    memory: str = "auto",
) -> Tensor:
    """Runs ``block`` with the parameters, buffers and settings that the modules below ``root`` have now.

    Args:
        x: ``[N, C, H, W]``.
        residual: the join's second operand where the block reads it from an argument.
        backend: the backend to force, or ``"auto"``.
        memory: ``"low"`` recomputes in backward what is cheap to recompute.

    An input that the engine does not take runs as stock PyTorch, and raises what stock PyTorch raises. A module that
    has been replaced, hooked or reparametrized since the block was described is called, as stock PyTorch would.
    """
    if unsupported(block) is not None or block.residual == "pending":
        return _call_modules(block, root, x, residual)
    plan = link_plans(block)
    if not (_engine_takes(x) and (residual is None or _engine_takes(residual))):
        return _call_modules(block, root, x, residual)
    mode = "training" if torch.is_grad_enabled() else "inference"
    if memory != "low" and too_small(x, mode, backend):  # asked here too, before the work of binding
        return _call_modules(block, root, x, residual)
    binder = _Binder(root)
    try:
        branch = binder.chain(plan.branch)
        if plan.shortcut is None:
            shortcut = None
        else:
            shortcut = IDENTITY_SHORTCUT if len(plan.shortcut) == 1 else binder.chain(plan.shortcut)
    except _NotOurs:
        return _call_modules(block, root, x, residual)
    if not binder.suits(x):
        return _call_modules(block, root, x, residual)
    binder.count_batch()
    program = Program(branch, shortcut, block.act, block.in_place, memory, backend)
    if not program.constant:
        _FOLDED.pop(root, None)  # training writes to the weights at every step: nothing folded stays true
        return execute(program, x, residual, binder.tensors)
    folded = _FOLDED.setdefault(root, {}).setdefault(block, {})
    return execute(program, x, residual, binder.tensors, folded)


def _engine_takes(x: Tensor) -> bool:
    plain = type(x) is Tensor and x.dim() == 4 and x.is_floating_point()
    return plain and not torch._C._are_functorch_transforms_active()


class _NotOurs(Exception):
    """A module that does more, or other, than the convolution or batch norm that the block was described with."""


def _call_modules(block: Block, root: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
    """The block by calling its modules one after the other."""

    def through(steps: tuple[Step, ...], value: Tensor) -> Tensor:
        for step in steps:
            value = _call_step(step, root, value)
        return value

    head = next(i for i, s in enumerate(block.branch) if isinstance(s, Conv)) if block.residual == "pending" else 0
    start = through(block.branch[:head], x)
    out = through(block.branch[head:], start)
    if block.shortcut is None:
        return out
    side = through(block.shortcut, start if residual is None else residual)
    return block.act(out.add_(side) if block.in_place else out + side)


def _call_step(step: Step, root: nn.Module, value: Tensor) -> Tensor:
    if isinstance(step, Act):
        return step.activation(value)
    if not isinstance(step, SqueezeExcite):
        return _module(root, _names(step.path))(value)
    fc1, fc2 = (_module(root, _names(path)) for path in (step.fc1, step.fc2))
    squeezed = value.mean((2, 3), keepdim=isinstance(fc1, nn.Conv2d))
    gate = GATES[step.gate](fc2(step.act(fc1(squeezed))))
    return value * gate.view(*gate.shape[:2], 1, 1)


@cache
def _names(path: str) -> tuple[str, ...]:
    return tuple(path.split("."))


def _module(root: nn.Module, names: tuple[str, ...]) -> nn.Module:
    for name in names:
        root = root._modules[name]
    return root


def _check_ours(module: nn.Module, kind: type[nn.Module]) -> None:
    """Raises :class:`_NotOurs` unless calling ``module`` is nothing but ``kind``'s forward on its own parameters."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    if hooked or type(module).forward is not kind.forward or "weight" not in module._parameters:
        raise _NotOurs


class _Binder:
    """Collects the operands of a block from its modules, in one flat list, and the slots that point into it."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.tensors: list[Tensor | None] = []
        self.weights: list[Tensor] = []
        self.counters: list[Tensor] = []

    def suits(self, x: Tensor) -> bool:
        """Whether the operands' devices and dtypes are such that stock PyTorch would run them with ``x``."""
        if not all(t is None or t.device == x.device for t in self.tensors):
            return False
        return all(w.dtype == x.dtype for w in self.weights) or torch.is_autocast_enabled(x.device.type)

    def count_batch(self) -> None:
        """Counts this batch in the norms that count batches; the last thing before it runs."""
        for counter in self.counters:
            counter.add_(1)

    def chain(self, plans: tuple[_LinkPlan, ...]) -> tuple[Link, ...]:
        return tuple(
            Link(
                None if plan.norm is None else self._norm(_module(self.root, plan.norm)),
                plan.act,
                None if plan.conv is None else self._conv(_module(self.root, plan.conv)),
            )
            for plan in plans
        )

    def _conv(self, conv: nn.Module) -> ConvSlot:
        _check_ours(conv, nn.Conv2d)
        first = len(self.tensors)
        parameters = conv._parameters
        self.tensors += (parameters["weight"], parameters["bias"])
        self.weights.append(parameters["weight"])
        return ConvSlot(first, geometry(conv.stride, conv.padding, conv.dilation, conv.groups, conv.kernel_size))

    def _norm(self, norm: nn.Module) -> NormSlot:
        _check_ours(norm, nn.BatchNorm2d)
        first = len(self.tensors)
        parameters, buffers = norm._parameters, norm._buffers
        mean, var = buffers["running_mean"], buffers["running_var"]
        batch_statistics = norm.training or (mean is None and var is None)
        updates = norm.training and norm.track_running_stats
        momentum = 0.0 if norm.momentum is None else norm.momentum
        if updates and buffers["num_batches_tracked"] is not None:
            self.counters.append(buffers["num_batches_tracked"])
            if norm.momentum is None:  # the running statistics are the average over all batches, this one included
                momentum = 1.0 / (float(buffers["num_batches_tracked"]) + 1.0)
        if batch_statistics and not updates:
            mean, var = None, None
        self.tensors += (parameters["weight"], parameters["bias"], mean, var)
        return NormSlot(first, batch_statistics, momentum, norm.eps)
