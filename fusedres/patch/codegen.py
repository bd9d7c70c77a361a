"""From a traced graph and its regions to a forward's text, and from that to a function with readable tracebacks."""

from __future__ import annotations

import hashlib
import inspect
import linecache
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx, nn

from .. import block
from ..block import Act, Block, Conv, Dense, Dropout, DropPath, Mask, Norm, Pool, SqueezeExcite, Step
from ..ops.activations import IDENTITY
from . import watch
from .gated_join import GatedJoin
from .trace import Traced
from .view import Region
from .watch import Watched

__all__ = ["compile_forward", "formula", "generate"]


class _Code:
    """A piece of code as an argument of a graph node: prints as itself."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def generate(
    module: nn.Module,
    traced: Traced,
    regions: Sequence[Region],
    watched: tuple[Watched, ...],
    options: dict[str, str],
) -> tuple[str, dict[str, Any]]:
    """The source of a forward in which each region is one call, and the globals that it needs.

    Args:
        module: the module that the graph is of.
        traced: its graph, which is rewritten.
        regions: in the order of their last nodes.
        watched: what has to be as it was for the graph to stand for the stock forward.
        options: keyword arguments of the engine that are not at their default.
    """
    fresh = _Names(traced)
    run, stock, changed, constants, tensor = map(fresh, ("fusedres_block", "stock", "changed", "watched", "Tensor"))
    blocks = {fresh(f"{_kind(region.block)}_{i}"): region.block for i, region in enumerate(regions)}
    calls: dict[fx.Node, fx.Node] = {}
    for name, region in zip(blocks, regions):
        _replace(traced.graph, region, run, name, options, calls)
    code = traced.graph.python_code("self")
    body = _body(code.src)
    tensors = traced.tensors | {name for name, _ in traced.asked}
    others = [f"not isinstance({name}, {tensor})" for name in sorted(tensors)]
    sizes = [_negated(question) for _, question in traced.asked]
    guard = _guard(traced.signature, stock, [*others, *sizes, f"{changed}(self, {constants})"])
    arguments = ", ".join(["self", str(traced.signature)[1:-1]] if traced.signature.parameters else ["self"])
    source = f"{_header(type(module), blocks)}def forward({arguments}):\n{guard}{body}"
    globals_ = {run: block, stock: type(module), changed: watch.changed, constants: watched}
    if others:
        globals_[tensor] = Tensor
    return source, {**code.globals, **blocks, **globals_}


class _Names:
    """Makes names that no value and no argument of the traced forward has."""

    def __init__(self, traced: Traced) -> None:
        self._used = {node.name for node in traced.graph.nodes} | set(traced.signature.parameters)

    def __call__(self, wanted: str) -> str:
        name = wanted
        while name in self._used:
            name += "_"
        return name


def compile_forward(source: str, names: dict[str, Any], name: str) -> Callable:
    """The function ``forward`` of ``source``, whose lines tracebacks, debuggers and ``inspect`` can show."""
    filename = f"<{name} by fusedres.patch {hashlib.sha1(source.encode()).hexdigest()[:8]}>"
    # Without a modification time, linecache never checks the entry against a file.
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    scope = dict(names)
    exec(compile(source, filename, "exec"), scope)
    return scope["forward"]


def _replace(
    graph: fx.Graph, region: Region, run: str, name: str, options: dict[str, str], calls: dict[fx.Node, fx.Node]
) -> None:
    """Puts one call in the place of a region; ``calls`` maps what earlier calls replaced, which may be its inputs."""
    last = region.nodes[-1]
    inputs = [calls.get(node, node) for node in region.inputs]
    with graph.inserting_before(last):
        # A method call prints as `fusedres_block.run(...)`, looked up in the module when the line runs.
        if isinstance(region.block, GatedJoin):
            method, arguments = "join", (_Code(name), *inputs)
        else:
            method = "run_dense" if isinstance(region.block, Dense) else "run"
            arguments = (_Code(run), _Code(name), _Code("self"), *inputs)
        call = graph.create_node("call_method", method, arguments, dict(options), name=f"{name}_out")
    calls[last] = call
    last.replace_all_uses_with(call)
    for node in reversed(region.nodes):
        graph.erase_node(node)
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:  # the weight of a function that the region had
            graph.erase_node(node)


_Described = Block | Dense | GatedJoin


def _kind(b: _Described) -> str:
    return {Block: "block", Dense: "dense", GatedJoin: "gated"}[type(b)]


def _header(cls: type, blocks: dict[str, _Described]) -> str:
    origin = f"# {cls.__module__}.{cls.__qualname__}, with a forward written by fusedres.patch\n"
    formulas = (f"{name}: {formula(b)}".replace("\n", "\n# ") for name, b in blocks.items())
    return origin + "".join(f"# {line}\n" for line in formulas) + "\n"


def formula(b: _Described) -> str:
    """``relu(x -> conv1 -> bn1 -> relu -> conv2 -> bn2  +  x)``; the layers of a dense block each on their own line."""
    if isinstance(b, GatedJoin):
        return str(b)
    if isinstance(b, Dense):
        return "x and the channels of each layer, which reads all before it" + "".join(
            f"\n    {_path('[...]', layer)}" for layer in b.layers
        )
    if b.shortcut is None:
        return _path("x", b.branch)
    branch, start, side, where = b.branch, "x", "residual" if b.residual == "argument" else "x", ""
    if b.residual == "pending":
        head = next(i for i, step in enumerate(branch) if isinstance(step, Conv))
        start, side, where = "p", "p", f", p = {_path('x', branch[:head])}"
        branch = branch[head:]
    text = f"{_path(start, branch)}  +  {_path(side, b.shortcut)}"
    return (text if b.act == IDENTITY else f"{b.act}({text})") + where


def _path(start: str, steps: Sequence[Step]) -> str:
    return " -> ".join([start, *map(_step, steps)])


def _step(step: Step) -> str:
    if isinstance(step, Act):
        return str(step.activation)
    if isinstance(step, SqueezeExcite):
        inner = "" if step.act == IDENTITY else f"{step.act} -> "
        return f"squeeze-excitation({step.fc1} -> {inner}{step.fc2} -> {step.gate})"
    if isinstance(step, Norm) and step.act != IDENTITY:
        return f"{step.path} -> {step.act}"
    if isinstance(step, Dropout) and step.p is not None:
        return f"dropout of {step.p:g}"
    if isinstance(step, Mask):
        if step.p is not None:
            return f"dropout of {step.p:g} of the channels"
        return f"{step.path} ({'dropout of channels' if step.channels else 'stochastic depth'})"
    if isinstance(step, Pool) and step.window is not None:
        return "max pooling of {} x {}".format(*step.window.kernel)
    return f"{step.path} ({_KINDS[type(step)]})" if type(step) in _KINDS else step.path


_KINDS = {Dropout: "dropout", DropPath: "stochastic depth", Pool: "max pooling"}


def _body(source: str) -> str:
    """What follows the ``def`` line in code by fx, with a result that is only named to be returned returned at once."""
    body = source[source.index("def forward(") :].split("\n", 1)[1].rstrip() + "\n"
    return re.sub(r"    (\w+) = (.+?)(?:;  (?:\w+ = )+None)?\n    return \1\n$", r"    return \2\n", body)


def _guard(signature: inspect.Signature, stock: str, others: list[str]) -> str:
    """The lines that send a call to the stock forward where the graph does not stand for it."""
    parameters = list(signature.parameters.values())
    more = [p.name for p in parameters if p.kind in _MORE]
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in _MORE]
    conditions = [f"{name} is None" for name in required] if len(required) > 1 else []
    conditions += [*more, *(_differs(p) for p in parameters if p.default is not p.empty), *others]
    arguments = ", ".join(["self", *map(_handed_on, parameters)])
    return f"    if {' or '.join(conditions)}:\n        return {stock}.forward({arguments})\n"


_MORE = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def _handed_on(parameter: inspect.Parameter) -> str:
    """An argument of the stock forward's."""
    if parameter.kind == parameter.KEYWORD_ONLY:
        return f"{parameter.name}={parameter.name}"
    return _MORE.get(parameter.kind, "") + parameter.name


def _negated(question: str) -> str:
    return question.removeprefix("not ") if question.startswith("not ") else f"not {question}"


def _differs(parameter: inspect.Parameter) -> str:
    literal = parameter.default
    if literal is None or isinstance(literal, bool):
        return f"{parameter.name} is not {literal}"
    return f"{parameter.name} != {literal!r}"
