"""The steps of a block in stock PyTorch, from functions: what runs where a fused call costs more than it saves.

A small input's time goes to Python, and there most of it to ``nn.Module.__call__`` and to attributes that modules look
up in three places. Where a layer is exactly PyTorch's and nothing is hooked to it, its function is called with what it
holds; any other layer is called. Autograd sees the same ops either way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops.activations import IDENTITY, RELU, Activation

__all__ = ["Op", "activated", "walk"]


class Op(NamedTuple):
    """One step.

    Attributes:
        kind: ``nn.Conv2d`` or ``nn.BatchNorm2d``, the class of the layer at ``names``; or ``None``.
        act: without a kind, the activation; or ``None``.
        other: without either, what to call with the block's module and the value.
    """

    kind: type[nn.Module] | None = None
    names: tuple[str, ...] = ()
    act: Activation | None = None
    other: Callable[[nn.Module, Tensor], Tensor] | None = None


def walk(ops: Sequence[Op], root: nn.Module, value: Tensor) -> tuple[Tensor, bool]:
    """The value behind all of ``ops``, and whether nobody else holds it, so that it may be written to."""
    ours = False
    for kind, names, act, other in ops:
        if act is not None:
            value, ours = activated(act, value, ours)
            continue
        if other is not None:
            value, ours = other(root, value), False
            continue
        layer = root
        for name in names:
            layer = layer._modules[name]
        state = layer.__dict__
        ours = type(layer) is kind and not (
            state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
            or "forward" in state
            or "weight" not in state["_parameters"]
        )
        if not ours:
            value = layer(value)
        elif kind is nn.Conv2d:
            value, ours = _convolved(layer, state, value)
        else:
            value, ours = _normalised(layer, state, value)
    return value, ours


def activated(act: Activation, value: Tensor, ours: bool) -> tuple[Tensor, bool]:
    """``act(value)``, in place where the value is ``ours`` and backward reads nothing but the result."""
    if act.code == IDENTITY.code:
        return value, ours
    if ours and act.code == RELU.code:
        return torch.relu_(value), True
    return act(value), True


def _convolved(layer: nn.Conv2d, state: dict, x: Tensor) -> tuple[Tensor, bool]:
    if state["padding_mode"] != "zeros" or "_conv_forward" in state:
        return layer(x), False
    parameters = state["_parameters"]
    weight, bias, stride, padding = parameters["weight"], parameters["bias"], state["stride"], state["padding"]
    return torch.conv2d(x, weight, bias, stride, padding, state["dilation"], state["groups"]), True


def _normalised(layer: nn.BatchNorm2d, state: dict, x: Tensor) -> tuple[Tensor, bool]:
    momentum, training = state["momentum"], state["training"]
    if momentum is None:
        return layer(x), False
    parameters, buffers = state["_parameters"], state["_buffers"]
    mean, var = buffers["running_mean"], buffers["running_var"]
    batch_statistics = training or (mean is None and var is None)
    if training:
        if not state["track_running_stats"]:
            mean = var = None
        elif buffers["num_batches_tracked"] is not None:
            buffers["num_batches_tracked"].add_(1)
    gamma, beta = parameters["weight"], parameters["bias"]
    return F.batch_norm(x, mean, var, gamma, beta, batch_statistics, momentum, state["eps"]), True
