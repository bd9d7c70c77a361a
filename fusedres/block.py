"""A residual block as data: its steps, the modules that hold their parameters, and the call that runs it.

A :class:`Block` is a small frozen description. ``fusedres.nn`` builds one directly, ``fusedres.patch`` from a user's
code; :func:`run` binds it to a module's parameters as they are at that moment and hands it to :mod:`fusedres.engine`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial, wraps
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .engine import (
    GATES,
    IDENTITY_SHORTCUT,
    ConvSlot,
    DenseProgram,
    ExciteSlot,
    GainSlot,
    Link,
    MaskSlot,
    NormSlot,
    Program,
    execute,
    execute_dense,
    group_of,
    is_constant,
)
from .engine.verdict import judged
from .mask import mask_of
from .ops.activations import IDENTITY, RELU, Activation
from .ops.conv import geometry
from .select import by_measurement, too_small
from .walk import Op, activated, walk

__all__ = [
    "Act",
    "Block",
    "Conv",
    "Dense",
    "DropPath",
    "Dropout",
    "Mask",
    "Norm",
    "SqueezeExcite",
    "Step",
    "dense_plans",
    "idle_in_training",
    "link_plans",
    "measured_backends",
    "run",
    "run_dense",
    "runs_modules",
    "unsupported",
]


# ---------------------------------------------------------------------------------------------------------------------
# A block as data
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conv:
    """The convolution held by the ``nn.Conv2d`` at ``path`` below the block's module.

    Args:
        bare: whether it is the convolution alone of a subclass whose forward does more, such as padding: what else that
            does is no part of the block.
    """

    path: str
    bare: bool = False


@dataclass(frozen=True)
class Norm:
    """The batch norm held by the ``nn.BatchNorm2d`` or ``nn.SyncBatchNorm`` at ``path``.

    Args:
        act: what the module itself applies behind it, as timm's ``BatchNormAct2d`` does; identity for plain norms.
    """

    path: str
    act: Activation = IDENTITY


@dataclass(frozen=True)
class Act:
    """An elementwise activation."""

    activation: Activation


@dataclass(frozen=True)
class Dropout:
    """The elementwise dropout held by the ``nn.Dropout`` at ``path``.

    Args:
        p: the probability where it is a function that drops, ``F.dropout(x, p, self.training)``: then ``path`` is that
            of the module whose mode it asks for.
    """

    path: str
    p: float | None = None


@dataclass(frozen=True)
class SqueezeExcite:
    """A gate per sample and channel, ``x * gate(fc2(act(fc1(mean(x)))))`` (Hu et al. 2018, eq. 2 to 4).

    Args:
        fc1, fc2: paths of the two layers, each an ``nn.Conv2d`` of kernel size 1 or an ``nn.Linear``.
        act: between them.
        gate: a key of :data:`fusedres.engine.GATES`.
    """

    fc1: str
    fc2: str
    act: Activation = RELU
    gate: str = "sigmoid"


@dataclass(frozen=True)
class DropPath:
    """Stochastic depth by the module at ``path``: in training, samples are dropped with its probability.

    That is its ``p``, as in torchvision's ``StochasticDepth``, or its ``drop_prob``, as in timm's ``DropPath``.
    """

    path: str


@dataclass(frozen=True)
class Mask:
    """Factors by chance that the module at ``path`` draws in training, in its own way: see :mod:`fusedres.mask`.

    Args:
        channels: whether they are those of a dropout of channels, ``nn.Dropout2d``, rather than one per sample.
        p: the probability where it is a function that drops channels, ``F.dropout2d(x, p, self.training)``: then
            ``path`` is that of the module whose mode it asks for.
    """

    path: str
    channels: bool = False
    p: float | None = None


Step = Conv | Norm | Act | Dropout | SqueezeExcite | DropPath | Mask


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
        object.__setattr__(self, "_hash", hash(self._fields()))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type, tuple]:
        """Without the hash, which another process makes another one, and without what :func:`_once` keeps."""
        return Block, self._fields()

    def _fields(self) -> tuple:
        return self.branch, self.shortcut, self.act, self.residual, self.in_place


@dataclass(frozen=True)
class Dense:
    """A dense block: every layer reads the channels of the input and of all layers before it, and appends its own.

    Args:
        layers: the steps of each, which begin with a norm and end with a convolution, or a dropout behind it.
    """

    layers: tuple[tuple[Step, ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash(self.layers))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type, tuple]:
        """As for :class:`Block`."""
        return Dense, (self.layers,)


def _once(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Keeps the result on the block: looked up in a cache, it would be compared with the block that came there first.

    Raises again what ``make`` raises.
    """
    name = f"_{make.__name__}"

    @wraps(make)
    def once(block: Block | Dense) -> Any:
        found = block.__dict__.get(name)
        if found is None:
            found = make(block)
            object.__setattr__(block, name, found)
        return found

    return once


