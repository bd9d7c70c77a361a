"""A residual block as data: its steps, the modules that hold their parameters, and the call that runs it.

A :class:`Block` is a small frozen description. ``fusedres.nn`` builds one directly, ``fusedres.patch`` from a user's
code; :func:`run` binds it to a module's parameters as they are at that moment and hands it to :mod:`fusedres.engine`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from . import graphs
from .binding import Binder, NotOurs, folded_weights, module_at, names_of
from .engine import GATES, DenseProgram, Program, execute, execute_dense, group_of, is_constant
from .engine.verdict import judged
from .ops.activations import IDENTITY, RELU, Activation
from .ops.join_pool import PoolWindow
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
    "Pool",
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


@dataclass(frozen=True)
class Pool:
    """The max pooling by the ``nn.MaxPool2d`` at ``path``, which ends a block.

    Args:
        window: what it is where it is a function that pools, ``F.max_pool2d(x, 3, 2, 1)``: then there is no ``path``.
    """

    path: str = ""
    window: PoolWindow | None = None


Step = Conv | Norm | Act | Dropout | SqueezeExcite | DropPath | Mask | Pool


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
        # Here, so that compilers, which follow what a call does, find it done.
        unsupported(self)
        idle_in_training(self)

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type, tuple]:
        """Without the hash, which another process makes another one, and without what :func:`_once` keeps."""
        return Block, self._fields()

    def _fields(self) -> tuple:
        return self.branch, self.shortcut, self.act, self.residual, self.in_place

    @property
    def plans(self) -> tuple[LinkPlan, ...]:
        """The links of both chains; raises as :func:`link_plans` does."""
        plan = link_plans(self)
        return (*plan.branch, *(plan.shortcut or ()))

    def bound(self, binder: Binder, memory: str = "auto", backend: str = "auto") -> Program:
        """The program on the operands that ``binder`` then holds; raises as it does."""
        plan = link_plans(self)
        return Program(*binder.chains(plan), self.act, self.in_place, memory, backend, plan.shares)


@dataclass(frozen=True)
class Dense:
    """A dense block: every layer reads the channels of the input and of all layers before it, and appends its own.

    Args:
        layers: the steps of each, which begin with a norm and end with a convolution, or a dropout behind it.
    """

    layers: tuple[tuple[Step, ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash(self.layers))
        unsupported(self)  # see Block

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type, tuple]:
        """As for :class:`Block`."""
        return Dense, (self.layers,)

    @property
    def plans(self) -> tuple[LinkPlan, ...]:
        """The links of all layers; raises as :func:`dense_plans` does."""
        return tuple(link for layer in dense_plans(self) for link in layer)

    def bound(self, binder: Binder, memory: str = "auto", backend: str = "auto") -> DenseProgram:
        """As for :class:`Block`."""
        return DenseProgram(tuple(map(binder.chain, dense_plans(self))), memory, backend)


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


class LinkPlan(NamedTuple):
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
    pool: Pool | None = None

    @property
    def chance(self) -> bool:
        """Whether there are factors by chance."""
        return self.drop_path is not None or self.mask is not None


class Plan(NamedTuple):
    branch: tuple[LinkPlan, ...]
    shortcut: tuple[LinkPlan, ...] | None
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
def link_plans(block: Block) -> Plan:
    """The steps grouped into links; raises :class:`UnsupportedBlock` where the engine cannot express them."""
    if block.shortcut is None:
        if block.act != IDENTITY:
            raise UnsupportedBlock("an activation after the join needs a join")
        return Plan(_links(block.branch), None)
    branch, shortcut = _links(block.branch), _links(block.shortcut)
    for name, chain in (("branch", branch), ("shortcut", shortcut)):
        if chain[-1].act != IDENTITY:
            raise UnsupportedBlock(f"the {name} ends with an activation before the addition")
        if chain[-1].dropout is not None:
            raise UnsupportedBlock(f"the {name} ends with a dropout before the addition")
    if any(link.excite is not None or link.chance for link in shortcut):
        raise UnsupportedBlock("the shortcut has a gain, squeeze-excitation or stochastic depth")
    if branch[-1].pool is not None or shortcut[-1].pool is not None:
        raise UnsupportedBlock("a max pooling before the addition")
    if len(shortcut) == 1 and shortcut[0].norm is not None:
        raise UnsupportedBlock("the shortcut is a norm without a convolution")
    shares = block.residual == "pending" and branch[0]._replace(conv=None, bare=False) != LinkPlan()
    if shares and branch[0].conv is None:
        raise UnsupportedBlock("a shortcut from the branch's first value needs a convolution in the branch")
    if shares and shortcut[0]._replace(conv=None, bare=False) != LinkPlan():
        raise UnsupportedBlock("a shortcut from the branch's first value begins with a norm or an activation")
    return Plan(branch, shortcut, shares)


@_once
def dense_plans(dense: Dense) -> tuple[tuple[LinkPlan, ...], ...]:
    """Every layer's steps grouped into links; raises as :func:`link_plans` does."""
    layers = tuple(_links(layer) for layer in dense.layers)
    for layer in layers:
        if len(layer) < 2 or layer[0].norm is None:
            raise UnsupportedBlock("a layer that does not begin with a norm and go on to a convolution")
        if layer[-1]._replace(dropout=None, dropout_p=None) != LinkPlan():
            raise UnsupportedBlock("a layer that does not end with its convolution, or a dropout behind it")
    return layers


