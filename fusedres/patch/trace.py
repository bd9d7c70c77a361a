"""Tracing one module's ``forward`` into an ``fx`` graph that can be trusted, or saying why it cannot be.

Plain ``torch.fx`` records what it sees and silently loses the rest: ``+=`` becomes ``+``, a ``no_grad`` or autocast
context disappears, a random draw or a value kept on ``self`` is baked in. :func:`trace` records in-place operators as
what they are, and raises :class:`Untraceable`, with the reason in words, for everything that a graph would lose.

A function of the user's that cannot be traced, such as one that computes a padding from the size of the image, is
called from the graph. What a forward asks of the type of its arguments is answered as for tensors, and remembered; and
so are questions about their sizes that have an answer to be expected, as assertions have.
"""

from __future__ import annotations

import inspect
import linecache
import operator
import sys
import traceback
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from threading import get_ident
from types import FrameType, FunctionType
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import fx, is_autocast_enabled, is_grad_enabled, is_inference_mode_enabled, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ..mask import undone_draws
from .asked import state_unasked
from .modules import has_own_conv_forward, is_builtin, overrides_call
from .stores import nothing_stored
from .twins import Twins
from .untraceable import Lookup, Untraceable, in_words, is_user_code

__all__ = ["IN_PLACE_OPERATORS", "Traced", "Untraceable", "is_users_function", "survey", "trace"]

IN_PLACE_OPERATORS = (
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod),
    *(operator.ipow, operator.imatmul, operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift),
)
_LITERALS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Traced:
    """What tracing found.

    Args:
        graph: the graph of the module's forward.
        signature: of the forward, without ``self``. Parameters with a default are fixed at it in the graph.
        inlined: the submodules whose forward became part of the graph; the others are called from it.
        tensors: the arguments that the graph takes for tensors, because the forward has asked whether they are.
        asked: what the forward has asked of the sizes of its arguments, with the answers that the graph is for, each as
            an expression in an argument's name, behind that name.
        given: for each submodule, called or inlined, whether it is given nothing but tensors; ``None`` where it is
            given what the module itself is given.
    """

    graph: fx.Graph
    signature: inspect.Signature
    inlined: frozenset[nn.Module]
    tensors: frozenset[str]
    asked: tuple[tuple[str, str], ...]
    given: dict[nn.Module, bool | None]


Inline = Callable[[nn.Module], bool]


def trace(module: nn.Module, inline: Inline, surveyed: Traced | None = None, twins: Twins | None = None) -> Traced:
    """The graph of ``module.forward``, the same in train and in eval mode; of calls without ``*args`` and ``**kwargs``.

    Args:
        inline: called with a submodule, says whether its forward should become part of the graph. A submodule
            that should but cannot be traced is called from the graph instead.
        surveyed: what :func:`survey` found where it inlined the same.
        twins: what has been traced of the model.

    Raises:
        Untraceable: where the graph would not do what the forward does.
    """
    opaque: set[nn.Module] = set()
    called: list[Lookup] = []
    once = partial(_trace_around, module, inline, opaque, called, twins or Twins(module))
    evaluating, training = _in_both_modes(once, opaque, called, surveyed)
    if not _same(evaluating, training) and (functions := _functions_of(module, *training.inlined)):
        # One of them may be what differs, as a stochastic depth that is written as a function: it is called instead.
        called += functions
        evaluating, training = _in_both_modes(once, opaque, called)
    if not _same(evaluating, training):
        raise Untraceable("its forward does different things in train and in eval mode")
    return evaluating


def _in_both_modes(
    once: Callable[..., Traced], opaque: set[nn.Module], called: list[Lookup], surveyed: Traced | None = None
) -> tuple[Traced, Traced]:
    """Both graphs, with the same submodules and functions called from them."""
    evaluating = surveyed or once(training=False)
    while True:
        known = len(opaque), len(called)
        training = once(training=True)
        if (len(opaque), len(called)) == known:
            break
        evaluating = once(training=False)
    _read_the_mode(evaluating.graph, training.graph)
    return evaluating, training


