"""Gated skips: ``m * f + (1 - m) * x`` with a gate ``m`` that is learnt.

=========================================  ==========================  =============================================
written, with ``g = sigmoid(logits)``      name in the report          from
=========================================  ==========================  =============================================
``g * f + (1 - g) * x``                    gated skip                  Srivastava et al. 2015, "Training Very Deep
                                                                       Networks", eq. 3
``m = (g > t).float()``, the same sum      sparse skip                 the same with a gate that is open or shut
=========================================  ==========================  =============================================

Becomes one :class:`~fusedres.patch.gated_join.GatedJoin`, whose inputs are the branch, the raw output of the gate's
layer and the skip. What makes these is called, or fused on its own. Factors and terms may come in either order; the
gate is read by the sum alone, and the threshold is a number.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..gated_join import GatedJoin
from ..view import Region, View

__all__ = ["find"]

_PRODUCTS = (operator.mul, torch.mul, "mul")
_DIFFERENCES = (operator.sub, torch.sub, torch.rsub, "rsub")
_SIGMOIDS = (torch.sigmoid, F.sigmoid, "sigmoid")
_COMPARISONS = (operator.gt, torch.gt, "gt")


def find(view: View) -> Iterator[Region]:
    for node, addition in view.additions():
        for first, second in ((addition.left, addition.right), (addition.right, addition.left)):
            region = _region(view, node, first, second)
            if region is not None and view.problem(region) is None:
                yield region
                break


def _region(view: View, node: fx.Node, first: fx.Node, second: fx.Node) -> Region | None:
    """The sum as ``m * f`` and ``(1 - m) * x``, in this order."""
    for complement, x in _factors(second):
        m = _complemented(complement)
        for f in (f for mask, f in _factors(first) if mask is m is not None):
            gate = _gate(view, m)
            inside = {node, first, second, complement, *gate.nodes} if gate is not None else set()
            if inside and all(n.users.keys() <= inside for n in inside - {node}):
                return _joined(view, view.in_order(inside), f, x, gate)
    return None


def _joined(view: View, nodes: tuple[fx.Node, ...], f: fx.Node, x: fx.Node, gate: _Gate) -> Region:
    logits = gate.logits
    by_conv = isinstance(view.module_of(logits), nn.Conv2d) and logits.users.keys() <= set(nodes)
    join = GatedJoin(logits.target if by_conv else "", gate.threshold, gate.in_float)
    return Region("gated skip" if gate.threshold is None else "sparse skip", join, (f, logits, x), nodes)


def _factors(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """The factors of a product of two tensors, in both orders."""
    if node.target not in _PRODUCTS or node.kwargs or len(node.args) != 2:
        return []
    a, b = node.args
    return [(a, b), (b, a)] if isinstance(a, fx.Node) and isinstance(b, fx.Node) else []


def _complemented(node: fx.Node) -> fx.Node | None:
    """``m`` of ``1 - m``."""
    if node.target not in _DIFFERENCES or node.kwargs or len(node.args) != 2:
        return None
    one, m = node.args[::-1] if node.target in (torch.rsub, "rsub") else node.args
    return m if isinstance(m, fx.Node) and isinstance(one, (int, float)) and one == 1 else None


class _Gate(NamedTuple):
    logits: fx.Node
    nodes: tuple[fx.Node, ...]
    threshold: float | None = None
    in_float: bool = False


def _gate(view: View, m: fx.Node) -> _Gate | None:
    """What makes ``m``: a sigmoid, or the mask of where it is over a threshold."""
    if _is_sigmoid(view, m):
        return _Gate(m.args[0], (m,))
    if m.op != "call_method" or m.target not in ("float", "to", "type_as") or not isinstance(m.args[0], fx.Node):
        return None
    comparison = m.args[0]
    if comparison.target not in _COMPARISONS or comparison.kwargs or len(comparison.args) != 2:
        return None
    g, threshold = comparison.args
    if not isinstance(g, fx.Node) or not _is_sigmoid(view, g) or isinstance(threshold, (bool, fx.Node)):
        return None
    nodes, in_float = (m, comparison, g), m.target == "float" and len(m.args) == 1
    if not in_float:
        # The gate's own dtype: any other could be wider.
        dtype = m.args[1] if len(m.args) == 2 and not m.kwargs else None
        if m.target == "to" and isinstance(dtype, fx.Node) and dtype.target is getattr and dtype.args[1] == "dtype":
            nodes, dtype = (*nodes, dtype), dtype.args[0]
        if dtype is not g or m.target == "float":
            return None
    return _Gate(g.args[0], nodes, float(threshold), in_float)


def _is_sigmoid(view: View, node: fx.Node) -> bool:
    if node.kwargs or len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_module":
        return type(view.module_of(node)) is nn.Sigmoid and view.untouched(node)
    return node.target in _SIGMOIDS
