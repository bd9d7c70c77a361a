"""What a forward stores while it is traced: seen, taken back, and a reason to decline it.

A fused forward would not store it again, and what was stored is no value but a stand-in of the tracer's. Looked at are
the attributes of all modules and of their classes and the globals that the code names, with the containers and plain
objects in them. What has been stored anywhere else keeps a stand-in alive.
"""

from __future__ import annotations

import gc
import sys
from argparse import Namespace
from collections import OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from operator import is_
from types import SimpleNamespace
from typing import Any, Protocol
from weakref import ref

import torch
from torch import fx, nn

from .modules import is_builtin
from .source import forward_of, named_in
from .untraceable import Untraceable

__all__ = ["attributes_of", "nothing_stored"]

_DEEPEST = 3
_MOST_ITEMS = 1000  # more is data
_MAPPINGS, _SEQUENCES = (dict, OrderedDict, defaultdict), (list, deque)
_CONTAINERS = frozenset({*_MAPPINGS, *_SEQUENCES, set})
_ATOMS = frozenset({bool, int, float, complex, str, bytes, type(None), torch.Tensor, nn.Parameter, torch.Size})
_OF_ANY_MODULE = frozenset(nn.Module().__dict__)


@contextmanager
def nothing_stored(modules: Mapping[str, nn.Module], proxies: Sequence[ref[fx.Proxy]]) -> Iterator[None]:
    """Takes back what is stored inside, and declines the forward that has stored it.

    Args:
        modules: the modules whose code may run, by path.
        proxies: all that the tracer makes, of which none is to outlive the tracing.
    """
    before: list[_Kept] = [*_of_modules(modules), *_of_classes(modules)]
    try:
        yield
    except BaseException:
        _take_back(before, proxies)
        raise
    if (stored := _take_back(before, proxies)) is not None:
        path, where = stored
        raise Untraceable(f"its forward stores a value {where}", path)


def _take_back(before: Sequence[_Kept], proxies: Sequence[ref[fx.Proxy]]) -> tuple[str, str] | None:
    """Where something was stored, behind the path of the module that it concerns; ``None`` where nothing was."""
    changed = [(kept.path, where) for kept in before if (where := kept.restore()) is not None]
    if left := _alive(proxies):
        changed.append((_home(left[0].node), "outside of the module"))
        _forget(left)
    return changed[0] if changed else None


# ---------------------------------------------------------------------------------------------------------------------
# What can be compared
# ---------------------------------------------------------------------------------------------------------------------


class _Kept(Protocol):
    """Something as it was, at or around the module at ``path``."""

    path: str

    def restore(self) -> str | None:
        """Puts everything back; says where something had changed."""


class _Container:
    """A container that a module holds, or its attributes themselves."""

    def __init__(self, path: str, live: Any, where: str, name: str = "") -> None:
        self.path = path
        self._live, self._copy, self._where, self._name = live, live.copy(), where, name

    def restore(self) -> str | None:
        live, copy = self._live, self._copy
        if _same_items(live, copy):
            return None
        name = self._name or next(iter(_changed(live, copy)), "")  # none where the order alone has changed
        live.clear()
        (live.extend if type(live) in _SEQUENCES else live.update)(copy)
        return f"{self._where} ({name!r})"


class _Namespace:
    """Entries of a class or of a module's globals, to which others may write as well."""

    def __init__(self, path: str, owner: Any, names: Collection[str] = ()) -> None:
        self.path = path
        self._owner, self._names = owner, names
        self._before = self._now()

    def _now(self) -> dict[str, Any]:
        if isinstance(self._owner, type):
            return {k: v for k, v in vars(self._owner).items() if not k.startswith("__")}
        return {name: self._owner[name] for name in self._names if name in self._owner}

    def restore(self) -> str | None:
        now, before, owner = self._now(), self._before, self._owner
        changed = _changed(now, before)
        for name in changed:
            if isinstance(owner, type):
                setattr(owner, name, before[name]) if name in before else delattr(owner, name)
            elif name in before:
                owner[name] = before[name]
            else:
                del owner[name]
        if not changed:
            return None
        return f"{'on its class' if isinstance(owner, type) else 'in a global'} ({changed[0]!r})"


def _same_items(a: Collection, b: Collection) -> bool:
    if not a and not b:
        return True
    if isinstance(a, set):
        return a == b
    same_values = not isinstance(a, dict) or all(map(is_, a.values(), b.values()))
    return len(a) == len(b) and same_values and all(map(is_, a, b))