def _same(evaluating: Traced, training: Traced) -> bool:
    asked = evaluating.asked == training.asked
    return asked and _comparable(evaluating.graph) == _comparable(training.graph)


def survey(module: nn.Module, inline: Inline, twins: Twins | None = None) -> Traced:
    """As :func:`trace`, in eval mode alone: half the time, to see whether there is anything worth tracing."""
    return _trace_around(module, inline, set(), [], twins or Twins(module), training=False)


def _trace_around(
    module: nn.Module, inline: Inline, opaque: set[nn.Module], called: list[Lookup], twins: Twins, training: bool
) -> Traced:
    """Traces, adding to ``opaque`` each submodule that turns out to be untraceable, until none is left inlined.

    Before a module, functions of the user's that the failure came through are called instead of traced: they are added
    to ``called``.
    """
    while True:
        try:
            return _trace_as_twin(module, lambda child: child not in opaque and inline(child), training, called, twins)
        except Untraceable as failure:
            if failure.function is not None:
                called.append(failure.function)
            elif failure.culprit:
                opaque.add(module.get_submodule(failure.culprit))
            else:
                raise


def _trace_as_twin(module: nn.Module, inline: Inline, training: bool, called: Sequence[Lookup], twins: Twins) -> Traced:
    """Traces what no twin's trace stands for."""
    key = None if called else twins.key(module, inline, training)
    if (found := twins.find(key, module)) is not None:
        return found
    traced = _trace_once(module, inline, training, called)
    twins.keep(key, module, traced)
    return traced


def _trace_once(module: nn.Module, inline: Inline, training: bool, called: Sequence[Lookup]) -> Traced:
    signature = _signature(module)
    tracer = _Tracer(signature, inline)
    modules = dict(module.named_modules())
    classes = set(map(type, modules.values()))
    failure = None
    try:
        with nothing_stored(modules, tracer.proxies), _no_random_numbers(), _mode(modules.values(), training):
            try:
                with _Watch(), state_unasked(classes), _as_calls(tracer, called), _whole_calls(tracer, classes):
                    graph = tracer.trace(module)
            except Exception as error:
                culprit, function = getattr(error, "_fusedres_culprit", ""), _innermost_function(error, called)
                failure = Untraceable(in_words(error), culprit, function)
            if failure is not None:  # raised without the error, whose frames hold what the tracer has made
                raise failure
    except Untraceable as error:
        error.culprit = tracer.inlined_at(error.culprit)
        raise
    tensors, asked = frozenset(tracer.tensors), tuple(dict.fromkeys(tracer.asked))
    return Traced(graph, signature, frozenset(tracer.inlined), tensors, asked, tracer.given)


def _signature(module: nn.Module) -> inspect.Signature:
    signature = inspect.signature(type(module).forward)
    parameters = list(signature.parameters.values())[1:]
    for parameter in parameters:
        if parameter.kind == parameter.VAR_POSITIONAL and parameter is parameters[0]:
            raise Untraceable(f"its forward takes {parameter.replace(annotation=parameter.empty)} and nothing by name")
        if parameter.default is not parameter.empty and type(parameter.default) not in _LITERALS:
            raise Untraceable(f"the default of its argument {parameter.name!r} is not a plain value")
    return signature.replace(
        parameters=[p.replace(annotation=p.empty) for p in parameters], return_annotation=signature.empty
    )


# ---------------------------------------------------------------------------------------------------------------------
# The tracer
# ---------------------------------------------------------------------------------------------------------------------


