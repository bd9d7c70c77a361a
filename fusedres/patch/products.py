"""Activations that people write out: ``x * sigmoid(x)`` is SiLU, ``x * relu6(x + 3) / 6`` is Hardswish."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..block import Act
from ..ops.activations import Activation
from .steps import read, tensor_input
from .trace import Untraceable, trace

__all__ = ["Product", "find_product", "written_activation"]


@dataclass(frozen=True)
class Product:
    """An activation made of several nodes.

    Args:
        input: what it reads.
        step: what it is to a block.
        nodes: all of it in the graph's order, the one with the result last.
    """

    input: fx.Node
    step: Act
    nodes: tuple[fx.Node, ...]


ModuleOf = Callable[[fx.Node], nn.Module | None]

_SUMS = (operator.add, torch.add, "add")
_MULTIPLY = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
_DIVIDE = (operator.truediv, operator.itruediv, torch.div, "div", "div_")
_SIGMOIDS = (nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid")


def find_product(node: fx.Node, module_of: ModuleOf, usable: Callable[[fx.Node], bool]) -> Product | None:
    """The activation whose result is ``node``, or ``None``; its inner values are read by itself alone.

    Args:
        usable: whether a module that a node calls does nothing but its class's forward.
    """
    for x, inner, name in _candidates(node, module_of, usable):
        alone = all(each.users.keys() == {reader} for each, reader in zip(inner, (*inner[1:], node)))
        if alone and tensor_input(inner[0]) is x:
            return Product(x, Act(Activation(name)), (*inner, node))
    return None


def _candidates(
    node: fx.Node, module_of: ModuleOf, usable: Callable[[fx.Node], bool]
) -> Iterator[tuple[fx.Node, tuple[fx.Node, ...], str]]:
    """One factor, the nodes from what should read it to what ``node`` reads, and the name of the activation."""
    for x, gate in _factors(node):
        if _is_sigmoid(gate, module_of, usable):
            yield x, (gate,), "silu"
        if shifted := _shifted_relu6(_divided_by_6(gate), module_of, usable):
            yield x, (*shifted, gate), "hardswish"
    product = _divided_by_6(node)
    for x, gate in () if product is None else _factors(product):
        if shifted := _shifted_relu6(gate, module_of, usable):
            yield x, (*shifted, product), "hardswish"


def _shifted_relu6(node: fx.Node | None, module_of: ModuleOf, usable: Callable[[fx.Node], bool]) -> tuple[fx.Node, ...]:
    """The two nodes of ``relu6(x + 3)``, or none."""
    if node is None or ((module := module_of(node)) is not None and not usable(node)):
        return ()
    shifted = tensor_input(node)
    if shifted is None or not _is_with_number(shifted, _SUMS, 3):
        return ()
    return (shifted, node) if read(node, module, lambda _: None) == Act(Activation("relu6")) else ()


def _divided_by_6(node: fx.Node) -> fx.Node | None:
    return tensor_input(node) if _is_with_number(node, _DIVIDE, 6) else None


def _is_with_number(node: fx.Node, functions: tuple[Any, ...], number: int) -> bool:
    """Whether ``node`` is one of the functions of a tensor and this number."""
    return (
        node.op in ("call_function", "call_method")
        and node.target in functions
        and len(node.args) == 2
        and not node.kwargs
        and isinstance(node.args[0], fx.Node)
        and type(node.args[1]) in (int, float)
        and node.args[1] == number
    )


def written_activation(module: nn.Module) -> Activation | None:
    """The activation that a module's own forward is, whichever way it is written; ``None`` for anything else."""
    if module._parameters or module._buffers or module._modules:
        return None
    try:
        traced = trace(module, lambda _: False)
    except Untraceable:
        return None
    if traced.asked:  # nobody asks again
        return None
    nodes = list(traced.graph.nodes)
    *inner, output = nodes[1:]
    if nodes[0].op != "placeholder" or not inner or output.args != (inner[-1],):
        return None
    if len(inner) == 1:
        reading = read(inner[0], None, lambda _: None)
        return reading.activation if isinstance(reading, Act) and tensor_input(inner[0]) is nodes[0] else None
    found = find_product(inner[-1], lambda _: None, lambda _: True)
    whole = found is not None and found.input is nodes[0] and set(found.nodes) == set(inner)
    return found.step.activation if whole else None


def _is_sigmoid(node: fx.Node, module_of: ModuleOf, usable: Callable[[fx.Node], bool]) -> bool:
    if len(node.args) != 1 or node.kwargs:
        return False
    module = module_of(node)
    return node.target in _SIGMOIDS if module is None else type(module) is nn.Sigmoid and usable(node)


def _factors(node: fx.Node) -> tuple[tuple[fx.Node, fx.Node], ...]:
    """The two factors of a product, in both orders."""
    if node.op not in ("call_function", "call_method") or node.target not in _MULTIPLY or node.kwargs:
        return ()
    if len(node.args) != 2 or not all(isinstance(a, fx.Node) for a in node.args) or node.args[0] is node.args[1]:
        return ()
    return node.args, node.args[::-1]
