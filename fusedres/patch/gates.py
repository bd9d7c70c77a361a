"""Reading a squeeze-excitation gate out of a graph: ``x * gate(fc2(act(fc1(mean(x)))))`` (Hu et al. 2018, eq. 2 to 4).

People write it in many ways: the mean by a method, a function or a pooling module; two 1x1 convolutions or two linear
layers; views before, between and behind them; the factors in either order; all of it inline or in a module of its own.
What is compared is not the way of writing but the shapes: every node from the squeeze to the product is followed with
the symbolic shape of its result, which has to be ``[N, C, 1, 1]`` in the end.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..block import Act, SqueezeExcite
from ..ops.activations import IDENTITY, Activation
from .steps import PASS, Reading, tensor_input

__all__ = ["Gate", "find_gate"]

_LONGEST = 16  # nodes between squeeze and product


@dataclass(frozen=True)
class Gate:
    """A squeeze-excitation gate.

    Args:
        input: what is squeezed and scaled.
        step: what the gate is to a block.
        nodes: all of it in the graph's order, the product last.
    """

    input: fx.Node
    step: SqueezeExcite
    nodes: tuple[fx.Node, ...]


ModuleOf = Callable[[fx.Node], nn.Module | None]
Usable = Callable[[fx.Node], bool]

_PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")


def find_gate(
    node: fx.Node,
    module_of: ModuleOf,
    read: Callable[[fx.Node], Reading],
    usable: Usable,
    position: Callable[[fx.Node], int],
) -> Gate | None:
    """The gate whose product is ``node``, or ``None``.

    Args:
        position: of a node in the graph.
        read: what a node other than a product is to a block.
        usable: whether the module that a node calls is called nowhere else and does nothing but its class's forward.
    """
    if node.op not in ("call_function", "call_method") or node.target not in _PRODUCTS or node.kwargs:
        return None
    if len(node.args) != 2 or not all(isinstance(a, fx.Node) for a in node.args) or node.args[0] is node.args[1]:
        return None
    for x, gate in (node.args, node.args[::-1]):
        path = _path(gate, x)
        if path and (step := _Excitation(x, module_of, read, usable).step(path)) is not None:
            nodes = _closed({*path, node}, node, x)
            if nodes is not None:
                return Gate(x, step, tuple(sorted(nodes, key=position)))
    return None


def _path(end: fx.Node, x: fx.Node) -> list[fx.Node]:
    """The nodes that lead from ``x`` to ``end``, or none."""
    path = []
    while end is not None and end is not x and len(path) < _LONGEST:
        path.append(end)
        end = tensor_input(end)
    return path[::-1] if end is x else []


def _closed(nodes: set[fx.Node], product: fx.Node, x: fx.Node) -> set[fx.Node] | None:
    """``nodes`` with the sizes that they alone ask for, or ``None`` where something outside reads one of their values.

    The product's own readers are its business, and so are those of ``x``.
    """
    asked = {user for node in (nodes - {product}) | {x} for user in node.users if _asks_for_size(user)}
    asked |= {user for node in asked for user in node.users if user.target is operator.getitem}
    for _ in range(2):  # a size's elements first
        nodes = nodes | {node for node in asked if set(node.users) <= nodes}
    return nodes if all(set(node.users) <= nodes for node in nodes - {product}) else None


def _asks_for_size(node: fx.Node) -> bool:
    return (node.op == "call_method" and node.target == "size") or (
        node.op == "call_function" and node.target is getattr and node.args[1] == "shape"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Shapes
# ---------------------------------------------------------------------------------------------------------------------

# The batch, the image's height and width, and both as one dimension; channels are numbers.
_N, _H, _W, _HW = "N", "H", "W", "HW"
_IMAGE = {_H, _W, _HW}
_Shape = tuple[str | int, ...]


class _Unknown(Exception):
    """Something that is no part of a gate as it is known here."""


class _Excitation:
    """Follows one path from squeeze to product."""

    def __init__(self, x: fx.Node, module_of: ModuleOf, read: Callable[[fx.Node], Reading], usable: Usable) -> None:
        self.x, self.module_of, self.read, self.usable = x, module_of, read, usable
        self.layers: list[nn.Module] = []
        self.names: list[str] = []
        self.act: Activation = IDENTITY
        self.gate = ""

    def step(self, path: list[fx.Node]) -> SqueezeExcite | None:
        first = next((m for m in map(self.module_of, path) if isinstance(m, (nn.Conv2d, nn.Linear))), None)
        if first is None or _width(first)[0] == 1:  # one channel could be taken for a size of one
            return None
        self.shapes: dict[fx.Node, _Shape] = {self.x: (_N, _width(first)[0], _H, _W)}
        try:
            for node in path:
                self.shapes[node] = self._result(node, self.shapes[tensor_input(node)])
        except _Unknown:
            return None
        if len(self.layers) != 2 or not self.gate or self.shapes[path[-1]] != (_N, _width(first)[0], 1, 1):
            return None
        return SqueezeExcite(*self.names, self.act, self.gate)

    def _result(self, node: fx.Node, shape: _Shape) -> _Shape:
        """The shape of what ``node`` makes of a tensor of this shape, noting what it is to the gate."""
        module = self.module_of(node)
        if module is not None and not self.usable(node):
            raise _Unknown
        if not _IMAGE.isdisjoint(shape):
            return self._squeezed(node, module, shape)
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            return self._layer(node.target, module, shape)
        if (gate := _gate(node, module)) is not None:
            if len(self.layers) != 2 or self.gate:
                raise _Unknown
            self.gate = gate
            return shape
        reading = self.read(node)
        if reading is PASS:
            return shape
        if isinstance(reading, Act):
            if len(self.layers) != 1 or self.act != IDENTITY:
                raise _Unknown
            self.act = reading.activation
            return shape
        return self._reshape(node, module, shape)

    def _layer(self, name: str, layer: nn.Module, shape: _Shape) -> _Shape:
        width, made = _width(layer)
        plain = isinstance(layer, nn.Linear) or (
            layer.kernel_size == (1, 1) and layer.groups == 1 and layer.padding in ((0, 0), "valid", "same")
        )
        flat = (_N, width) if isinstance(layer, nn.Linear) else (_N, width, 1, 1)
        if len(self.layers) == 2 or self.gate or not plain or shape != flat:
            raise _Unknown
        self.layers.append(layer)
        self.names.append(name)
        return (_N, made, *flat[2:])

    def _squeezed(self, node: fx.Node, module: nn.Module | None, shape: _Shape) -> _Shape:
        """The shape of a mean, or of a view of all pixels as one dimension before it."""
        if shape[2:] == (_H, _W) and module is None:
            if node.target in ("view", "reshape"):
                sizes = node.args[1:]
                sizes = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
                if [self._size(size) for size in sizes] == [*shape[:2], -1]:
                    return (*shape[:2], _HW)
                raise _Unknown
            if node.target in ("flatten", torch.flatten) and node.args[1:] in ((2,), (2, -1), (2, 3)):
                return (*shape[:2], _HW)
        return _squeeze(node, module, shape)

    # -- views --------------------------------------------------------------------------------------------------------

    def _reshape(self, node: fx.Node, module: nn.Module | None, shape: _Shape) -> _Shape:
        if type(module) is nn.Flatten:
            return _flattened(shape, module.start_dim, module.end_dim)
        if node.target in ("flatten", torch.flatten) and module is None:
            return _flattened(shape, *_integers(node.args[1:], node.kwargs, ("start_dim", "end_dim"), (0, -1)))
        if node.target in ("view", "reshape", torch.reshape):
            sizes = node.args[1:] or (node.kwargs.get("shape", node.kwargs.get("size")),)
            return self._viewed(shape, sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes)
        if node.target in ("unsqueeze", torch.unsqueeze):
            (dim,) = _integers(node.args[1:], node.kwargs, ("dim",))
            position = dim % (len(shape) + 1)
            return (*shape[:position], 1, *shape[position:])
        if node.target in ("squeeze", torch.squeeze):
            return _without(shape, node.args[1] if len(node.args) > 1 else node.kwargs.get("dim"))
        if node.target is operator.getitem:
            return _indexed(shape, node.args[1])
        if node.target == "expand_as" and node.args[1] is self.x:
            return shape
        raise _Unknown

    def _viewed(self, shape: _Shape, sizes: Any) -> _Shape:
        symbols = [self._size(size) for size in sizes]
        known = [s for s in symbols if s not in (-1, 1)]
        missing = [s for s in shape if s != 1]
        for s in known:
            if s not in missing:
                raise _Unknown
            missing.remove(s)
        if symbols.count(-1) > 1 or len(missing) > symbols.count(-1):
            raise _Unknown
        result = tuple((missing[0] if missing else 1) if s == -1 else s for s in symbols)
        if [s for s in result if s != 1] != [s for s in shape if s != 1]:
            raise _Unknown
        return result

    def _size(self, size: Any) -> str | int:
        """A size that a view asks for: a number, or a size of a tensor whose shape is known."""
        if isinstance(size, int):
            return size
        if isinstance(size, fx.Node):
            whole, index = size, None
            if size.target is operator.getitem:
                whole, index = size.args
            elif size.target == "size" and len(size.args) == 2:
                index = size.args[1]
            shape = self.shapes.get(whole.args[0]) if isinstance(whole, fx.Node) and _asks_for_size(whole) else None
            if shape is not None and isinstance(index, int) and -len(shape) <= index < len(shape):
                return shape[index]
        raise _Unknown


def _width(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels
    return layer.in_features, layer.out_features


def _gate(node: fx.Node, module: nn.Module | None) -> str | None:
    names = {
        **dict.fromkeys((nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid", "sigmoid_"), "sigmoid"),
        **dict.fromkeys((nn.Hardsigmoid, F.hardsigmoid), "hardsigmoid"),
    }
    return names.get(node.target if module is None else type(module))


_MEANS = ("mean", torch.mean)


def _squeeze(node: fx.Node, module: nn.Module | None, shape: _Shape) -> _Shape:
    """The shape of the mean over height and width, or over one of them."""
    whole = shape[2:] == (_H, _W)
    if module is not None:
        if whole and type(module) is nn.AdaptiveAvgPool2d and module.output_size in _ONE:
            return (*shape[:2], 1, 1)
        raise _Unknown
    if node.target is F.adaptive_avg_pool2d:
        (size,) = node.args[1:] or (node.kwargs.get("output_size"),)
        if whole and size in _ONE:
            return (*shape[:2], 1, 1)
    elif node.target in _MEANS and node.kwargs.keys() <= {"dim", "keepdim", "input"}:
        arguments = dict(zip(("dim", "keepdim"), node.args[1:])) | node.kwargs
        dims = arguments.get("dim")
        dims = dims if isinstance(dims, (tuple, list)) else (dims,)
        if dims and all(type(d) is int and shape[d % len(shape)] in _IMAGE for d in dims):
            dims = {d % len(shape) for d in dims}
            left = 1 if arguments.get("keepdim", False) else None
            sizes = (left if i in dims else size for i, size in enumerate(shape))
            return tuple(size for size in sizes if size is not None)
    raise _Unknown


_ONE = (1, (1, 1), [1, 1])


def _integers(args: tuple, kwargs: dict, names: tuple[str, ...], defaults: tuple[int, ...] = ()) -> list[int]:
    given = dict(zip(names, defaults)) | dict(zip(names, args)) | {k: v for k, v in kwargs.items() if k in names}
    values = list(given.values())
    if len(values) != len(names) or not all(isinstance(v, int) for v in values):
        raise _Unknown
    return values


def _flattened(shape: _Shape, start: int, end: int) -> _Shape:
    start, end = start % len(shape), end % len(shape)
    merged = [s for s in shape[start : end + 1] if s != 1]
    if len(merged) != 1:
        raise _Unknown
    return (*shape[:start], *merged, *shape[end + 1 :])


def _without(shape: _Shape, dims: Any) -> _Shape:
    """Squeezed; without ``dim``, a batch of one would lose its dimension too."""
    dims = (dims,) if isinstance(dims, int) else dims
    if not isinstance(dims, (tuple, list)) or any(shape[d] != 1 for d in dims):
        raise _Unknown
    gone = {d % len(shape) for d in dims}
    return tuple(s for i, s in enumerate(shape) if i not in gone)


def _indexed(shape: _Shape, index: Any) -> _Shape:
    """``[:, :, None, None]``."""
    index = index if isinstance(index, tuple) else (index,)
    if any(i is not None and i != slice(None) for i in index) or index.count(slice(None)) > len(shape):
        raise _Unknown
    rest = list(shape)
    result = [1 if i is None else rest.pop(0) for i in index]
    return (*result, *rest)
