"""What the code of a forward names: that of the class, and of the methods and functions of the user's that it names."""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterator
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from .untraceable import is_user_code

__all__ = ["asks_for_its_class", "forward_of", "named_in"]


_OF_ANY_MODULE = frozenset(dir(nn.Module)) - {"forward"}  # such as float, which is more likely said of a tensor


def forward_of(cls: type) -> Any:
    """The forward of a class; ``None`` for one of TorchScript's, which only instances have."""
    return getattr(cls, "forward", None)


def named_in(cls: type) -> frozenset[str]:
    """The names, and the strings that may be names, in the code that the forward of ``cls`` may run."""
    return _named_in(cls, forward_of(cls))


@lru_cache(maxsize=1024)
def _named_in(cls: type, forward: Callable) -> frozenset[str]:
    return frozenset(name for _, code in _code_of(cls, forward) for name in _names(code))


def _code_of(cls: type, forward: Callable) -> Iterator[tuple[bool, CodeType]]:
    """The code that a forward may run, as far as it is the user's; and of each, whether it is a method of ``cls``."""
    waiting: list[tuple[bool, Any]] = [(True, forward)]
    seen = set()
    while waiting:
        is_method, function = waiting.pop()
        for part in _functions_in(function):
            code = part.__code__
            if code in seen or not is_user_code(code.co_filename):
                continue
            seen.add(code)
            yield is_method, code
            for name in _names(code):
                if name not in _OF_ANY_MODULE:
                    waiting += [(True, base.__dict__[name]) for base in cls.__mro__ if name in base.__dict__]
                waiting.append((False, part.__globals__.get(name)))


def _functions_in(value: Any) -> Iterator[FunctionType]:
    """The function of a method or property, with those that its decorators have wrapped."""
    if isinstance(value, property):
        value = value.fget
    value = getattr(value, "__func__", value)
    if type(value) is FunctionType:
        yield value
        for cell in value.__closure__ or ():
            try:
                inner = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            if type(inner) is FunctionType and inner is not value:
                yield from _functions_in(inner)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
        elif isinstance(constant, str) and constant.isidentifier():  # for getattr
            yield constant


def asks_for_its_class(cls: type) -> bool:
    """Whether the forward of ``cls`` asks what class its module has, so that one derived from it may differ."""
    return _asks_for_its_class(cls, forward_of(cls))


@lru_cache(maxsize=1024)
def _asks_for_its_class(cls: type, forward: Callable) -> bool:
    return any(is_method and _asks(code) for is_method, code in _code_of(cls, forward))


def _asks(code: CodeType) -> bool:
    return bool(code.co_varnames) and _asks_of(code.co_varnames[0], code)


def _asks_of(name: str, code: CodeType) -> bool:
    """Whether there is a ``name.__class__``, or a ``type(name)`` that is more than a way to an attribute."""
    if {"type", "__class__"} & set(code.co_names):
        steps = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "PRECALL", "PUSH_NULL")]
        for i, step in enumerate(steps[1:-2], 1):
            of_type = steps[i - 1].argval == "type" and not _reads_attribute(steps[i + 2])
            of_class = steps[i + 1].argval == "__class__" and steps[i + 1].opname.startswith("LOAD_ATTR")
            if step.argval == name and step.opname.startswith("LOAD_") and (of_type or of_class):
                return True
    return any(_asks_of(name, inner) for inner in code.co_consts if isinstance(inner, CodeType))


def _reads_attribute(step: dis.Instruction) -> bool:
    """Of those that a derived class has as well."""
    return step.opname.startswith(("LOAD_ATTR", "LOAD_METHOD")) and not step.argval.startswith("__")
