"""Dense blocks (Huang et al. 2017, "Densely Connected Convolutional Networks"): every layer reads the concatenation of
the block's input and of what all layers before it made.

=========================================================  ==============================================
written                                                    where
=========================================================  ==============================================
``features.append(layer(torch.cat(features, 1)))``         torchvision, timm, the survey
``x = torch.cat([x, layer(x)], 1)``                        the growing form
=========================================================  ==============================================

Both become one ``Dense(layers)``, which has neither the concatenations nor their copies. Preconditions: new channels
come behind the old ones; each layer begins with a norm and ends with a convolution, or a dropout behind
it; nothing but the block reads what
its layers make. A layer for which this does not hold is a chain.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from ...block import Dense, Dropout
from ..view import Chain, Region, View

__all__ = ["find"]

_CATS = (torch.cat, torch.concat, torch.concatenate)


def find(view: View) -> Iterator[Region]:
    for node in reversed(view.nodes):
        if _operands(node) and view.is_free(node):
            layers = _layers(view, node)
            if layers:
                yield from _region(view, node, layers)


def _region(view: View, end: fx.Node, layers: list[Chain]) -> Iterator[Region]:
    x = layers[0].entry
    if len(_operands(x)) == 1:  # the concatenation of the input alone, before the first layer
        (x,) = _operands(x)
    inside = {node for layer in layers for node in layer.nodes}
    for cat in (end, *(layer.entry for layer in layers)):
        inside |= _cats(cat, x)
    dense = Dense(tuple(layer.steps for layer in layers))
    drops = any(isinstance(step, Dropout) for layer in dense.layers for step in layer)
    name = f"dense block of {len(layers)}{' (dropout)' if drops else ''}"
    region = Region(name, dense, (x,), view.in_order(inside))
    reason = view.problem(region)
    if any(not node.users.keys() <= inside for node in inside - {end}):
        reason = reason or "a value inside is used outside"
    if reason is None:
        yield region
    else:
        view.decline(region.nodes, f"the dense block that ends with {end.name} is not fused: {reason}")


def _layers(view: View, end: fx.Node) -> list[Chain]:
    """The runs that made the last parts of a concatenation, each from all parts before it."""
    parts, layers = _parts(end), []
    while len(parts) > 1:
        *before, last = parts
        layer = view.chain_into(last, frozenset(last.users))
        if not layer.convolutions or _parts(layer.entry) != before:
            break
        layers.append(layer)
        parts = before
    return layers[::-1]


def _operands(node: fx.Node) -> list[fx.Node]:
    """What a concatenation of channels concatenates; nothing for any other node."""
    if node.op != "call_function" or node.target not in _CATS:
        return []
    arguments = dict(zip(("tensors", "dim"), node.args)) | node.kwargs
    tensors = arguments.get("tensors", ())
    if arguments.get("dim", arguments.get("axis", 0)) not in (1, -3) or not isinstance(tensors, (list, tuple)):
        return []
    return list(tensors) if all(isinstance(t, fx.Node) for t in tensors) else []


def _parts(node: fx.Node) -> list[fx.Node]:
    """The parts of nested concatenations, in the order of their channels; the node itself where it is none."""
    return [part for operand in _operands(node) for part in _parts(operand)] or [node]


def _cats(node: fx.Node, x: fx.Node) -> set[fx.Node]:
    """The nested concatenations that make ``node`` from ``x`` and the layers."""
    if node is x or not _operands(node):
        return set()
    return {node}.union(*(_cats(operand, x) for operand in _operands(node)))