class _LinkPlan(NamedTuple):
    """A :class:`~fusedres.engine.Link` with the modules' paths, split, in the place of operands."""

    norm: tuple[str, ...] | None = None
    act: Activation = IDENTITY
    conv: tuple[str, ...] | None = None
    excite: SqueezeExcite | None = None
    drop_path: tuple[str, ...] | None = None
    mask: Mask | None = None
    dropout: tuple[str, ...] | None = None
    dropout_p: float | None = None
    bare: bool = False
    gains: bool = False

    @property
    def chance(self) -> bool:
        """Whether there are factors by chance."""
        return self.drop_path is not None or self.mask is not None


class _Plan(NamedTuple):
    branch: tuple[_LinkPlan, ...]
    shortcut: tuple[_LinkPlan, ...] | None
    shares: bool = False


class UnsupportedBlock(ValueError):
    """A sequence of steps that the engine cannot express."""


def unsupported(block: Block | Dense) -> str | None:
    """``None`` where the engine can run this block, else why not, in words."""
    try:
        link_plans(block) if isinstance(block, Block) else dense_plans(block)
    except UnsupportedBlock as error:
        return str(error)
    return None


@_once
def link_plans(block: Block) -> _Plan:
    """The steps grouped into links; raises :class:`UnsupportedBlock` where the engine cannot express them."""
    if block.shortcut is None:
        if block.act != IDENTITY:
            raise UnsupportedBlock("an activation after the join needs a join")
        return _Plan(_links(block.branch), None)
    branch, shortcut = _links(block.branch), _links(block.shortcut)
    for name, chain in (("branch", branch), ("shortcut", shortcut)):
        if chain[-1].act != IDENTITY:
            raise UnsupportedBlock(f"the {name} ends with an activation before the addition")
        if chain[-1].dropout is not None:
            raise UnsupportedBlock(f"the {name} ends with a dropout before the addition")
    if any(link.excite is not None or link.chance for link in shortcut):
        raise UnsupportedBlock("the shortcut has a gain, squeeze-excitation or stochastic depth")
    if len(shortcut) == 1 and shortcut[0].norm is not None:
        raise UnsupportedBlock("the shortcut is a norm without a convolution")
    shares = block.residual == "pending" and branch[0]._replace(conv=None, bare=False) != _LinkPlan()
    if shares and branch[0].conv is None:
        raise UnsupportedBlock("a shortcut from the branch's first value needs a convolution in the branch")
    if shares and shortcut[0]._replace(conv=None, bare=False) != _LinkPlan():
        raise UnsupportedBlock("a shortcut from the branch's first value begins with a norm or an activation")
    return _Plan(branch, shortcut, shares)


@_once
def dense_plans(dense: Dense) -> tuple[tuple[_LinkPlan, ...], ...]:
    """Every layer's steps grouped into links; raises as :func:`link_plans` does."""
    layers = tuple(_links(layer) for layer in dense.layers)
    for layer in layers:
        if len(layer) < 2 or layer[0].norm is None:
            raise UnsupportedBlock("a layer that does not begin with a norm and go on to a convolution")
        if layer[-1]._replace(dropout=None, dropout_p=None) != _LinkPlan():
            raise UnsupportedBlock("a layer that does not end with its convolution, or a dropout behind it")
    return layers