def _links(steps: tuple[Step, ...]) -> tuple[LinkPlan, ...]:
    """Groups steps into links, each ``[norm] [excitation] [stochastic depth] [activation] [dropout] [convolution]``.

    The last one may have a max pooling in the convolution's place.
    A dropout of channels takes the place of stochastic depth, also from behind a ReLU, through which its factors pass.
    An excitation behind an activation begins a link of its own: it needs the mean of what the activation made.
    """
    links: list[LinkPlan] = []
    link = LinkPlan()
    for step in steps:
        if isinstance(step, SqueezeExcite) and link.act != IDENTITY and link.dropout is None:
            links.append(link)
            link = LinkPlan()
        link = _with_step(link, step)
        if link.conv is not None:
            links.append(link)
            link = LinkPlan()
    return (*links, link)


# act(g * z) = g * act(z) where g is not negative.
_HOMOGENEOUS = (IDENTITY.name, RELU.name, "leaky_relu")


def _with_step(link: LinkPlan, step: Step) -> LinkPlan:
    """``link`` with one more step, which has to come behind those that it has."""
    if link.pool is not None:
        raise UnsupportedBlock("a max pooling that something follows")
    if isinstance(step, Pool):
        return link._replace(pool=step)
    if isinstance(step, Conv):
        return link._replace(conv=names_of(step.path), bare=step.bare)
    if link.dropout is not None:
        raise UnsupportedBlock("a dropout that no convolution follows")
    if isinstance(step, Dropout):
        return link._replace(dropout=names_of(step.path), dropout_p=step.p)
    if isinstance(step, Act):
        if link.act != IDENTITY:
            raise UnsupportedBlock("two activations in a row")
        return link._replace(act=step.activation)
    if isinstance(step, Norm):
        if link != LinkPlan():
            raise UnsupportedBlock("a norm that follows a norm or an activation, without a convolution between")
        return link._replace(norm=names_of(step.path), act=step.act)
    passes = isinstance(step, Mask) and step.channels and link.act.name in _HOMOGENEOUS
    if (link.act != IDENTITY and not passes) or link.chance:
        raise UnsupportedBlock("a gain that follows an activation or another gain")
    link = link._replace(gains=True)
    if isinstance(step, DropPath):
        return link._replace(drop_path=names_of(step.path))
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
        compiled = graphs.is_compiled() and not _idles_on_cpu(block, x)
        out = graphs.run(block, root, x, residual, backend, memory) if compiled else None
        return _call_modules(block, root, x, residual) if out is None else out
    mode = "training" if torch.is_grad_enabled() else "inference"
    # Asked here too, before the work of binding.
    small = memory != "low" and too_small(x.numel(), mode, backend)
    if small and not by_measurement(x.device.type) and not _synchronised(block, root):
        return _walk(block, root, x, residual)
    if mode == "training" and not by_measurement(x.device.type) and idle_in_training(block):
        return _walk(block, root, x, residual)
    binder = Binder(root)
    try:
        program = block.bound(binder, memory, backend)
    except NotOurs:
        return _call_modules(block, root, x, residual)
    if not binder.suits(x.device, x.dtype):
        return _call_modules(block, root, x, residual)
    binder.count_batch()
    return execute(program, x, residual, binder.tensors, folded_weights(root, block, program.constant))