def _changed(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """The names whose values differ; those of ``before`` first, in order."""
    return [k for k in {**before, **now} if now.get(k, k) is not before.get(k, k)]


def _of_modules(modules: Mapping[str, nn.Module]) -> Iterator[_Kept]:
    """The attributes of all modules, and the containers in those of the user's classes."""
    seen: set[int] = set()
    for path, module in modules.items():
        state = module.__dict__
        yield _Container(path, state, "on the module")
        if is_builtin(module):
            continue
        for name, value in state.items():
            if name in _OF_ANY_MODULE:
                if type(value) in _CONTAINERS:
                    yield _Container(path, value, "on the module", name)
            elif type(value) not in _ATOMS:
                for live in _containers(value, _DEEPEST, seen):
                    yield _Container(path, live, "on the module", name)


def _of_classes(modules: Mapping[str, nn.Module]) -> Iterator[_Kept]:
    """The attributes of the user's classes, and the globals that their forwards name, with the containers in them."""
    seen: set[int] = set()
    paths = {}
    for path, module in modules.items():
        paths.setdefault(type(module), path)
    classes = {cls: path for kind, path in paths.items() for cls in kind.__mro__ if _is_users(cls)}
    for cls, path in classes.items():
        yield _Namespace(path, cls)
        for name, value in vars(cls).items():
            for live in _containers(value, _DEEPEST, seen):
                yield _Container(path, live, "on its class", name)
    for cls, path in paths.items():
        names, scope = named_in(cls), getattr(forward_of(cls), "__globals__", {})
        if names:
            yield _Namespace(path, scope, names)
            for name in names & scope.keys():
                for live in _containers(scope[name], _DEEPEST, seen):
                    yield _Container(path, live, "in a global", name)


def _containers(value: Any, deepest: int, seen: set[int]) -> Iterator[Any]:
    """The containers that can be changed at and below ``value``, and the attributes of plain objects."""
    kind = type(value)
    if kind in _ATOMS or id(value) in seen:
        return
    seen.add(id(value))
    live = value if kind is tuple or kind in _CONTAINERS else attributes_of(value)
    if live is None or len(live) > _MOST_ITEMS:
        return
    if kind is not tuple:
        yield live
    if deepest:
        for inner in list(live.values() if isinstance(live, dict) else live):
            yield from _containers(inner, deepest - 1, seen)


def attributes_of(value: Any) -> dict[str, Any] | None:
    """The attributes of an object of a class of the user's, or of a namespace; ``None`` for anything else."""
    cls = type(value)
    if not cls.__dictoffset__ or isinstance(value, (nn.Module, torch.Tensor, type)):
        return None
    return object.__getattribute__(value, "__dict__") if cls in (SimpleNamespace, Namespace) or _is_users(cls) else None


@cache
def _is_users(cls: type) -> bool:
    package = str(cls.__module__).partition(".")[0]
    return package not in ("torch", "builtins") and package not in sys.stdlib_module_names


# ---------------------------------------------------------------------------------------------------------------------
# What is left of the tracer's
# ---------------------------------------------------------------------------------------------------------------------


def _alive(proxies: Sequence[ref[fx.Proxy]]) -> list[fx.Proxy]:
    for generation in (None, 1, 2):  # a cycle of references is nobody's store
        if generation is not None:
            gc.collect(generation)
        if all(proxy() is None for proxy in proxies):
            return []
    return [found for proxy in proxies if (found := proxy()) is not None]


def _home(node: fx.Node) -> str:
    """The path of the module whose code has made a node."""
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return next(reversed(stack[:-1] if node.op == "call_module" else stack), "")


def _forget(left: list[fx.Proxy]) -> None:
    """Takes stand-ins out of what holds them, as far as that can be known."""
    for proxy in left:
        for holder in gc.get_referrers(proxy):
            if holder is left:
                continue
            if isinstance(holder, dict):
                _forget_in(holder, proxy)
            elif type(holder) in _SEQUENCES:
                others = [item for item in holder if item is not proxy]
                holder.clear()
                holder.extend(others)
            elif type(holder) is set:
                holder.discard(proxy)
            elif (attributes := attributes_of(holder)) is not None:
                _forget_in(attributes, proxy)


def _forget_in(holder: dict, proxy: fx.Proxy) -> None:
    for key in [key for key, value in holder.items() if value is proxy]:
        owner = next((o for o in gc.get_referrers(holder) if isinstance(o, type)), None)
        if owner is not None and vars(owner).get(key) is proxy:
            delattr(owner, key)  # past its class, Python would look up what is no longer there
        else:
            del holder[key]
