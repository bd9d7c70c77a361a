"""A block bound to the modules that hold its operands: which tensors they are, and what their settings say."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from .engine import IDENTITY_SHORTCUT, ConvSlot, ExciteSlot, GainSlot, Link, MaskSlot, NormSlot, group_of
from .frozen import BUFFERS, FrozenNorm, frozen_norm
from .mask import mask_of
from .ops.conv import geometry
from .ops.join_pool import POOL_SETTINGS, PoolWindow, pool_window

if TYPE_CHECKING:
    from .block import Block, Dense, LinkPlan, Mask, Plan, Pool, SqueezeExcite

__all__ = ["Binder", "FollowedBinder", "NotOurs", "folded_weights", "is_norm_act", "module_at", "names_of"]


# Folded and packed weights, per module and block. Not on the module, where copies and pickles would meet them.
_FOLDED: WeakKeyDictionary[nn.Module, dict[Block | Dense, dict[int, Any]]] = WeakKeyDictionary()


def folded_weights(root: nn.Module, block: Block | Dense, constant: bool) -> dict[int, Any] | None:
    """Where the block's folded weights are kept."""
    if constant:
        return _FOLDED.setdefault(root, {}).setdefault(block, {})
    _FOLDED.pop(root, None)  # training writes to the weights at every step: nothing folded stays true
    return None


class NotOurs(Exception):
    """A module that does more, or other, than the convolution or batch norm that the block was described with."""


@cache
def names_of(path: str) -> tuple[str, ...]:
    return tuple(path.split(".")) if path else ()


def module_at(root: nn.Module, names: Sequence[str]) -> nn.Module:
    for name in names:
        root = root._modules[name]
    return root


def _check_unhooked(module: nn.Module) -> None:
    """Raises :class:`NotOurs` where calling ``module`` does more than its class's forward."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        raise NotOurs
    if type(module).__call__ is not nn.Module.__call__:
        raise NotOurs
    # Read by its name as well: compilers guard that, but not what a __dict__ holds.
    if "forward" in module.__dict__ or not callable(module.forward):
        raise NotOurs


def _check_ours(module: nn.Module, kind: type[nn.Module]) -> None:
    """Raises :class:`NotOurs` unless calling ``module`` is nothing but ``kind``'s forward on its own parameters."""
    _check_unhooked(module)
    if type(module).forward is not kind.forward or "weight" not in module._parameters:
        raise NotOurs


def _check_convolves(conv: nn.Module, kind: type[nn.Module]) -> None:
    """As :func:`_check_ours`, for a forward that leaves the work to another method."""
    _check_ours(conv, kind)
    if "_conv_forward" in conv.__dict__ or not callable(conv._conv_forward):  # for compilers, as above
        raise NotOurs
    if type(conv)._conv_forward is not kind._conv_forward:
        raise NotOurs


@cache
def is_norm_act(cls: type[nn.Module]) -> bool:
    """Whether instances are a batch norm and its activation in one module, timm's ``BatchNormAct2d`` or its twin."""
    forward = cls.forward
    names = ("BatchNormAct2d.forward", "SyncBatchNormAct.forward")
    return forward.__module__ == "timm.layers.norm_act" and forward.__qualname__ in names


_ORDINARY = (Tensor, nn.Parameter)