def _links(steps: tuple[Step, ...]) -> tuple[_LinkPlan, ...]:
    """Groups steps into links, each ``[norm] [excitation] [stochastic depth] [activation] [dropout] [convolution]``.

    A dropout of channels takes the place of stochastic depth, also from behind a ReLU, through which its factors pass.
    An excitation behind an activation begins a link of its own: it needs the mean of what the activation made.
    """
    links: list[_LinkPlan] = []
    link = _LinkPlan()
    for step in steps:
        if isinstance(step, SqueezeExcite) and link.act != IDENTITY and link.dropout is None:
            links.append(link)
            link = _LinkPlan()
        link = _with_step(link, step)
        if link.conv is not None:
            links.append(link)
            link = _LinkPlan()
    return (*links, link)


# act(g * z) = g * act(z) where g is not negative.
_HOMOGENEOUS = (IDENTITY.name, RELU.name, "leaky_relu")


def _with_step(link: _LinkPlan, step: Step) -> _LinkPlan:
    """``link`` with one more step, which has to come behind those that it has."""
    if isinstance(step, Conv):
        return link._replace(conv=_names(step.path), bare=step.bare)
    if link.dropout is not None:
        raise UnsupportedBlock("a dropout that no convolution follows")
    if isinstance(step, Dropout):
        return link._replace(dropout=_names(step.path), dropout_p=step.p)
    if isinstance(step, Act):
        if link.act != IDENTITY:
            raise UnsupportedBlock("two activations in a row")
        return link._replace(act=step.activation)
    if isinstance(step, Norm):
        if link != _LinkPlan():
            raise UnsupportedBlock("a norm that follows a norm or an activation, without a convolution between")
        return link._replace(norm=_names(step.path), act=step.act)
    passes = isinstance(step, Mask) and step.channels and link.act.name in _HOMOGENEOUS
    if (link.act != IDENTITY and not passes) or link.chance:
        raise UnsupportedBlock("a gain that follows an activation or another gain")
    link = link._replace(gains=True)
    if isinstance(step, DropPath):
        return link._replace(drop_path=_names(step.path))
    if isinstance(step, Mask):
        if step.channels and link.excite is not None:
            raise UnsupportedBlock("a dropout of channels that follows an excitation")
        return link._replace(mask=step)
    if link.excite is not None:
        raise UnsupportedBlock("two excitations in a row")
    return link._replace(excite=step)


# ---------------------------------------------------------------------------------------------------------------------
# Running a block on a module
# ---------------------------------------------------------------------------------------------------------------------


# Folded and packed weights, per module and block. Not on the module, where copies and pickles would meet them.
_FOLDED: WeakKeyDictionary[nn.Module, dict[Block | Dense, dict[int, Any]]] = WeakKeyDictionary()


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
    if not (_engine_takes(x) and (residual is None or _engine_takes(residual))):
        return _call_modules(block, root, x, residual)
    mode = "training" if torch.is_grad_enabled() else "inference"
    # Asked here too, before the work of binding.
    small = memory != "low" and too_small(x.numel(), mode, backend)
    if small and not by_measurement(x.device.type) and not _synchronised(block, root):
        return _walk(block, root, x, residual)
    plan = link_plans(block)
    if mode == "training" and not by_measurement(x.device.type) and idle_in_training(block):
        return _walk(block, root, x, residual)
    binder = _Binder(root)
    try:
        branch, shortcut = binder.chains(plan)
    except _NotOurs:
        return _call_modules(block, root, x, residual)
    if not binder.suits(x):
        return _call_modules(block, root, x, residual)
    binder.count_batch()
    program = Program(branch, shortcut, block.act, block.in_place, memory, backend, plan.shares)
    return execute(program, x, residual, binder.tensors, _folded(root, block, program.constant))


@_once
def idle_in_training(block: Block) -> bool:
    """Whether the block is convolutions with ReLUs, or one with another activation: training has no pass to save there.

    Stock PyTorch keeps the activation's result alone, written over what the convolution made. The engine keeps both,
    and takes a pass of its own for the bias's gradient, which stock's convolution yields beside the weight's. (Where
    convolutions have prologues of their own, a measurement decides.)
    """
    first, *rest = block.branch
    if block.shortcut is not None or not isinstance(first, Conv):
        return False
    alone = all(isinstance(step, Act) for step in rest)
    return alone or all(isinstance(step, Conv) or step == Act(RELU) for step in rest)