@_once
def idle_in_training(block: Block) -> bool:
    """Whether the block is convolutions with ReLUs, or one with another activation: training has no pass to save there.

    Stock PyTorch keeps the activation's result alone, written over what the convolution made. The engine keeps both,
    and takes a pass of its own for the bias's gradient, which stock's convolution yields beside the weight's. (Where
    convolutions have prologues of their own, a measurement decides.)
    """
    first, *rest = block.branch
    if block.shortcut is not None or not isinstance(first, Conv) or unsupported(block) is not None:
        return False
    alone = all(isinstance(step, Act) for step in rest)
    return alone or all(isinstance(step, Conv) or step == Act(RELU) for step in rest)


def _idles_on_cpu(block: Block, x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.device.type == "cpu" and idle_in_training(block)


def run_dense(dense: Dense, root: nn.Module, x: Tensor, *, backend: str = "auto", memory: str = "auto") -> Tensor:
    """Runs a dense block; as :func:`run`, with a result of ``x``'s channels and all layers'."""
    if not _engine_takes(x):
        out = graphs.run(dense, root, x, None, backend, memory) if graphs.is_compiled() else None
        return _call_layers(dense, root, x) if out is None else out
    binder = Binder(root)
    try:
        program = dense.bound(binder, memory, backend)
    except NotOurs:
        return _call_layers(dense, root, x)
    if not binder.suits(x.device, x.dtype):
        return _call_layers(dense, root, x)
    binder.count_batch()
    return execute_dense(program, x, binder.tensors, folded_weights(root, dense, is_constant(program.links)))


def measured_backends(block: Block | Dense, root: nn.Module, device: torch.device) -> str:
    """What runs a block on a device where measurements decide: the backends that won, by shape, or stock."""
    binder = Binder(root)
    try:
        program = block.bound(binder)
    except NotOurs:
        return "stock"
    found = judged(program, binder.tensors, device)
    return " or ".join(sorted(found, key=lambda name: name == "stock")) or "stock, until fusedres.tune has measured it"


def runs_modules() -> bool:
    """Whether something wants to see modules: a compiler, an exporter, a tracer, a hook on all of them."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or _has_any_global_hook()


def _engine_takes(x: Tensor) -> bool:
    if runs_modules():
        return False
    plain = type(x) is Tensor and x.dim() == 4 and x.is_floating_point() and not x.is_meta
    return plain and not graphs.is_transformed()


def _synchronised(block: Block, root: nn.Module) -> bool:
    """Whether a norm may share its statistics with other processes, which then all have to do the same."""
    if group_of(None) is None:
        return False
    norms = (step for step in (*block.branch, *(block.shortcut or ())) if isinstance(step, Norm))
    return any(isinstance(module_at(root, names_of(norm.path)), nn.SyncBatchNorm) for norm in norms)


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
        return Op(nn.Conv2d if isinstance(step, Conv) else nn.BatchNorm2d, names_of(step.path))
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
        module = module_at(root, step.path.split(".") if step.path else ())  # no cache: compilers trace this
        if isinstance(step, Conv) and step.bare:
            geometry = module.stride, module.padding, module.dilation, module.groups
            return F.conv2d(value, module.weight, module.bias, *geometry)
        if isinstance(step, Pool) and step.window is not None:
            kernel, stride, padding, ceil = step.window
            return F.max_pool2d(value, kernel, stride, padding, ceil_mode=ceil)
        if isinstance(step, (Dropout, Mask)) and step.p is not None:
            return (F.dropout if isinstance(step, Dropout) else F.dropout2d)(value, step.p, module.training)
        return module(value)
    fc1, fc2 = (module_at(root, path.split(".")) for path in (step.fc1, step.fc2))
    squeezed = value.mean((2, 3), keepdim=isinstance(fc1, nn.Conv2d))
    gate = GATES[step.gate](fc2(step.act(fc1(squeezed))))
    return value * gate.view(gate.shape[0], gate.shape[1], 1, 1)