class Binder:
    """Collects the operands of a block from its modules, in one flat list, and the slots that point into it."""

    _frozen_norm = staticmethod(frozen_norm)
    _geometry = staticmethod(geometry)
    _is_norm_act = staticmethod(is_norm_act)
    _names_of = staticmethod(names_of)
    _pool_window = staticmethod(pool_window)

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.tensors: list[Tensor | None] = []
        self.weights: list[Tensor] = []
        self.counters: list[Tensor] = []

    def suits(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether the operands are ordinary tensors that stock PyTorch would run with such an input."""
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

    def chains(self, plan: Plan) -> tuple[tuple[Link, ...], tuple[Link, ...] | None]:
        """The branch, and the shortcut if there is a join."""
        branch = self.chain(plan.branch)
        if plan.shortcut is None:
            return branch, None
        return branch, IDENTITY_SHORTCUT if len(plan.shortcut) == 1 else self.chain(plan.shortcut)

    def chain(self, plans: tuple[LinkPlan, ...]) -> tuple[Link, ...]:
        return tuple(
            Link(
                None if plan.norm is None else self._norm(module_at(self.root, plan.norm)),
                plan.act,
                None if plan.conv is None else self._conv(module_at(self.root, plan.conv), plan.bare),
                self._gain(plan) if plan.gains else None,
                0.0 if plan.dropout is None else self._dropout(module_at(self.root, plan.dropout), plan.dropout_p),
                None if plan.pool is None else self._pool(plan.pool),
            )
            for plan in plans
        )

    def _conv(self, conv: nn.Module, bare: bool) -> ConvSlot:
        _check_convolves(conv, type(conv) if bare else nn.Conv2d)
        first = len(self.tensors)
        state = conv.__dict__
        if state["padding_mode"] != "zeros":
            raise NotOurs
        parameters = state["_parameters"]
        weight = parameters["weight"]
        self.tensors += (weight, parameters["bias"])
        self.weights.append(weight)
        try:
            of_conv = self._geometry(
                state["stride"], state["padding"], state["dilation"], state["groups"], weight.shape[2:]
            )
        except (TypeError, ValueError):  # uneven padding="same", or settings of other types than a constructor leaves
            raise NotOurs from None
        return ConvSlot(first, of_conv)

    def _norm(self, norm: nn.Module) -> NormSlot:
        if (frozen := self._frozen_norm(type(norm))) is not None:
            return self._frozen(norm, frozen)
        synchronised = isinstance(norm, nn.SyncBatchNorm)
        plain = nn.SyncBatchNorm if synchronised else nn.BatchNorm2d
        _check_ours(norm, type(norm) if self._is_norm_act(type(norm)) else plain)
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

    def _frozen(self, norm: nn.Module, frozen: FrozenNorm) -> NormSlot:
        _check_unhooked(norm)
        first, buffers = len(self.tensors), norm._buffers
        try:
            eps = norm.__dict__["eps"] if frozen.eps is None else frozen.eps
            operands = [buffers[name] for name in BUFFERS]
        except KeyError:  # one has become a parameter
            raise NotOurs from None
        if frozen.eps is None and type(eps) is not float:
            raise NotOurs
        for t in operands:
            if t is None or t.requires_grad:
                raise NotOurs
        self.tensors += operands
        if frozen.promotes:  # outside autocast, the next convolution would refuse the result of another dtype
            self.weights += operands
        return NormSlot(first, False, 0.0, eps, None, frozen.promotes)

    def _gain(self, plan: LinkPlan) -> GainSlot | None:
        drop_path = 0.0 if plan.drop_path is None else self._drop_path(module_at(self.root, plan.drop_path))
        excite = None if plan.excite is None else self._excite(plan.excite)
        mask = None if plan.mask is None else self._mask(plan.mask)
        found = excite is not None or drop_path or mask is not None
        return GainSlot(excite, drop_path, mask) if found else None

    def _excite(self, step: SqueezeExcite) -> ExciteSlot:
        first = len(self.tensors)
        for path in (step.fc1, step.fc2):
            layer = module_at(self.root, self._names_of(path))
            if isinstance(layer, nn.Conv2d):
                _check_convolves(layer, nn.Conv2d)
            else:
                _check_ours(layer, nn.Linear)
            parameters = layer._parameters
            self.tensors += (parameters["weight"], parameters["bias"])
            self.weights.append(parameters["weight"])
        return ExciteSlot(first, step.act, step.gate)

    def _dropout(self, module: nn.Module, p: float | None) -> float:
        if p is not None:
            return p if module.training else 0.0
        _check_unhooked(module)
        if type(module).forward is not nn.Dropout.forward:
            raise NotOurs
        return float(module.p) if module.training else 0.0

    def _pool(self, step: Pool) -> PoolWindow:
        if step.window is not None:
            return step.window
        pool = module_at(self.root, self._names_of(step.path))
        _check_unhooked(pool)
        if type(pool).forward is not nn.MaxPool2d.forward:
            raise NotOurs
        try:
            return self._pool_window(*(pool.__dict__[name] for name in POOL_SETTINGS))
        except (KeyError, TypeError, ValueError):  # settings that no constructor leaves, or that no kernel has
            raise NotOurs from None

    def _drop_path(self, module: nn.Module) -> float:
        _check_unhooked(module)
        settings = module.__dict__
        if settings.get("mode", "row") != "row" or not settings.get("scale_by_keep", True):
            raise NotOurs
        return float(settings["p"] if "p" in settings else settings["drop_prob"]) if module.training else 0.0

    def _mask(self, step: Mask) -> MaskSlot | None:
        module = module_at(self.root, self._names_of(step.path))
        if step.p is not None:
            return MaskSlot(None, step.p, True, 1.0) if module.training and step.p else None
        _check_unhooked(module)
        found = mask_of(module)
        if found is None or found.channels != step.channels:
            raise NotOurs
        return MaskSlot(ref(module), 0.0, found.channels, found.number) if module.training else None


def _known_frozen_norm(cls: type[nn.Module]) -> FrozenNorm | None:
    return frozen_norm(cls)


_known_frozen_norm._dynamo_marked_constant = True  # compilers ask, and do not follow


class FollowedBinder(Binder):
    """A binder for compilers to follow, which warn of functions that keep their results."""

    _frozen_norm = staticmethod(_known_frozen_norm)
    _geometry = staticmethod(geometry.__wrapped__)
    _is_norm_act = staticmethod(is_norm_act.__wrapped__)
    _names_of = staticmethod(names_of.__wrapped__)
    _pool_window = staticmethod(pool_window.__wrapped__)