def run_dense(dense: Dense, root: nn.Module, x: Tensor, *, backend: str = "auto", memory: str = "auto") -> Tensor:
    """Runs a dense block; as :func:`run`, with a result of ``x``'s channels and all layers'."""
    if not _engine_takes(x):
        return _call_layers(dense, root, x)
    binder = _Binder(root)
    try:
        layers = tuple(map(binder.chain, dense_plans(dense)))
    except _NotOurs:
        return _call_layers(dense, root, x)
    if not binder.suits(x):
        return _call_layers(dense, root, x)
    binder.count_batch()
    program = DenseProgram(layers, memory, backend)
    return execute_dense(program, x, binder.tensors, _folded(root, dense, is_constant(program.links)))


def measured_backends(block: Block | Dense, root: nn.Module, device: torch.device) -> str:
    """What runs a block on a device where measurements decide: the backends that won, by shape, or stock."""
    binder = _Binder(root)
    try:
        program = _bound(block, binder)
    except _NotOurs:
        return "stock"
    found = judged(program, binder.tensors, device)
    return " or ".join(sorted(found, key=lambda name: name == "stock")) or "stock, until fusedres.tune has measured it"


def _bound(block: Block | Dense, binder: _Binder) -> Program | DenseProgram:
    if isinstance(block, Dense):
        return DenseProgram(tuple(map(binder.chain, dense_plans(block))))
    plan = link_plans(block)
    branch, shortcut = binder.chains(plan)
    return Program(branch, shortcut, block.act, block.in_place, shares=plan.shares)


def _folded(root: nn.Module, block: Block | Dense, constant: bool) -> dict[int, Any] | None:
    """Where the block's folded weights are kept."""
    if constant:
        return _FOLDED.setdefault(root, {}).setdefault(block, {})
    _FOLDED.pop(root, None)  # training writes to the weights at every step: nothing folded stays true
    return None