class _Proxy(fx.Proxy):
    """A proxy that records in-place operators, and refuses to be asked for its type by the traced code.

    ``fx.Proxy`` lacks ``__iadd__``, so that Python falls back to ``__add__`` and a mutation vanishes from the graph;
    and ``isinstance(x, Tensor)`` would answer no and take a branch that the real call does not take.
    """

    @property
    def __class__(self):
        frame = sys._getframe(1)
        if frame.f_code is torch.is_tensor.__code__:
            frame = frame.f_back
        elif not is_user_code(frame.f_code.co_filename) or "isinstance" not in frame.f_code.co_names:
            return _Proxy  # some function of PyTorch's asks, for its own purposes
        if not self.tracer.takes_for_tensor(self.node):  # what it is not known to be is no answer
            raise Untraceable("its forward asks for the type of a value")
        return torch.Tensor

    def __getattr__(self, name: str) -> Any:
        # A proxy has every attribute, so that hasattr(x, "tensors") would answer yes for any x.
        if self.node.op == "placeholder" and not hasattr(torch.Tensor, name):
            raise Untraceable(f"its forward reads {name!r} of an argument, which tensors do not have")
        return super().__getattr__(name)


def _in_place(target: Callable) -> Callable:
    def record(self: _Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return record


for _operator in IN_PLACE_OPERATORS:
    setattr(_Proxy, f"__{_operator.__name__}__", _in_place(_operator))


class _Tracer(fx.Tracer):
    def __init__(self, signature: inspect.Signature, inline: Inline) -> None:
        super().__init__()
        self.proxy_buffer_attributes = True
        self.inlined: set[nn.Module] = set()
        self.tensors: set[str] = set()
        self.asked: list[tuple[str, str]] = []
        self.given: dict[nn.Module, bool | None] = {}
        self.proxies: list[ref[fx.Proxy]] = []
        self._signature = signature
        self._inline = inline
        self._context = _context()

    def takes_for_tensor(self, node: fx.Node) -> bool:
        """Whether ``node`` is a tensor, as far as the graph goes: for an argument, that is checked at every call."""
        if node.op == "placeholder":
            self.tensors.add(node.target)
            return True
        return self._is_tensor(node)

    def _is_tensor(self, value: Any) -> bool | None:
        """Whether something is surely a tensor; ``None`` for an argument, which may be one."""
        node = value.node if isinstance(value, fx.Proxy) else value
        if not isinstance(node, fx.Node):
            return False
        if node.op == "placeholder":
            return None
        if node.op == "call_module":
            return _makes_tensors(self.root.get_submodule(node.target))
        return node.target in _MAKE_TENSORS

    def to_bool(self, obj: fx.Proxy) -> bool:
        """The answer to a question about the sizes of an argument, which is then asked at every call."""
        found = _size_question(obj.node)
        answer = None if found is None else _expected(obj.node, sys._getframe(2))
        if answer is None or _reshapes(obj.node):
            return super().to_bool(obj)
        name, text = found
        self.asked.append((name, text if answer else f"not {text}"))
        _erase(obj.node)
        return answer

    def _note_what_is_given(self, module: nn.Module, args: tuple) -> None:
        kinds = {self._is_tensor(a) for a in args} | {self.given.get(module, True)}
        self.given[module] = False if False in kinds else None if None in kinds else True

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        as_it_is = (is_builtin(module) and not has_own_conv_forward(module)) or overrides_call(type(module))
        return as_it_is or not self._inline(module)

    def call_module(self, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        try:
            path = self.path_of_module(module)
        except NameError:
            if self._is_made_on_the_way(module):
                return forward(*args, **kwargs)
            raise Untraceable(f"it calls a {type(module).__name__} that is not registered as a submodule") from None
        self._note_what_is_given(module, args)
        if not self.is_leaf_module(module, path):
            self.inlined.add(module)
        try:
            return super().call_module(module, forward, args, kwargs)
        except Exception as error:
            if not hasattr(error, "_fusedres_culprit"):
                error._fusedres_culprit = path if module in self.inlined else ""
            raise

    def _is_made_on_the_way(self, module: nn.Module) -> bool:
        """Whether the module is one like ``nn.ReLU()(x)``: of PyTorch's own, without state, and kept by nobody."""
        if not is_builtin(module) or module._parameters or module._buffers or module._modules:
            return False
        kept = (value for m in self.root.modules() for value in m.__dict__.values())
        return not any(value is module or (type(value) in _HOLDERS and _holds(value, module)) for value in kept)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list]:
        positional, keyword = [], {}
        for parameter in self._signature.parameters.values():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            given = parameter.default is not parameter.empty
            value = parameter.default if given else self.create_proxy("placeholder", parameter.name, (), {})
            if parameter.kind == parameter.KEYWORD_ONLY:
                keyword[parameter.name] = value
            else:
                positional.append(value)
        return lambda: root_fn(self.root, *positional, **keyword), []

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        if kind not in ("placeholder", "output") and _context() != self._context:
            raise Untraceable("its forward switches gradients, autocast or checkpointing on or off")
        return super().create_node(kind, *args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor) and not isinstance(a, nn.Parameter) and not self._belongs_to_root(a):
            # fx would store it on the user's module.
            raise Untraceable("its forward builds a constant tensor")
        return super().create_arg(a)

    def _belongs_to_root(self, tensor: torch.Tensor) -> bool:
        return tensor in self.tensor_attrs or any(tensor is buffer for buffer in self.root.buffers())

    def proxy(self, node: fx.Node) -> fx.Proxy:
        proxy = _Proxy(node, self)
        self.proxies.append(ref(proxy))
        return proxy

    def inlined_at(self, path: str) -> str:
        """The innermost module at or above ``path`` that is inlined, so that it could be called instead."""
        while path and self.root.get_submodule(path) not in self.inlined:
            path = path.rpartition(".")[0]
        return path


_HOLDERS = (list, dict, set, OrderedDict, tuple)


def _holds(container: Collection, module: nn.Module) -> bool:
    return any(value is module for value in (container.values() if isinstance(container, dict) else container))


# What certainly makes a tensor, of those that forwards ask about.
_TENSOR_TO_TENSOR = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
_MAKE_TENSORS = (torch.cat, F.relu, F.pad, F.interpolate, F.avg_pool2d)


def _makes_tensors(module: nn.Module) -> bool:
    if isinstance(module, nn.Sequential) and len(module):
        return _makes_tensors(module[-1])
    return type(module) in _TENSOR_TO_TENSOR


def _context() -> tuple:
    """The thread's state that changes what an operation does, and that a graph does not record."""
    return (
        is_grad_enabled(),
        is_inference_mode_enabled(),
        is_autocast_enabled("cpu"),
        is_autocast_enabled("cuda"),
        torch._C._autograd._top_saved_tensors_default_hooks(True) is not None,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Questions about sizes
# ---------------------------------------------------------------------------------------------------------------------

_COMPARISONS = {
    operator.eq: "==",
    operator.ne: "!=",
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
}
_IN_SIZES = _COMPARISONS | {operator.mod: "%", operator.floordiv: "//", operator.add: "+", operator.mul: "*"}


def _size_question(node: fx.Node) -> tuple[str, str] | None:
    """The argument whose sizes a comparison asks about, and the comparison as an expression."""
    arguments: set[str] = set()
    text = _in_sizes(node, arguments) if node.target in _COMPARISONS else None
    return (*arguments, text) if text is not None and len(arguments) == 1 else None


def _in_sizes(value: Any, arguments: set[str]) -> str | None:
    """A number or a size of an argument as an expression; ``None`` for anything else."""
    if type(value) is int:
        return repr(value)
    if not isinstance(value, fx.Node):
        return None
    if (size := _size(value)) is not None:
        arguments.add(size[0])
        return f"{size[0]}.dim()" if size[1] is None else f"{size[0]}.shape[{size[1]}]"
    if value.target not in _IN_SIZES or len(value.args) != 2:
        return None
    left, right = (_in_sizes(a, arguments) for a in value.args)
    return None if left is None or right is None else f"({left} {_IN_SIZES[value.target]} {right})"


def _size(node: fx.Node) -> tuple[str, int | None] | None:
    """The argument and the dimension whose size a node is, or no dimension where it is their number."""
    whole, index = node, None
    if node.target == "size" and len(node.args) == 2:
        index = node.args[1]
    elif node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        whole, index = node.args
    if not whole.args:
        return None
    read = (whole.target, *whole.args[1:])
    known = read in _NUMBERS if index is None else type(index) is int and (whole is node or read in _SHAPES)
    if not known or whole.kwargs or not isinstance(whole.args[0], fx.Node) or whole.args[0].op != "placeholder":
        return None
    return whole.args[0].target, index


_NUMBERS = (("dim",), (getattr, "ndim"))
_SHAPES = (("size",), (getattr, "shape"))


def _expected(node: fx.Node, frame: FrameType) -> bool | None:
    """The answer that a block is fused for, or ``None`` where either is as likely.

    What is asserted is true, an image has four dimensions, and channels are as many as the forward compares them with.
    """
    if linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("assert "):
        return True
    left, right = node.args
    size = _size(left) if isinstance(left, fx.Node) else None
    if size is None or type(right) is not int:
        return None
    if size[1] is None:
        return node.target(4, right)
    return {operator.eq: True, operator.ne: False}.get(node.target) if size[1] in (1, -3) else None


def _reshapes(node: fx.Node) -> bool:
    """Whether some method before ``node`` may have changed the sizes of an argument in place."""
    return any(n.op == "call_method" and n.target.endswith("_") for n in node.graph.nodes)


def _erase(node: fx.Node) -> None:
    """Takes a question that has been answered out of its graph, with the sizes that nothing else reads."""
    if not node.users and node.op != "placeholder":
        inputs = node.all_input_nodes
        node.graph.erase_node(node)
        for before in inputs:
            _erase(before)


# ---------------------------------------------------------------------------------------------------------------------
# Functions that are called from the graph
# ---------------------------------------------------------------------------------------------------------------------


def _innermost_function(error: Exception, called: Sequence[Lookup]) -> Lookup | None:
    """The innermost function of the user's that the error came through, unless it is called from the graph already."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for caller, frame in reversed(list(zip(frames, frames[1:]))):
        code = frame.f_code
        if not (is_user_code(code.co_filename) and is_user_code(caller.f_code.co_filename)):
            continue
        for name in caller.f_code.co_names:
            found = caller.f_globals.get(name)
            if (
                type(found) is FunctionType
                and found.__code__ is code
                and found.__globals__.get(found.__name__) is found
            ):
                known = any(caller.f_globals is g and name == n for g, n in called)
                return None if known else (caller.f_globals, name)
    return None


def _functions_of(*modules: nn.Module) -> list[Lookup]:
    """The functions of the user's that the forwards of ``modules`` may call by name."""
    found = []
    for forward in {type(m).forward for m in modules}:
        scope, code = getattr(forward, "__globals__", {}), getattr(forward, "__code__", None)
        found += [(scope, n) for n in getattr(code, "co_names", ()) if is_users_function(scope.get(n))]
    return found


@contextmanager
def _as_calls(tracer: _Tracer, lookups: Sequence[Lookup]) -> Iterator[None]:
    """Makes each function a node of the graph where it is given a value that is known only at run time."""
    before = [(scope, name, scope[name]) for scope, name in lookups]
    for scope, name, function in before:
        scope[name] = _recorded(tracer, function)
    try:
        yield
    finally:
        for scope, name, function in before:
            scope[name] = function


def _recorded(tracer: _Tracer, function: Callable) -> Callable:
    @wraps(function)
    def record(*args: Any, **kwargs: Any) -> Any:
        leaves, _ = tree_flatten((args, kwargs))
        if not any(type(leaf) is _Proxy or isinstance(leaf, fx.Proxy) for leaf in leaves):
            return function(*args, **kwargs)
        return tracer.create_proxy("call_function", function, args, kwargs)

    return record


@contextmanager
def _whole_calls(tracer: _Tracer, classes: Iterable[type[nn.Module]]) -> Iterator[None]:
    """Makes the call of a module whose class overrides ``__call__`` one node.

    ``fx`` takes the place of ``nn.Module.__call__`` alone: what the override does around it would be in the graph, and
    be done again by the override when the graph calls the module.
    """
    before = [(cls, cls.__dict__.get("__call__"), cls.__call__) for cls in classes if overrides_call(cls)]
    for cls, _, call in before:
        cls.__call__ = _recorded_call(tracer, call)
    try:
        yield
    finally:
        for cls, own, _ in before:
            if own is None:
                del cls.__call__
            else:
                cls.__call__ = own


def _recorded_call(tracer: _Tracer, call: Callable) -> Callable:
    tracing = get_ident()

    @wraps(call)
    def record(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if get_ident() != tracing:
            return call(module, *args, **kwargs)
        return tracer.call_module(module, partial(call, module), args, kwargs)

    return record


def is_users_function(target: Any) -> bool:
    """Whether a node's target is a function that neither PyTorch nor Python has, of which nothing is known."""
    return type(target) is FunctionType and is_user_code(target.__code__.co_filename)


_DROPOUTS = (F.dropout, F.dropout2d, F.alpha_dropout, F.feature_alpha_dropout)


def _read_the_mode(evaluating: fx.Graph, training: fx.Graph) -> None:
    """Makes ``F.dropout(x, p, self.training)``, whose last argument tracing has fixed, read it again in both graphs.

    It is that of the module whose code makes the call. So it is for functions of the user's that are called.
    """
    calls = [
        [n for n in graph.nodes if n.target in _DROPOUTS or is_users_function(n.target)]
        for graph in (evaluating, training)
    ]
    if [node.target for node in calls[0]] != [node.target for node in calls[1]]:
        return
    for pair in zip(*calls):
        of_mode = [_differing(list(node.args) for node in pair), _differing(node.kwargs for node in pair)]
        for graph, node in zip((evaluating, training), pair):
            if any(of_mode):
                stack = list(node.meta.get("nn_module_stack", {}).values())
                with graph.inserting_before(node):
                    mode = graph.get_attr(".".join([*(path for path, _ in stack[-1:] if path), "training"]))
                mode.meta = dict(node.meta)
                for i in of_mode[0]:
                    node.update_arg(i, mode)
                for name in of_mode[1]:
                    node.update_kwarg(name, mode)


def _differing(pair: Iterable[Any]) -> list[Any]:
    """The keys with ``False`` in evaluation and ``True`` in training."""
    evaluating, training = (dict(enumerate(v)) if isinstance(v, list) else v for v in pair)
    return [key for key, value in evaluating.items() if value is False and training.get(key) is True]


def _comparable(graph: fx.Graph) -> list[tuple]:
    """The graph as comparable data: each node's operation and arguments, other nodes by their position."""
    position = {node: f"%{i}" for i, node in enumerate(graph.nodes)}
    return [(node.op, node.target, fx.map_arg((node.args, node.kwargs), position.__getitem__)) for node in graph.nodes]


# ---------------------------------------------------------------------------------------------------------------------
# What must not happen while tracing
# ---------------------------------------------------------------------------------------------------------------------


class _Watch(TorchDispatchMode):
    """Stops the traced code before it computes on real tensors what a graph would bake in."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise Untraceable("its forward draws random numbers")
        if func is torch.ops.aten._local_scalar_dense.default:
            raise Untraceable("its forward branches on the value of a tensor")
        if func._schema.is_mutable:
            raise Untraceable("its forward changes a tensor in place that is no part of the graph")
        return func(*args, **(kwargs or {}))


@contextmanager
def _no_random_numbers() -> Iterator[None]:
    """Declines a forward that draws from Python's or NumPy's generator, and gives the draw back."""
    with undone_draws() as drawn:
        yield
    if drawn:
        raise Untraceable("its forward draws random numbers")


@contextmanager
def _mode(modules: Iterable[nn.Module], training: bool) -> Iterator[None]:
    """Sets ``training`` of ``modules``, past any ``train()`` that the user overrode, and restores each flag."""
    before = [(m.__dict__, m.__dict__["training"]) for m in modules if "training" in m.__dict__]
    for attributes, _ in before:
        attributes["training"] = training
    try:
        yield
    finally:
        for attributes, flag in before:
            attributes["training"] = flag