def runs_modules() -> bool:
    """Whether something wants to see modules: a compiler, an exporter, a tracer, a hook on all of them."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or _has_any_global_hook()


def _engine_takes(x: Tensor) -> bool:
    if runs_modules():
        return False
    plain = type(x) is Tensor and x.dim() == 4 and x.is_floating_point()
    return plain and not torch._C._are_functorch_transforms_active()


def _synchronised(block: Block, root: nn.Module) -> bool:
    """Whether a norm may share its statistics with other processes, which then all have to do the same."""
    if group_of(None) is None:
        return False
    norms = (step for step in (*block.branch, *(block.shortcut or ())) if isinstance(step, Norm))
    return any(isinstance(_module(root, _names(norm.path)), nn.SyncBatchNorm) for norm in norms)


class _NotOurs(Exception):
    """A module that does more, or other, than the convolution or batch norm that the block was described with."""


def _call_modules(block: Block, root: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
    """The block by calling its modules one after the other."""
    head = _head(block)
    start = _call_steps(block.branch[:head], root, x)
    out = _call_steps(block.branch[head:], root, start)
    if block.shortcut is None:
        return out
    side = _call_steps(block.shortcut, root, start if residual is None else residual)
    return block.act(out.add_(side) if block.in_place else out + side)


def _walk(block: Block, root: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
    """The block by the functions of its modules; the same ops as :func:`_call_modules`."""
    head, branch, shortcut = _ops(block)
    start = walk(head, root, x)[0] if head else x
    out, ours = walk(branch, root, start)
    if shortcut is None:
        return out
    side = walk(shortcut, root, start if residual is None else residual)[0]
    if block.in_place:
        return activated(block.act, out.add_(side), ours)[0]
    return activated(block.act, out + side, True)[0]


@_once
def _ops(block: Block) -> tuple[tuple[Op, ...], tuple[Op, ...], tuple[Op, ...] | None]:
    """What comes before the branch and the shortcut part, the branch, the shortcut."""
    steps = tuple(map(_op, block.branch))
    shortcut = None if block.shortcut is None else tuple(map(_op, block.shortcut))
    return steps[: _head(block)], steps[_head(block) :], shortcut


def _op(step: Step) -> Op:
    if isinstance(step, Act):
        return Op(act=step.activation)
    if isinstance(step, Norm) or (isinstance(step, Conv) and not step.bare):
        return Op(nn.Conv2d if isinstance(step, Conv) else nn.BatchNorm2d, _names(step.path))
    return Op(other=partial(_call_step, step))


def _head(block: Block) -> int:
    """How many steps of the branch come before what the shortcut reads."""
    return next(i for i, s in enumerate(block.branch) if isinstance(s, Conv)) if block.residual == "pending" else 0


def _call_layers(dense: Dense, root: nn.Module, x: Tensor) -> Tensor:
    """The dense block by calling its modules one after the other."""
    features = [x]
    for layer in dense.layers:
        features.append(_call_steps(layer, root, torch.cat(features, 1)))
    return torch.cat(features, 1)


def _call_steps(steps: tuple[Step, ...], root: nn.Module, value: Tensor) -> Tensor:
    for step in steps:
        value = _call_step(step, root, value)
    return value


def _call_step(step: Step, root: nn.Module, value: Tensor) -> Tensor:
    if isinstance(step, Act):
        return step.activation(value)
    if not isinstance(step, SqueezeExcite):
        module = _module(root, step.path.split(".") if step.path else ())  # no cache: compilers trace this
        if isinstance(step, Conv) and step.bare:
            geometry = module.stride, module.padding, module.dilation, module.groups
            return F.conv2d(value, module.weight, module.bias, *geometry)
        if isinstance(step, (Dropout, Mask)) and step.p is not None:
            return (F.dropout if isinstance(step, Dropout) else F.dropout2d)(value, step.p, module.training)
        return module(value)
    fc1, fc2 = (_module(root, path.split(".")) for path in (step.fc1, step.fc2))
    squeezed = value.mean((2, 3), keepdim=isinstance(fc1, nn.Conv2d))
    gate = GATES[step.gate](fc2(step.act(fc1(squeezed))))
    return value * gate.view(*gate.shape[:2], 1, 1)


@cache
def _names(path: str) -> tuple[str, ...]:
    return tuple(path.split(".")) if path else ()


def _module(root: nn.Module, names: Sequence[str]) -> nn.Module:
    for name in names:
        root = root._modules[name]
    return root


def _check_unhooked(module: nn.Module) -> None:
    """Raises :class:`_NotOurs` where calling ``module`` does more than its class's forward."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        raise _NotOurs
    if "forward" in module.__dict__:
        raise _NotOurs


def _check_ours(module: nn.Module, kind: type[nn.Module]) -> None:
    """Raises :class:`_NotOurs` unless calling ``module`` is nothing but ``kind``'s forward on its own parameters."""
    _check_unhooked(module)
    if type(module).forward is not kind.forward or "weight" not in module._parameters:
        raise _NotOurs


@cache
def is_norm_act(cls: type[nn.Module]) -> bool:
    """Whether instances are a batch norm and its activation in one module, timm's ``BatchNormAct2d`` or its twin."""
    forward = cls.forward
    names = ("BatchNormAct2d.forward", "SyncBatchNormAct.forward")
    return forward.__module__ == "timm.layers.norm_act" and forward.__qualname__ in names


_ORDINARY = (Tensor, nn.Parameter)


class _Binder:
    """Collects the operands of a block from its modules, in one flat list, and the slots that point into it."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.tensors: list[Tensor | None] = []
        self.weights: list[Tensor] = []
        self.counters: list[Tensor] = []

    def suits(self, x: Tensor) -> bool:
        """Whether the operands are ordinary tensors that stock PyTorch would run with ``x``."""
        device, dtype = x.device, x.dtype
        for t in self.tensors:
            if t is not None and (type(t) not in _ORDINARY or t.device != device):
                return False
        for w in self.weights:
            if w.dtype != dtype:
                return torch.is_autocast_enabled(device.type)
        return True

    def count_batch(self) -> None:
        """Counts this batch in the norms that count batches; the last thing before it runs."""
        for counter in self.counters:
            counter.add_(1)

    def chains(self, plan: _Plan) -> tuple[tuple[Link, ...], tuple[Link, ...] | None]:
        """The branch, and the shortcut if there is a join."""
        branch = self.chain(plan.branch)
        if plan.shortcut is None:
            return branch, None
        return branch, IDENTITY_SHORTCUT if len(plan.shortcut) == 1 else self.chain(plan.shortcut)

    def chain(self, plans: tuple[_LinkPlan, ...]) -> tuple[Link, ...]:
        return tuple(
            Link(
                None if plan.norm is None else self._norm(_module(self.root, plan.norm)),
                plan.act,
                None if plan.conv is None else self._conv(_module(self.root, plan.conv), plan.bare),
                self._gain(plan) if plan.gains else None,
                0.0 if plan.dropout is None else self._dropout(_module(self.root, plan.dropout), plan.dropout_p),
            )
            for plan in plans
        )

    def _conv(self, conv: nn.Module, bare: bool) -> ConvSlot:
        _check_ours(conv, type(conv) if bare else nn.Conv2d)
        first = len(self.tensors)
        state = conv.__dict__
        if state["padding_mode"] != "zeros":
            raise _NotOurs
        parameters = state["_parameters"]
        weight = parameters["weight"]
        self.tensors += (weight, parameters["bias"])
        self.weights.append(weight)
        try:
            of_conv = geometry(state["stride"], state["padding"], state["dilation"], state["groups"], weight.shape[2:])
        except (TypeError, ValueError):  # uneven padding="same", or settings of other types than a constructor leaves
            raise _NotOurs from None
        return ConvSlot(first, of_conv)

    def _norm(self, norm: nn.Module) -> NormSlot:
        synchronised = isinstance(norm, nn.SyncBatchNorm)
        plain = nn.SyncBatchNorm if synchronised else nn.BatchNorm2d
        _check_ours(norm, type(norm) if is_norm_act(type(norm)) else plain)
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
        group = group_of(norm.process_group) if synchronised and norm.training else None
        return NormSlot(first, batch_statistics, momentum, norm.eps, group)

    def _gain(self, plan: _LinkPlan) -> GainSlot | None:
        drop_path = 0.0 if plan.drop_path is None else self._drop_path(_module(self.root, plan.drop_path))
        excite = None if plan.excite is None else self._excite(plan.excite)
        mask = None if plan.mask is None else self._mask(plan.mask)
        found = excite is not None or drop_path or mask is not None
        return GainSlot(excite, drop_path, mask) if found else None

    def _excite(self, step: SqueezeExcite) -> ExciteSlot:
        first = len(self.tensors)
        for path in (step.fc1, step.fc2):
            layer = _module(self.root, _names(path))
            _check_ours(layer, nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear)
            parameters = layer._parameters
            self.tensors += (parameters["weight"], parameters["bias"])
            self.weights.append(parameters["weight"])
        return ExciteSlot(first, step.act, step.gate)

    def _dropout(self, module: nn.Module, p: float | None) -> float:
        if p is not None:
            return p if module.training else 0.0
        _check_unhooked(module)
        if type(module).forward is not nn.Dropout.forward:
            raise _NotOurs
        return float(module.p) if module.training else 0.0

    def _drop_path(self, module: nn.Module) -> float:
        _check_unhooked(module)
        settings = module.__dict__
        if settings.get("mode", "row") != "row" or not settings.get("scale_by_keep", True):
            raise _NotOurs
        return float(settings["p"] if "p" in settings else settings["drop_prob"]) if module.training else 0.0

    def _mask(self, step: Mask) -> MaskSlot | None:
        module = _module(self.root, _names(step.path))
        if step.p is not None:
            return MaskSlot(None, step.p, True, 1.0) if module.training and step.p else None
        _check_unhooked(module)
        found = mask_of(module)
        if found is None or found.channels != step.channels:
            raise _NotOurs
        return MaskSlot(ref(module), 0.0, found.channels, found.number) if module.training else None
